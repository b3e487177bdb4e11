"""A training run: what the loop, the step, saves and callbacks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.checkpoint.savable import Origin
from launcher.config.schema import Config, EarlyStoppingSection
from launcher.data.loader import Loader
from launcher.layout.box import Shape
from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh
from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard
from launcher.parallel.apply import shards
from launcher.parallel.gradients import Gradients
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.world import World
from launcher.report.metrics import finite
from launcher.train.compute import BatchSharder, Compute
from launcher.train.evaluate import EvaluationResult, EvaluationSet
from launcher.train.interrupts import Interrupts
from launcher.train.meter import StepMeter
from launcher.train.optimizer import Optimizer
from launcher.train.preference_task import PreferenceTask
from launcher.train.profiling import StepProfiler
from launcher.train.scaling import LossScaling
from launcher.train.state import DATA_CURSOR, TrainState, epoch_and_step, to_json
from launcher.weights.ranks.manifests import EVALUATION
from launcher.weights.ranks.redundancy import file_replicas
from launcher.weights.tensor_mapping import MappingsOf, mapped, shapes_in_files
from models.flops import TokenFlops
from models.trained import TrainedParameter


@dataclass(frozen=True, kw_only=True)
class BuiltModel:
    """This rank's part of the model, and how the full model is laid out over the ranks."""

    parts: ModelParts
    layout: Layout
    trained: Mapping[str, TrainedParameter]
    """The parameters that are trained, of the full model."""
    mappings_of: MappingsOf
    """What tensors of the model are in files."""
    compute: Compute
    batch_sharder: BatchSharder
    flops: TokenFlops | None = None
    """Of training on one token; None: not known."""
    preference: PreferenceTask | None = None
    """Training on preferences; None: on the next token."""
    saves: Callable[[str], bool] = lambda name: True
    """Whether checkpoints hold a tensor of the model: not those of the base of an adapter."""

    @cached_property
    def saved_shapes(self) -> dict[str, Shape]:
        """The tensors that checkpoints hold, of the full model, to their shapes."""
        return {name: shape for name, shape in self.layout.shapes.items() if self.saves(name)}


