"""The forward of a decoder that is spread over ranks, for generation.

Owns the communication of a step beside that inside of layers. One replica of pp 2 x tp 2:

              tp0   tp1
    stage 0    0     1      embeds the tokens; sends hidden states to the next stage
                |     |
    stage 1    2     3      computes the scores; rank 2 chooses the tokens

    tokens     2 -> 3, then 2 -> 0 and 3 -> 1

Expert parallelism connects replicas: those that share the experts take other prompts and other
numbers of steps, and every rank must take part in every exchange of tokens. So all of them step
together until the last one has ended; a replica without work takes part with no tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.generation.forward import Forward
from launcher.host_reads import host_read
from launcher.parallel.meshes import Meshes
from models.cache import KVCache
from models.decoder import Decoder
from models.moe import MoE


class DistributedForward(Forward):
    """The part of this rank in the forward of a decoder: its shards of the layers of its stage."""

    def __init__(self, model: Decoder, meshes: Meshes, device: torch.device) -> None:
        """`model`: this rank's part, parallelized over `meshes`; where it ends it returns the
        logits of the full vocabulary. A collective of all ranks of `meshes`."""
        super().__init__(model)
        self.decoder, self.device = model, device
        self.dtype = next(model.parameters()).dtype
        experts = model.config.experts is not None
        self.tensor, self.pipeline = meshes.group("tp"), meshes.group("pp")
        self.experts = meshes.group("ep") if experts else None
        self.chooses = model.ends and (self.tensor is None or dist.get_rank(self.tensor) == 0)
        if self.pipeline is not None:
            self.stage = dist.get_rank(self.pipeline)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor | None:
        self._steps(True)
        inputs = ids if self.decoder.embeds else self._received(ids)
        output = self.decoder(inputs, cache=cache, last_only=True)
        if not self.decoder.ends:
            dist.send(output.contiguous(), group=self.pipeline, group_dst=self.stage + 1)
        return output[:, -1] if self.chooses else None

    def share(self, tokens: Tensor) -> Tensor:
        if self.decoder.ends and self.tensor is not None:
            dist.broadcast(tokens, group=self.tensor, group_src=0)
        if self.pipeline is not None:
            last = dist.get_world_size(self.pipeline) - 1
            dist.broadcast(tokens, group=self.pipeline, group_src=last)
        return tokens

    def any(self, flag: bool) -> bool:
        for group in (self.tensor, self.pipeline):
            flag = flag if group is None else _any(flag, group, self.device)
        return flag

    def finish(self) -> None:
        while self._steps(False):
            self._exchange_nothing()

    def _steps(self, here: bool) -> bool:
        """Whether any replica that shares the experts takes one more step."""
        return here if self.experts is None else _any(here, self.experts, self.device)

    def _received(self, ids: Tensor) -> Tensor:
        """Hidden states [rows, n, hidden] of the stage before."""
        shape = (*ids.shape, self.decoder.config.hidden_size)
        states = torch.empty(shape, dtype=self.dtype, device=self.device)
        dist.recv(states, group=self.pipeline, group_src=self.stage - 1)
        return states

    @torch.inference_mode()
    def _exchange_nothing(self) -> None:
        """The exchanges of one forward, layer after layer, without tokens of this replica."""
        nothing = torch.empty(
            0, self.decoder.config.hidden_size, dtype=self.dtype, device=self.device
        )
        for module in self.decoder.modules():
            if isinstance(module, MoE):
                counts = torch.zeros(module.count, dtype=torch.int64, device=self.device)
                module.exchanged(nothing, counts)


def _any(flag: bool, group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether `flag` is True on any rank of `group`."""
    found = torch.full((), int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    with host_read("stop of one rank"):
        return bool(found.item())
