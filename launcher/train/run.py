"""A run: everything the loop and its callbacks share, with a few small views of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.checkpoint.names import SaveName
from launcher.config.schema import Config
from launcher.data.loader import Batch, Loader
from launcher.layout.box import Shape
from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh
from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard
from launcher.parallel.apply import shards
from launcher.parallel.gradients import Gradients
from launcher.parallel.parts import Parts
from launcher.parallel.world import World
from launcher.train.compute import BatchSharder, Compute
from launcher.train.interrupts import Interrupts
from launcher.train.optimizer import Optimizer
from launcher.train.scaling import LossScaling
from launcher.train.state import TrainState, epoch_and_step, to_json
from launcher.train.step import Limits
from launcher.weights.ranks.redundancy import file_replicas
from launcher.weights.tensor_mapping import MappingsOf, mapped, no_mapping, shapes_in_files


@dataclass(kw_only=True)
class TrainRun:
    """One training run in this process."""

    config: Config
    world: World
    layout: Layout
    parts: Parts
    compute: Compute
    batch_sharder: BatchSharder
    gradients: Gradients
    optimizer: Optimizer
    loader: Loader
    schedule: Callable[[int], float]
    """Learning rate of the optimizer step with this index (from 0)."""
    steps_per_epoch: int
    total_steps: int
    sink_size: int = 1
    metadata: dict[str, Any]
    """About data, order and model; written into every state file, compared by a resume."""
    write_model_files: Callable[[Path], None] = lambda directory: None
    """Puts config.json and the tokenizer into a folder, so that checkpoints explain themselves."""
    resumed_from: SaveName | None = None
    """The save this run goes on from, when it is the newest of the folder it writes to."""
    evaluation: Callable[[], Sequence[Batch]] | None = None
    """This rank's share of the evaluation data, the same number of batches on every rank."""
    max_gradient_norm: float | None = None
    balance: torch.Tensor | None = None
    """What the balance loss of one row and layer of experts weighs in the loss of the step, a
    float32 scalar on the device; None: there is none."""
    scaling: LossScaling | None = None
    """How the loss is scaled; None: not at all."""
    limits: Limits | None = None
    """From which on a step is not sound; None: there are none."""
    has_dropout: bool = False
    mappings_of: MappingsOf = no_mapping
    """What the tensors of the model are in files."""
    came_from: str = ""
    """The checkpoint it was resumed from, where that lies in the folder it writes to."""
    inputs: frozenset[Path] = frozenset()
    """Files and folders the run was started from, resolved; retention leaves them alone."""
    state: TrainState = field(default_factory=TrainState)
    is_consistent: bool = True
    """Whether weights and moments belong to one step: not in the middle of an update."""
    interrupts: Interrupts = field(default_factory=Interrupts)
    log: Callable[[str], None] = print
    report_row: Callable[[dict[str, Any]], None] = lambda row: None
    """Adds a row to `metrics.jsonl` (main process; does nothing elsewhere)."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config.seed

    @property
    def output_dir(self) -> Path:
        """Root of everything the run writes."""
        return Path(self.config.output_dir)

    @property
    def mesh(self) -> Mesh:
        """The axes of the layout."""
        return self.layout.mesh

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Trained parameters on this rank."""
        trained = self.optimizer.state_names
        return [parameter for name, parameter in self.parts.all_named() if name in trained]

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.state.global_step

    def state_record(self) -> dict[str, Any]:
        """The content of a state file."""
        return to_json(self.state, self.metadata)

    def epoch_and_step(self) -> tuple[int, int]:
        """(epoch, step inside it) of the newest optimizer step done, both from 1."""
        return epoch_and_step(max(self.state.global_step, 1), self.steps_per_epoch)

    def weights(self) -> dict[str, Shard]:
        """This rank's shards of the weights, by Hugging Face name."""
        return self._in_files(self.parts.named_tensors())

    def shapes_in_files(self, *, optimizer: bool) -> dict[str, Shape]:
        """Every tensor of the full model in files, to its shape; with the state of the optimizer if
        `optimizer`."""
        result = shapes_in_files(self.layout.shapes, self.mappings_of)
        if optimizer:
            for name, prefixes in self.state_names().items():
                result |= {prefix + name: result[name] for prefix in prefixes}
        return result

    def state_names(self) -> dict[str, tuple[str, ...]]:
        """Every trained tensor of the full model in files, to the prefixes of its optimizer
        state."""
        shapes = self.layout.shapes
        return {
            in_files: prefixes
            for name, prefixes in self.optimizer.state_names.items()
            for in_files in shapes_in_files({name: shapes[name]}, self.mappings_of)
        }

    def replica_ranks(self) -> dict[str, Ranks]:
        """The ranks that hold the same as this one, of each tensor it saves, by file name."""
        return file_replicas(self.layout, self.world.rank, self.mappings_of)

    def optimizer_state(self) -> dict[str, Shard]:
        """This rank's shards of the optimizer's state, by file name."""
        state = self.optimizer.state(self.parts.named_parameters())
        return {
            prefix + name: shard
            for prefix, tensors in state.items()
            for name, shard in self._in_files(tensors).items()
        }

    def _in_files(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Shard]:
        """This rank's shards of tensors of the model, as those of tensors in files."""
        return mapped(shards(tensors, self.layout, self.world.rank), self.mappings_of)
