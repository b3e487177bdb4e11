"""Sharing: what one rank has read goes to the others that hold the same.

Owns the way of bytes between holders. Each set of holders gets a process group of its own, made and
let go here, by its members alone; sets are gone through in the same order everywhere, so that no
two ranks wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from launcher.layout.holders import Ranks
from launcher.weights.memory import Shard

BUCKET_BYTES = 32 << 20
"""Small tensors travel together, up to so many bytes."""


def share(held: Mapping[str, Shard], keepers: Mapping[str, int], holders: Mapping[str, Ranks]) -> (
    None
):  # fmt: skip
    """Give every shard the bytes that its keeper has. Called by all ranks together."""
    sets: dict[Ranks, list[str]] = {}
    for name, shard in held.items():
        if len(holders[name]) > 1 and shard.box.numel:
            sets.setdefault(holders[name], []).append(name)
    for ranks in sorted(sets):
        group = dist.new_group(list(ranks), use_local_synchronization=True)
        for keeper, names in _by_keeper(sets[ranks], keepers).items():
            for bucket in _buckets([held[name].tensor for name in names]):
                _broadcast(bucket, keeper, group)
        dist.destroy_process_group(group)


def _by_keeper(names: Sequence[str], keepers: Mapping[str, int]) -> dict[int, list[str]]:
    grouped: dict[int, list[str]] = {}
    for name in sorted(names):
        grouped.setdefault(keepers[name], []).append(name)
    return dict(sorted(grouped.items()))


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    buckets: list[list[torch.Tensor]] = []
    room = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if not buckets or nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(tensor)
        room -= nbytes
    return buckets


def _broadcast(tensors: Sequence[torch.Tensor], keeper: int, group: dist.ProcessGroup) -> None:
    """One tensor travels as it is, several in one buffer; as bytes, whatever their dtype."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        dist.broadcast(_bytes(tensors[0]), keeper, group)
        return
    buffer = torch.cat([_bytes(tensor.contiguous()) for tensor in tensors])
    dist.broadcast(buffer, keeper, group)
    if dist.get_rank() == keeper:
        return
    position = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        part = buffer[position : position + nbytes].view(tensor.dtype)
        tensor.copy_(part.reshape(tensor.shape))
        position += nbytes


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
