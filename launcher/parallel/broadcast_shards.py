"""Broadcast of shards: one rank reads a shard and sends it to the other ranks that hold it.

Owns the transfer between replicas: point-to-point, without process groups, as there are many sets
of replica ranks and creating a group is a collective of the world. Sets are processed in the same
order on every rank, so that no two ranks wait for each other; within a set all ranks send at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from launcher.layout.replicas import Ranks
from launcher.layout.shard import Shard

LARGE_BYTES = 1 << 20
"""Tensors of at least this size are sent individually, without a buffer."""
AT_ONCE_BYTES = 256 << 20
"""Bytes that one writer rank sends at a time."""


@dataclass(frozen=True)
class _Message:
    """Tensors of one writer rank that are sent in one buffer."""

    tensors: Sequence[torch.Tensor]
    buffer: torch.Tensor

    def unpack(self) -> None:
        """Copy the received buffer into its tensors."""
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
    """Copy every shard from its writer rank to its replica ranks. A collective of all ranks."""
    sets: dict[Ranks, list[str]] = {}
    for name in sorted(held):
        if len(replica_ranks[name]) > 1 and held[name].box.numel:
            sets.setdefault(replica_ranks[name], []).append(name)
    for ranks in sorted(sets):
        for by_writer in _rounds(ranks, sets[ranks], held, writer_ranks):
            _exchange(ranks, by_writer, held)


def _rounds(
    ranks: Ranks, names: Sequence[str], held: Mapping[str, Shard], writer_ranks: Mapping[str, int]
) -> Iterator[dict[int, list[str]]]:
    """The tensors of a set by writer rank, in rounds of at most `AT_ONCE_BYTES` a writer."""
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
    me, operations, incoming = dist.get_rank(), list[dist.P2POp](), list[_Message]()
    for writer, names in by_writer.items():
        for message in _messages([held[name].tensor for name in names], filled=writer == me):
            if writer != me:
                operations.append(dist.P2POp(dist.irecv, message.buffer, writer))
                incoming.append(message)
                continue
            others = [rank for rank in ranks if rank != me]
            operations += [dist.P2POp(dist.isend, message.buffer, rank) for rank in others]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    for message in incoming:
        message.unpack()


def _messages(tensors: Sequence[torch.Tensor], *, filled: bool) -> Iterator[_Message]:
    """Large tensors each in their own memory, the others together in one buffer."""
    small = []
    for tensor in tensors:
        if _nbytes(tensor) >= LARGE_BYTES and tensor.is_contiguous():
            yield _Message([tensor], _bytes(tensor))
        else:
            small.append(tensor)
    small.sort(key=lambda tensor: -tensor.element_size())  # aligns each to its element size
    if small:
        buffer = (
            torch.cat([_bytes(tensor.contiguous()) for tensor in small]) if filled else
            torch.empty(sum(map(_nbytes, small)), dtype=torch.uint8, device=small[0].device)
        )  # fmt: skip
        yield _Message(small, buffer)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