@dataclass(frozen=True)
class Limits:
    """Upper bounds of the gradient norm and the loss of a sound step."""

    norm: float
    loss: float
    skips: bool
    """Whether an unsound step changes nothing."""

    def are_passed(self, norm: float, loss: float) -> bool:
        """Whether one of them is too large, or not a number."""
        return not (norm < self.norm and loss < self.loss)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What a step does beside forward, backward and update."""

    max_gradient_norm: float | None
    """Gradients are clipped to this global norm; None: not at all."""
    scaling: LossScaling | None
    """How the loss is scaled; None: not at all."""
    limits: Limits | None
    """Of a sound step; None: every step is sound."""
    balance: torch.Tensor | None
    """Weight of the balance loss of one sequence and layer of experts in the loss of the step, a
    float32 scalar on the device; None: there is no balance loss."""
    has_dropout: bool


@dataclass(kw_only=True)
class TrainRun:
    """One training run in this process."""

    config: Config
    world: World
    model: BuiltModel
    gradients: Gradients
    optimizer: Optimizer
    loader: Loader
    schedule: Callable[[int], float]
    """Learning rate of the optimizer step with this index (from 0)."""
    settings: StepSettings
    steps_per_epoch: int
    total_steps: int
    sink_size: int
    """Steps between two points where the host waits for the device and callbacks run."""
    metadata: dict[str, Any]
    """About data, order and model: in every state file, compared by a resume."""
    write_model_files: Callable[[Path], None]
    """Write config.json and the tokenizer into a folder."""
    evaluation: Sequence[EvaluationSet]
    """What it is evaluated on; empty: it is not."""
    reference: torch.Tensor | None = None
    """float32 [rows of the data, 2] on the CPU: log-probabilities of both sequences of each row
    under the reference of a loss on preferences; None where they are not computed before."""
    origin: Origin
    state: TrainState
    evaluated: tuple[int, EvaluationResult] | None = None
    """The newest evaluation, and the step it was made after."""
    is_consistent: bool = True
    """Whether weights and optimizer state belong to one step: not during an update."""
    meter: StepMeter
    profiler: StepProfiler | None = None
    """None: this rank records no steps."""
    interrupts: Interrupts = field(default_factory=Interrupts)
    pending_reads: list[Callable[[], None]] = field(default_factory=list)
    """What orders copies of weights or optimizer state, which may still be on their way, before the
    next change of either."""
    log: Callable[[str], None] = print

    @property
    def output_dir(self) -> Path:
        """Root of everything the run writes."""
        return Path(self.config.output_dir)

    @property
    def mesh(self) -> Mesh:
        """The axes of the layout."""
        return self.model.layout.mesh

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters on this rank."""
        return [p for name, p in self.model.parts.all_named() if name in self.model.trained]

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.state.global_step

    @property
    def is_finished(self) -> bool:
        """Whether no steps are left: the last one is done, or EarlyStopping has ended the run."""
        return self.state.global_step >= self.total_steps or self.is_stopped_early

    @property
    def is_stopped_early(self) -> bool:
        """Whether EarlyStopping has ended the run."""
        section = self.config.last_callback(EarlyStoppingSection)
        return section is not None and self.state.stopping.is_due(section)

    def state_record(self) -> dict[str, Any]:
        """The content of a state file."""
        metadata = dict(self.metadata)
        if (cursor := self.loader.cursor(self.state.data_position)) is not None:
            metadata[DATA_CURSOR] = cursor
        if self.evaluated is not None and self.evaluated[0] == self.state.global_step:
            metadata[EVALUATION] = finite(self.evaluated[1].as_row())
        return to_json(self.state, metadata)

    def epoch_and_step(self) -> tuple[int, int]:
        """(epoch, step inside it) of the newest optimizer step, both from 1."""
        return epoch_and_step(max(self.state.global_step, 1), self.steps_per_epoch)

    def add_pending_read(self, wait: Callable[[], None]) -> None:
        """Call `wait` once, before weights or optimizer state change next."""
        self.pending_reads.append(wait)

    def wait_for_reads(self) -> None:
        """Weights or optimizer state are about to change: wait for those who read them."""
        while self.pending_reads:
            self.pending_reads.pop()()

    def weights(self) -> dict[str, Shard]:
        """This rank's shards of the weights that are saved, by Hugging Face name."""
        tensors = self.model.parts.named_tensors()
        return self._in_files({n: tensor for n, tensor in tensors.items() if self.model.saves(n)})

    def optimizer_state(self) -> dict[str, Shard]:
        """This rank's shards of the optimizer's state, by file name."""
        state = self.optimizer.state(self.model.parts.named_parameters())
        return {
            prefix + name: shard
            for prefix, tensors in state.items()
            for name, shard in self._in_files(tensors).items()
        }

    def state_itemsize(self, weight_itemsize: int) -> int:
        """Bytes of an element of the optimizer's state, for weights with elements of so many."""
        return self.optimizer.state_itemsize(weight_itemsize)

    def state_names(self) -> dict[str, tuple[str, ...]]:
        """Every trained tensor of the full model in files, to the prefixes of its optimizer
        state."""
        shapes = self.model.layout.shapes
        return {
            in_files: prefixes
            for name, prefixes in self.optimizer.state_names.items()
            for in_files in shapes_in_files({name: shapes[name]}, self.model.mappings_of)
        }

    def shapes_in_files(self, *, optimizer: bool) -> dict[str, Shape]:
        """Every tensor of the full model that is saved, by its name in files, to its shape; with
        the state of the optimizer if `optimizer`."""
        result = shapes_in_files(self.model.saved_shapes, self.model.mappings_of)
        if optimizer:
            for name, prefixes in self.state_names().items():
                result |= {prefix + name: result[name] for prefix in prefixes}
        return result

    def replica_ranks(self) -> dict[str, Ranks]:
        """The ranks that hold the same as this one, of each tensor it saves, by file name."""
        return file_replicas(self.model.layout, self.world.rank, self.model.mappings_of)

    def _in_files(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Shard]:
        """This rank's shards of tensors of the model, as those of tensors in files."""
        held = shards(tensors, self.model.layout, self.world.rank)
        return mapped(held, self.model.mappings_of)
