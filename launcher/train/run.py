"""A run: everything the loop and its callbacks share, with a few small views of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.checkpoint.names import SaveName
from launcher.config.schema import Config
from launcher.data.loader import Batch, Loader
from launcher.layout.mesh import Mesh
from launcher.parallel.apply import shards
from launcher.parallel.world import World
from launcher.train.interrupts import Interrupts
from launcher.train.optimizer import moments
from launcher.train.state import TrainState, epoch_and_step, to_json
from launcher.weights.memory import Shard


@dataclass(kw_only=True)
class TrainRun:
    """One training run in this process."""

    config: Config
    world: World
    mesh: Mesh
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    schedule: Callable[[int], float]
    """Learning rate of the optimizer step with this index (from 0)."""
    steps_per_epoch: int
    total_steps: int
    sink_size: int = 1
    facts: dict[str, Any]
    """About data, order and model; written into every state file, compared by a resume."""
    write_model_files: Callable[[Path], None] = lambda directory: None
    """Puts config.json and the tokenizer into a folder, so that checkpoints explain themselves."""
    resumed_from: SaveName | None = None
    """The save this run goes on from, when it is the newest of the folder it writes to."""
    evaluation: Callable[[], Sequence[Batch]] | None = None
    """This rank's share of the evaluation data, the same number of batches on every rank."""
    shard_group: dist.ProcessGroup | None = None
    max_gradient_norm: float | None = None
    has_dropout: bool = False
    own_kernels: bool = True
    """The model is ours, whose backward pass has a repeatable kernel for everything."""
    inputs: frozenset[Path] = frozenset()
    """Files the run was started from; retention leaves them alone."""
    state: TrainState = field(default_factory=TrainState)
    interrupts: Interrupts = field(default_factory=Interrupts)
    say: Callable[[str], None] = print
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

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self.state.global_step

    def state_record(self) -> dict[str, Any]:
        """The content of a state file."""
        return to_json(self.state, self.facts)

    def epoch_and_step(self) -> tuple[int, int]:
        """(epoch, step inside it) of the newest optimizer step done, both from 1."""
        return epoch_and_step(max(self.state.global_step, 1), self.steps_per_epoch)

    def weights(self) -> dict[str, Shard]:
        """This rank's shards of the weights, by Hugging Face name."""
        return shards(model_tensors(self.model), self.mesh, self.world.rank)

    def optimizer_state(self) -> dict[str, Shard]:
        """This rank's shards of the optimizer's moments, by file name."""
        return shards(moments(self.model, self.optimizer), self.mesh, self.world.rank)


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, a tied tensor once, under its first name."""
    seen: set[int] = set()
    result = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            result[name] = tensor
    return result
