"""Reads into the memory of tensors.

Owns what happens between file and tensor. Invariants: a byte is read once; it is read directly into
its final place when dtypes agree and the tensor is on the CPU, and otherwise through a staging
buffer of each reader: `READERS` times `PORTION_BYTES` (pinned for a GPU, where copies overlap with
the other readers), and as much again while FP8 weights are multiplied by their scales.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from launcher.layout.box import Box
from launcher.weights.mxfp4 import scales_for, tensor_of
from launcher.weights.pieces import Pieces
from launcher.weights.reading.plan import Read, plan_box, portions, strided_copy_of
from launcher.weights.reading.tensor_bytes import TORCH_DTYPES, Storages, address_of
from launcher.weights.reading.transfer import Bytes, Files, Transfer, read_all, read_strided
from launcher.weights.reading.unpack import unpack
from launcher.weights.scales import Scales
from launcher.weights.source import Source
from launcher.weights.threads import in_parallel

READERS = max(2, min(4, os.cpu_count() or 2))
"""Reads in flight: one for each core, as copying takes most of the time; more than a few gain
nothing on one disk."""

PORTION_BYTES = 16 << 20
"""Bytes of one read."""

SCALED_BYTES = 512 << 10
"""Bytes of one read of FP8 weights: in float32, with their scales, they are eight times as large,
and multiplying is faster inside the cache."""


class Exponents(NamedTuple):
    """The exponents of weights in 4 bits."""

    name: str
    pieces: Pieces


class Fill(NamedTuple):
    """A tensor, its box of the global tensor, and the reads that fill it.

    The tensor has the size of the box, on any device, in any dtype that the files can be cast to.
    """

    tensor: torch.Tensor
    box: Box
    reads: list[Read]
    scales: Scales | None = None
    exponents: Exponents | None = None
    """Of MXFP4 weights, whose reads are of blocks (`launcher.weights.mxfp4`)."""


def fill(fills: Iterable[Fill], source: Source) -> int:
    """Fill each tensor by its reads. Returns the bytes read."""
    tasks = [
        (job, read)
        for job in fills
        for read in portions(
            job.reads, SCALED_BYTES if job.scales or job.exponents else PORTION_BYTES
        )
    ]
    order = {path: number for number, path in enumerate(sorted(source.headers))}
    tasks.sort(key=lambda task: (order[task[1].piece.file], task[1].piece.entry.start,
                                 task[1].overlap.offset))  # fmt: skip
    with Files() as files:
        scales = [job.scales or job.exponents for job, _ in tasks]
        factors = {piece.file for scale in scales if scale for piece in scale.pieces}
        for path in {read.piece.file for _, read in tasks} | factors:
            header = source.headers[path]
            files.descriptor(path, header.file_bytes, header.modified)
        reader = _Reader(files, Storages(job.tensor for job, _ in tasks))
        return sum(in_parallel(reader.read, _batches(tasks), READERS))


Task = tuple[Fill, Read]


def _batches(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks in order, in batches of about `PORTION_BYTES`."""
    batches, room = list[list[Task]](), 0
    for task in tasks:
        if not batches or task[1].nbytes > room:
            batches.append([])
            room = PORTION_BYTES
        batches[-1].append(task)
        room -= task[1].nbytes
    return batches


class _Reader:
    """Reads portions; each thread has a staging buffer of its own."""

    def __init__(self, files: Files, storages: Storages) -> None:
        self._files = files
        self._storages = storages
        self._own = threading.local()

    def read(self, tasks: Sequence[Task]) -> int:
        """Read a batch of portions. Returns the bytes read."""
        straight, done = list[Transfer](), 0
        for job, read in tasks:
            transfer = self._straight(job, read)
            if transfer is None:
                done += self._read_through_staging(job, read)
            else:
                straight.append(transfer)
        return done + read_all(self._files, straight)

    def _straight(self, job: Fill, read: Read) -> Transfer | None:
        """The transfer from file to tensor memory; None where bytes change on the way."""
        if job.tensor.device.type != "cpu" or job.exponents is not None:
            return None
        memory = self._storages.under(job.tensor)
        if job.scales is not None or job.tensor.dtype != TORCH_DTYPES[read.piece.entry.dtype]:
            return None
        strided_copy = strided_copy_of(read, job.box, address_of(job.tensor))
        return Transfer(read.piece.file, strided_copy, memory)

    def _read_through_staging(self, job: Fill, read: Read) -> int:
        disk_dtype = TORCH_DTYPES[read.piece.entry.dtype]
        staging = self._staging(read.nbytes, pinned=job.tensor.device.type == "cuda")
        done = self._read(read, staging)
        values = torch.from_numpy(staging).view(disk_dtype).reshape(read.overlap.size)
        if job.scales is not None:
            factors, more = self._factors(job.scales, read.overlap)
            values, done = values.float().mul_(factors), done + more
        box = read.overlap
        if job.exponents is not None:
            exponents, more = self._exponents(job.exponents, scales_for(read.overlap))
            box, done = tensor_of(read.overlap), done + more
            common = box.intersect(job.box)
            assert common is not None
            unpacked = unpack(values, exponents).transpose(1, 2)
            box, values = common, _region(unpacked, common.inside(box))
        region = _region(job.tensor, box.inside(job.box))
        if region.device.type != "cuda":
            region.copy_(values)
            return done
        with torch.cuda.stream(self._stream(region.device)) as _:
            region.copy_(values.to(region.device, non_blocking=True))
            torch.cuda.current_stream().synchronize()
        return done

    def _read(self, read: Read, memory: Bytes) -> int:
        path = read.piece.file
        return read_strided(self._files, path, strided_copy_of(read, read.overlap), memory)

    def _staging(self, nbytes: int, *, pinned: bool) -> Bytes:
        size = max(nbytes, PORTION_BYTES)
        kept: torch.Tensor | None = getattr(self._own, "staging", None)
        if kept is None or kept.numel() < size or kept.is_pinned() != pinned:
            kept = self._own.staging = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return kept.numpy()[:nbytes]

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._own, "stream", None)
        if stream is None:
            stream = self._own.stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.default_stream(device))  # pending writes to the memory
        return stream

    def _exponents(self, exponents: Exponents, box: Box) -> tuple[torch.Tensor, int]:
        """The exponents of `box`, as they are in the files, and the bytes read for them."""
        values, done = torch.empty(box.size, dtype=torch.uint8), 0
        for read in plan_box(exponents.name, box, exponents.pieces):
            staging = np.empty(read.nbytes, np.uint8)
            done += self._read(read, staging)
            part = torch.from_numpy(staging).reshape(read.overlap.size)
            _region(values, read.overlap.inside(box)).copy_(part)
        return values, done

    def _factors(self, scales: Scales, box: Box) -> tuple[torch.Tensor, int]:
        """(scale of each element of `box`, float32; bytes read for them)."""
        needed = scales.needed(box)
        factors, done = torch.empty(needed.size), 0
        for read in plan_box(scales.name, needed, scales.pieces):
            staging = np.empty(read.nbytes, np.uint8)
            done += self._read(read, staging)
            dtype = TORCH_DTYPES[read.piece.entry.dtype]
            values = torch.from_numpy(staging).view(dtype).reshape(read.overlap.size)
            _region(factors, read.overlap.inside(needed)).copy_(values)
        for dim, n in enumerate(scales.block):
            start = box.offset[dim] - needed.offset[dim] * n
            factors = factors.repeat_interleave(n, dim).narrow(dim, start, box.size[dim])
        return factors, done


def _region(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
