"""Sharing: what one rank has read goes to the others that hold the same.

Owns the way of bytes between holders: from rank to rank, without process groups, for the sets of
holders are many and a group would have to be made by the whole world. Sets are gone through in the
same order everywhere, so that no two ranks wait for each other; within a set all send at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard

LARGE_BYTES = 1 << 20
"""Tensors of at least so many bytes travel by themselves, straight from memory to memory."""
AT_ONCE_BYTES = 256 << 20
"""Bytes of a keeper that are on their way together."""


@dataclass(frozen=True)
class _Parcel:
    """Tensors of one keeper that travel in one buffer."""

    tensors: Sequence[torch.Tensor]
    buffer: torch.Tensor

    def unpack(self) -> None:
        """Put what arrived where it belongs."""
        position = 0
        for tensor in self.tensors:
            nbytes = _nbytes(tensor)
            part = self.buffer[position : position + nbytes]
            if part.data_ptr() != tensor.data_ptr():
                tensor.copy_(part.view(tensor.dtype).reshape(tensor.shape))
            position += nbytes


def broadcast_shards(
    held: Mapping[str, Shard], writer_ranks: Mapping[str, int], replica_ranks: Mapping[str, Ranks]
) -> None:
    """Give every shard the bytes that its keeper has. Called by all ranks together."""
    sets: dict[Ranks, list[str]] = {}
    for name in sorted(held):
        if len(replica_ranks[name]) > 1 and held[name].box.numel:
            sets.setdefault(replica_ranks[name], []).append(name)
    for ranks in sorted(sets):
        for together in _rounds(ranks, sets[ranks], held, writer_ranks):
            _exchange(ranks, together, held)


def _rounds(
    ranks: Ranks, names: Sequence[str], held: Mapping[str, Shard], writer_ranks: Mapping[str, int]
) -> Iterator[dict[int, list[str]]]:
    """The tensors of a set by keeper, so many at a time that no keeper sends too much at once."""
    waiting = {rank: [name for name in names if writer_ranks[name] == rank] for rank in ranks}
    while any(waiting.values()):
        taken: dict[int, list[str]] = {}
        for rank, left in waiting.items():
            room = AT_ONCE_BYTES
            while left and (room == AT_ONCE_BYTES or _nbytes(held[left[0]].tensor) <= room):
                room -= _nbytes(held[left[0]].tensor)
                taken.setdefault(rank, []).append(left.pop(0))
        yield taken


def _exchange(
    ranks: Ranks, by_writer: Mapping[int, Sequence[str]], held: Mapping[str, Shard]
) -> None:
    me, operations, arriving = dist.get_rank(), list[dist.P2POp](), list[_Parcel]()
    for writer, names in by_writer.items():
        for parcel in _parcels([held[name].tensor for name in names], filled=writer == me):
            if writer != me:
                operations.append(dist.P2POp(dist.irecv, parcel.buffer, writer))
                arriving.append(parcel)
                continue
            others = [rank for rank in ranks if rank != me]
            operations += [dist.P2POp(dist.isend, parcel.buffer, rank) for rank in others]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for parcel in arriving:
        parcel.unpack()


def _parcels(tensors: Sequence[torch.Tensor], *, filled: bool) -> Iterator[_Parcel]:
    """Large tensors each in their own memory, the others together in a buffer."""
    small = []
    for tensor in tensors:
        if _nbytes(tensor) >= LARGE_BYTES and tensor.is_contiguous():
            yield _Parcel([tensor], _bytes(tensor))
        else:
            small.append(tensor)
    small.sort(key=lambda tensor: -tensor.element_size())  # each is aligned to its elements
    if small:
        buffer = (
            torch.cat([_bytes(tensor.contiguous()) for tensor in small]) if filled else
            torch.empty(sum(map(_nbytes, small)), dtype=torch.uint8, device=small[0].device)
        )  # fmt: skip
        yield _Parcel(small, buffer)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
