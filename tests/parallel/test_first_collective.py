"""The first communication of each process group: a collective of all its ranks, as NCCL needs it;
and what all ranks must have in common before."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.ranks import run_ranks


def first_calls() -> tuple[dict[str, str], str]:
    """The first operation of each group on this rank, and the allocator's settings as torch reads
    them after it was imported and the job has been joined."""
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from launcher.layout.box import Box
    from launcher.layout.mesh import Mesh
    from launcher.layout.shard import Shard
    from launcher.parallel import world as worlds
    from launcher.parallel.broadcast_shards import broadcast_shards
    from launcher.parallel.kernels import set_variables
    from launcher.parallel.meshes import Meshes

    first: dict[str, str] = {}

    class First(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if op.namespace == "c10d":
                group = next(a for a in args if isinstance(a, torch.ScriptObject))
                name = dist.ProcessGroup.unbox(group).group_name
                first.setdefault(name, op._schema.name.removeprefix("c10d::").strip("_"))
            return op(*args, **(kwargs or {}))

    def exchange(group: dist.ProcessGroup) -> None:
        me = dist.get_rank(group)
        sent, received = torch.ones(1), torch.zeros(1)
        operations = [
            dist.P2POp(dist.isend, sent, group=group, group_peer=1 - me),
            dist.P2POp(dist.irecv, received, group=group, group_peer=1 - me),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        assert received.item() == 1

    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    set_variables(os.environ, deterministic="auto", expandable_segments=True)
    with First():
        world = worlds.start(force_cpu=True)
        # the default group, whose first use in a job may be a broadcast between two ranks
        box = Box((0,), (4,))
        shard = Shard((4,), box, torch.full((4,), float(world.rank)))
        broadcast_shards({"x": shard} if world.rank < 2 else {}, {"x": 0}, {"x": (0, 1)})
        assert shard.tensor[0].item() == (0 if world.rank < 2 else world.rank)
        for mesh, axis in ((Mesh(dp_shard=2, pp=2), "pp"), (Mesh(dp_shard=2, cp=2), "ring")):
            meshes = Meshes(mesh, "cpu")
            meshes.make(experts=False)
            group = meshes.context_group("ring") if axis == "ring" else meshes.group("pp")
            assert group is not None
            exchange(group)
    settings = getattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "unknown")()
    worlds.stop(world)
    return first, settings


def test_the_first_communication_of_a_group_is_a_collective() -> None:
    for first, settings in run_ranks(4, first_calls):
        assert len(first) >= 3
        assert set(first.values()) == {"allreduce"}
        # read at the first allocation: the variable may be set after torch was imported
        assert settings in ("expandable_segments:True", "unknown")


def joined(algorithms: list[str]) -> str:
    """What `join` reports where the environment of the ranks differs."""
    import torch

    from launcher.builders import start
    from launcher.config.nodes import from_plain
    from launcher.config.resolve import read_tree
    from launcher.errors import UserError

    os.environ["NCCL_ALGO"] = algorithms[int(os.environ["RANK"])]
    torch.cuda.get_device_name = lambda *_: "H200"  # type: ignore[assignment]
    on_gpu, versions = torch.device("cuda"), start.versions
    start.versions = lambda _: versions(on_gpu)
    config = read_tree(from_plain({"context": {"device_target": "CPU"}}, "x")).config
    try:
        start.join(config)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("algorithms", "differs"), [(["Ring", "Tree"], True), (["Ring"] * 2, False)]
)
def test_ranks_agree_on_what_chooses_kernels(algorithms: list[str], differs: bool) -> None:
    for text in run_ranks(2, joined, algorithms):
        assert ("NCCL_ALGO: 'Tree' on rank 1, 'Ring' on rank 0" in text) == differs
        assert bool(text) == differs
