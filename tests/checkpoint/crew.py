"""Ranks as threads of one process, for saves of several ranks without starting processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from launcher.checkpoint.names import SaveName
from launcher.checkpoint.store import Store
from launcher.layout.mesh import Mesh
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import inventory_of
from tests.tools.checkpoints import held

ALONE = World(0, 1, torch.device("cpu"))
STATE = {"global_step": 20, "consumed_samples": 160, "loss_scale": 65536.0, "seed": 7}


class Crewmate(World):
    """A rank whose collectives exchange values through `table` instead of torch.distributed."""

    table: list[Any]
    meeting: threading.Barrier

    def with_long_timeout(self) -> World:
        """These ranks have one timeout."""
        return self

    def barrier(self) -> None:
        """Wait for all threads."""
        self.meeting.wait(600)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every thread, in rank order."""
        self.table[self.rank] = value
        self.barrier()
        values = list(self.table)
        self.barrier()  # nobody overwrites the table before all have read it
        return values

    def from_main(self, value: Any) -> Any:
        """The value of rank 0."""
        return self.gather(value)[0]


def together(size: int, work: Callable[[World], Any]) -> list[Any]:
    """The results of `work` on `size` ranks at once, in rank order."""
    table, meeting = [None] * size, threading.Barrier(size)
    crew = []
    for rank in range(size):
        mate = Crewmate(rank, size, torch.device("cpu"))
        object.__setattr__(mate, "table", table)
        object.__setattr__(mate, "meeting", meeting)
        crew.append(mate)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, crew))


def save(
    root: Path, step: int, named: dict[str, torch.Tensor], mesh: Mesh, *, counter: int = 0,
    state: dict[str, Any] = STATE,
) -> SaveName:  # fmt: skip
    """One published save of `named` by the ranks of `mesh`."""
    name = SaveName("CKP", counter, 1, step)
    inventory = inventory_of({key: tuple(tensor.shape) for key, tensor in named.items()})
    store = Store(root, "CKP", counter, 5, inventory=inventory)

    def work(world: World) -> None:
        shards = held(named, mesh, world.rank)
        store.save(name, shards, {**state, "global_step": step}, mesh=mesh, world=world)

    together(mesh.world_size, work)
    return name
