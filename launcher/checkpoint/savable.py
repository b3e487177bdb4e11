"""The interface of a run, and of its steps, that CheckpointMonitor uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from launcher.checkpoint.names import SaveName
from launcher.layout.box import Shape
from launcher.layout.mesh import Mesh
from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard
from launcher.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Which files a run was started from."""

    inputs: frozenset[Path] = frozenset()
    """Files and folders, resolved; retention does not delete them."""
    came_from: str = ""
    """The save it was resumed from, where that is in the folder the run writes to."""
    resumed_from: SaveName | None = None
    """That save, when it is the newest of the folder and its counter goes on."""


class Savable(Protocol):
    """A run that can be saved, as `launcher.train.run.TrainRun`."""

    world: World
    steps_per_epoch: int
    total_steps: int
    sink_size: int
    origin: Origin

    @property
    def mesh(self) -> Mesh: ...
    @property
    def output_dir(self) -> Path: ...
    @property
    def global_step(self) -> int: ...
    @property
    def is_consistent(self) -> bool: ...
    def weights(self) -> dict[str, Shard]: ...
    def state_names(self) -> dict[str, tuple[str, ...]]: ...
    def optimizer_state(self) -> dict[str, Shard]: ...
    def state_itemsize(self, weight_itemsize: int) -> int: ...
    def replica_ranks(self) -> dict[str, Ranks]: ...
    def shapes_in_files(self, *, optimizer: bool) -> dict[str, Shape]: ...
    def state_record(self) -> dict[str, Any]: ...
    def add_pending_read(self, wait: Callable[[], None]) -> None: ...
    @property
    def write_model_files(self) -> Callable[[Path], None]: ...
    @property
    def log(self) -> Callable[[str], None]: ...


class Step(Protocol):
    """The result of a training step."""

    @property
    def embedding_norm(self) -> float | None: ...
    @property
    def changed_nothing(self) -> bool: ...
