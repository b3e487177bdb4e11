"""Reads into the memory of tensors.

Owns what happens between file and tensor. Invariants: a byte is read once; it is read directly into
its final place when dtypes agree and the tensor is on the CPU, and otherwise through a staging
buffer of each reader: `READERS` times `PORTION_BYTES`, and as much again while FP8 weights are
multiplied by their scales. For a GPU each reader has two, pinned, so that one is copied while the
other is filled. Bytes are sent as they are in the files: casting, scaling and unpacking happen
where the tensor is, with the same operations on every device. They are exact or round once, in IEEE
arithmetic, so the results are the same to the bit but for the payload of a NaN.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch

from launcher.layout.box import Box
from launcher.streams import Uploads, streams_for
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

DEVICE_SCALED_BYTES = 4 << 20
"""The same for a tensor on a device, where every portion is a few kernels. MXFP4 takes most memory
there: about 30 times as much for each reader while it is unpacked."""


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
    tasks = [(job, read) for job in fills for read in portions(job.reads, _portion_bytes(job))]
    order = {path: number for number, path in enumerate(sorted(source.headers))}
    tasks.sort(key=lambda task: (order[task[1].piece.file], task[1].piece.entry.start,
                                 task[1].overlap.offset))  # fmt: skip
    devices = {job.tensor.device for job, _ in tasks}
    with ExitStack() as stack:
        files = stack.enter_context(Files())
        uploads = {d: stack.enter_context(Uploads(streams_for(d), READERS)) for d in devices}
        scales = [job.scales or job.exponents for job, _ in tasks]
        factors = {piece.file for scale in scales if scale for piece in scale.pieces}
        for path in {read.piece.file for _, read in tasks} | factors:
            header = source.headers[path]
            files.descriptor(path, header.file_bytes, header.modified)
        reader = _Reader(files, Storages(job.tensor for job, _ in tasks), uploads)
        return sum(in_parallel(reader.read, _batches(tasks), READERS))


def _portion_bytes(job: Fill) -> int:
    if job.scales is None and job.exponents is None:
        return PORTION_BYTES
    return DEVICE_SCALED_BYTES if streams_for(job.tensor.device).is_device else SCALED_BYTES


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
    """Reads portions, from several threads."""

    def __init__(
        self, files: Files, storages: Storages, uploads: Mapping[torch.device, Uploads]
    ) -> None:
        self._files = files
        self._storages = storages
        self._uploads = uploads

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
        if self._uploads[job.tensor.device].streams.is_device or job.exponents is not None:
            return None
        memory = self._storages.under(job.tensor)
        if job.scales is not None or job.tensor.dtype != TORCH_DTYPES[read.piece.entry.dtype]:
            return None
        strided_copy = strided_copy_of(read, job.box, address_of(job.tensor))
        return Transfer(read.piece.file, strided_copy, memory)

    def _read_through_staging(self, job: Fill, read: Read) -> int:
        with self._uploads[job.tensor.device].one() as upload:
            memory = upload.buffer(read.nbytes, PORTION_BYTES)
            done, scales = self._read(read, memory.numpy()), None
            if job.scales is not None:
                scales, more = self._factors(job.scales, read.overlap)
                done += more
            elif job.exponents is not None:
                scales, more = self._exponents(job.exponents, scales_for(read.overlap))
                done += more
            stored = memory.view(TORCH_DTYPES[read.piece.entry.dtype]).reshape(read.overlap.size)
            with torch.no_grad(), upload.sending():
                _place(job, read.overlap, stored, scales)
        return done

    def _read(self, read: Read, memory: Bytes) -> int:
        path = read.piece.file
        return read_strided(self._files, path, strided_copy_of(read, read.overlap), memory)

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
        """(scales of the blocks that `box` overlaps, float32; bytes read for them)."""
        needed = scales.needed(box)
        factors, done = torch.empty(needed.size), 0
        for read in plan_box(scales.name, needed, scales.pieces):
            staging = np.empty(read.nbytes, np.uint8)
            done += self._read(read, staging)
            dtype = TORCH_DTYPES[read.piece.entry.dtype]
            values = torch.from_numpy(staging).view(dtype).reshape(read.overlap.size)
            _region(factors, read.overlap.inside(needed)).copy_(values)
        return factors, done


def _place(job: Fill, box: Box, stored: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Write what a read has found into the tensor. `stored`: `box` of what is in the files, in
    pinned memory for a device; `scales`: those of its blocks, or its exponents.

    Nothing here waits for the device.
    """
    device = job.tensor.device
    values = stored.to(device, non_blocking=True)
    if scales is not None:
        scales = scales.to(device, non_blocking=True)
    if job.scales is not None and scales is not None:
        values = values.float().mul_(_by_element(scales, job.scales, box))
    elif job.exponents is not None and scales is not None:
        unpacked, unpacked_box = unpack(values, scales).transpose(1, 2), tensor_of(box)
        common = unpacked_box.intersect(job.box)
        assert common is not None
        box, values = common, _region(unpacked, common.inside(unpacked_box))
    _region(job.tensor, box.inside(job.box)).copy_(values)


def _by_element(factors: torch.Tensor, scales: Scales, box: Box) -> torch.Tensor:
    """The scale of each element of `box`, from those of the blocks that it overlaps."""
    first = scales.needed(box).offset
    for dim, n in enumerate(scales.block):
        start = box.offset[dim] - first[dim] * n
        factors = factors.repeat_interleave(n, dim).narrow(dim, start, box.size[dim])
    return factors


def _region(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
