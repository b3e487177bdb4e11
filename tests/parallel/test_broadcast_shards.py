"""A shard reaches every replica rank from its writer rank, for any sets, sizes and dtypes."""

from __future__ import annotations

import torch

from launcher.layout.box import full_box
from launcher.layout.replicas import writer_ranks
from launcher.layout.shard import Shard
from launcher.parallel import broadcast_shards as sharing
from launcher.parallel import world as worlds
from tests.ranks import run_ranks

SETS = {
    "all": (0, 1, 2, 3), "left": (0, 1), "right": (2, 3), "even": (0, 2), "alone": (1,),
    "last": (1, 2, 3),
}  # fmt: skip
"""Sets of replica ranks; ranks are in different numbers of them, in different orders."""
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)


def values(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name) + size)
    return torch.randint(2, (size,), generator=generator).to(torch.uint8).to(dtype)


def exchange() -> int:
    world = worlds.start(force_cpu=True)
    rank = world.rank
    sharing.LARGE_BYTES, sharing.AT_ONCE_BYTES = 256, 2048
    checked = 0
    for _ in range(2):
        held, replica_ranks, expected = {}, {}, {}
        for key, ranks in SETS.items():
            for size in (1, 7, 100, 3000):
                for dtype in DTYPES:
                    name = f"{key} {size} {dtype}"
                    if rank in ranks:
                        replica_ranks[name], expected[name] = ranks, values(name, size, dtype)
        sizes = {name: tensor.nbytes for name, tensor in expected.items()}
        keeper = writer_ranks(sizes, replica_ranks)
        for name, tensor in expected.items():
            read = tensor.clone() if keeper[name] == rank else torch.zeros_like(tensor)
            held[name] = Shard(tuple(tensor.shape), full_box(tensor.shape), read)
        sharing.broadcast_shards(held, keeper, replica_ranks)
        for name, tensor in expected.items():
            found = held[name].tensor
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
            checked += 1
    worlds.stop()
    return checked


def test_every_replica_gets_the_shard_of_its_writer() -> None:
    checked = run_ranks(4, exchange)
    assert checked == [
        2 * 4 * len(DTYPES) * sum(rank in ranks for ranks in SETS.values()) for rank in range(4)
    ]
