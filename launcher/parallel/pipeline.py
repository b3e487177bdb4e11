"""Pipeline parallelism: the model in stages on several ranks, a batch in micro-batches.

Owns the communication of one `pp` group. Training runs one of torch's schedules; evaluation has its
own chain of sends, for any number of micro-batches. Invariants: every rank of the group makes the
same calls with rows of the same shape; micro-batch m is the m-th chunk of the rows; a stage returns
a new tensor, never a view; gradients and losses of the micro-batches are summed.

The shapes sent between stages follow from the rows, so no shape inference runs. Torch allocates its
buffers for one shape (another one would crash the ranks): for a batch of another shape a new
schedule is built, on all ranks alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from launcher.parallel.apply import free_gathered
from launcher.parallel.schedules import (
    SCHEDULES,
    Loss,
    TorchSchedule,
    broken_rule,
    build_schedule,
    stage_ranks,
)
from models.decoder import Decoder
from models.documents import OnHost
from models.stage import StageSplit, stage_rank

BY_ROW = ("position_ids", "document_ids", "document_lengths", "sample_seeds")
"""Arguments of `Decoder.forward` whose dim 0 is the batch: they are split into micro-batches. All
others are passed to every micro-batch unchanged."""
ON_HOST = "document_lengths"
"""The argument of `Decoder.forward` that stays on the CPU."""


class Pipeline:
    """The stages of this rank, and their communication with the other ranks.

    A sharded stage module must be a `fully_shard` root. It keeps its gathered weights during a
    step: gradients are reduced once, at the end of the step.
    """

    def __init__(
        self,
        stages: Mapping[int, Decoder],
        split: StageSplit,
        *,
        schedule: str,
        group: dist.ProcessGroup,
        micro_batches: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`stages`: the modules of this rank by stage index, with only their layers. `schedule`: a
        name of `SCHEDULES`. `group`: the ranks of this pipeline; a collective of them. `dtype`:
        that of hidden states.

        Raises ValueError when stages, ranks, schedule and micro-batches do not fit together.
        """
        self.stages = dict(sorted(stages.items()))
        self.split, self.schedule, self.group = split, schedule, group
        self.micro_batches, self.device, self.dtype = micro_batches, device, dtype
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._check()
        self._constants: Mapping[str, Any] = {}
        self._loss: Loss | None = None
        self._built: tuple[tuple[int, int], TorchSchedule] | None = None
        for module in self.stages.values():
            module.register_forward_pre_hook(self._add_constants, with_kwargs=True)
            # Before the hook of FSDP, which moves all tensors to the GPU. Torch's schedule, which
            # calls the module, splits tensors alone.
            module.register_forward_pre_hook(_keep_on_host, with_kwargs=True, prepend=True)
            if isinstance(module, FSDPModule):
                # Zero-bubble schedules compute input and weight gradients separately, with the same
                # gathered weights.
                module.set_reshard_after_forward(False)
        # NCCL needs all ranks of a group in its first call, and a send involves only two.
        dist.all_reduce(torch.zeros(1, device=device), group=group)

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage."""
        return 0 in self.stages

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, which computes the loss."""
        return self.split.count - 1 in self.stages

    def train(
        self,
        input_ids: Tensor,
        labels: Tensor,
        loss: Loss,
        arguments: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Forward and backward of a batch: gradients are accumulated.

        `input_ids` and `labels` [micro_batches * rows, length] int64, the same on every rank.
        `loss` computes the loss of one micro-batch. `arguments` are the keyword arguments of
        `Decoder.forward`, for all rows. Returns the sum of the losses, a float32 scalar; zero on
        ranks without the last stage. Raises ValueError when the rows do not divide.
        """
        schedule = self._schedule_for(input_ids)
        losses: list[Tensor] = []
        for module in self.stages.values():
            module.train()
        by_row, self._constants = _by_row(arguments)
        self._loss = loss
        try:
            schedule.step(
                *((input_ids,) if self.is_first else ()),
                target=labels if self.is_last else None,
                losses=losses if self.is_last else None,
                return_outputs=False,
                **by_row,
            )
        finally:
            self._loss, self._constants = None, {}
        return self._total(losses)

    @torch.no_grad()
    def evaluate(
        self,
        input_ids: Tensor,
        labels: Tensor,
        loss: Loss,
        arguments: Mapping[str, Any] | None = None,
        *,
        micro_batches: int = 1,
    ) -> Tensor:
        """The summed loss of a batch in evaluation mode; arguments and result as in `train`."""
        by_row, constants = _by_row(arguments)
        batches = _micro_batches(input_ids, labels, by_row, micro_batches)
        modes = {module: module.training for module in self.stages.values()}
        losses: list[Tensor] = []
        sends: list[tuple[dist.Work, Tensor]] = []
        self._constants = constants
        try:
            for module in modes:
                module.eval()
            for ids, targets, keywords in batches:
                output = self._forward(ids, keywords, sends)
                if output is not None:
                    losses.append(loss(output, targets))
            for work, _ in sends:
                work.wait()
        finally:
            self._constants = {}
            for module, mode in modes.items():
                module.train(mode)
                free_gathered(module)
        return self._total(losses)

    def _forward(
        self, ids: Tensor, keywords: dict[str, Tensor], sends: list[tuple[dist.Work, Tensor]]
    ) -> Tensor | None:
        """One micro-batch through the stages of this rank; the output of the last stage, or None.

        Pending sends are appended to `sends`: their tensors must be kept until they complete.
        """
        states = ids
        for stage, module in self.stages.items():
            if stage > 0 and self.split.ranks[stage - 1] != self.rank:
                states = torch.empty(self._hidden_shape(ids), dtype=self.dtype, device=self.device)
                dist.recv(states, group=self.group, group_src=self.split.ranks[stage - 1])
            states = module(states, **keywords)
            if stage + 1 < self.split.count and self.split.ranks[stage + 1] != self.rank:
                target = self.split.ranks[stage + 1]
                work = dist.isend(states, group=self.group, group_dst=target)
                assert work is not None
                sends.append((work, states))
        return states if self.is_last else None

    def _schedule_for(self, input_ids: Tensor) -> TorchSchedule:
        """Torch's schedule for batches of this shape; the last one is cached."""
        shape = (_rows_each(input_ids, self.micro_batches), input_ids.shape[1])
        if self._built is None or self._built[0] != shape:
            self._built = None  # frees its buffers before new ones are allocated
            self._built = (shape, self._build(torch.empty(shape, dtype=torch.int64, device="meta")))
        return self._built[1]

    def _build(self, ids: Tensor) -> TorchSchedule:
        hidden = torch.empty(
            self._hidden_shape(ids), dtype=self.dtype, device="meta", requires_grad=True
        )
        stages = [
            PipelineStage(
                module,
                stage,
                self.split.count,
                self.device,
                input_args=ids if stage == 0 else hidden,
                output_args=hidden,  # torch ignores that of the last stage
                group=self.group,
            )
            for stage, module in self.stages.items()
        ]
        schedule = build_schedule(self.schedule, stages, self.micro_batches, self._current_loss)
        ranks = stage_ranks(schedule, self.split.count)
        if ranks != self.split.ranks:
            raise ValueError(f"stages are on ranks {self.split.ranks}, but torch expects {ranks}")
        return schedule

    def _hidden_shape(self, ids: Tensor) -> tuple[int, int, int]:
        """The shape of the states between stages, for `ids` [rows, length] of a micro-batch."""
        module = next(iter(self.stages.values()))
        return (ids.shape[0], ids.shape[1] // module.stream_part[1], module.config.hidden_size)

    def _current_loss(self, output: Tensor, labels: Tensor) -> Tensor:
        assert self._loss is not None
        return self._loss(output, labels)

    def _add_constants(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Not through torch's schedule, which splits every tensor into micro-batches.
        return arguments, {**keywords, **self._constants}

    def _total(self, losses: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for loss in losses:
            total += loss.detach()
        return total

    def _check(self) -> None:
        per_rank, rest = divmod(self.split.count, self.size)
        if rest:
            raise ValueError(f"{self.split.count} stages on {self.size} ranks")
        problem = broken_rule(
            self.schedule, ranks=self.size, per_rank=per_rank, micro_batches=self.micro_batches
        )
        if problem:
            raise ValueError(problem)
        v_shaped = SCHEDULES[self.schedule].v_shaped
        expected = [stage_rank(s, self.size, v_shaped=v_shaped) for s in range(self.split.count)]
        if list(self.split.ranks) != expected:
            raise ValueError(
                f"{self.schedule} has its stages on ranks {expected}, not {list(self.split.ranks)}"
            )
        if tuple(self.stages) != self.split.stages_of(self.rank):
            raise ValueError(
                f"rank {self.rank} of the pipeline has stages {self.split.stages_of(self.rank)}, "
                f"not {tuple(self.stages)}"
            )
        for stage, module in self.stages.items():
            if (module.embeds, module.ends) != (stage == 0, stage == self.split.count - 1):
                raise ValueError(f"the module of stage {stage} is that of another stage")


def kept_on_host(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Decoder.forward`, with those that stay on the CPU out of reach of the
    wrappers of a module, which would move them to the GPU."""
    return {
        name: OnHost(value) if name == ON_HOST and isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _keep_on_host(
    module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, kept_on_host(keywords)


def _by_row(arguments: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(arguments by row, all others), without those that are None."""
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    by_row = {name: given.pop(name) for name in BY_ROW if name in given}
    return by_row, given


def _micro_batches(
    input_ids: Tensor, labels: Tensor, by_row: dict[str, Tensor], count: int
) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """`count` micro-batches of ids, labels and further arguments."""
    size = _rows_each(input_ids, count)
    chunks = {name: tensor.split(size) for name, tensor in by_row.items()}
    keywords = [{name: parts[i] for name, parts in chunks.items()} for i in range(count)]
    return list(zip(input_ids.split(size), labels.split(size), keywords, strict=True))


def _rows_each(input_ids: Tensor, count: int) -> int:
    size, rest = divmod(input_ids.shape[0], count)
    if rest or not size:
        raise ValueError(
            f"{input_ids.shape[0]} rows cannot be split into {count} equal micro-batches"
        )
    return size
