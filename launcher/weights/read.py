"""Positioned reads from files straight into the memory of tensors.

Invariant: a byte of a file that is needed is read once, and into its final place when the dtype on
disk is the dtype in memory and the tensor is on the CPU; otherwise through one staging tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.weights.memory import TORCH_DTYPES, bytes_of
from launcher.weights.plan import Read, byte_runs

READERS = 4
"""Reads in flight; more than a few gain nothing on one disk."""


def fill(jobs: Iterable[tuple[torch.Tensor, Box, list[Read]]]) -> int:
    """Fill each tensor, which holds its box, by its reads. Returns the bytes read.

    Tensors are contiguous, of the size of their box, on any device and of any floating dtype.
    """
    jobs = [job for job in jobs if job[2]]
    with ExitStack() as stack, ThreadPoolExecutor(READERS) as pool:
        files: dict[Path, int] = {}
        for _, _, reads in jobs:
            for read in reads:
                if read.piece.file not in files:
                    files[read.piece.file] = _open(read.piece.file, stack)
        ordered = sorted(jobs, key=lambda job: (str(job[2][0].piece.file),
                                                job[2][0].piece.entry.start))  # fmt: skip
        counts = [pool.submit(_fill_one, *job, files) for job in ordered]
        return sum(count.result() for count in counts)


def _open(path: Path, stack: ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    stack.callback(os.close, descriptor)
    return descriptor


def _fill_one(tensor: torch.Tensor, box: Box, reads: list[Read], files: dict[Path, int]) -> int:
    total = 0
    for dtype in {read.piece.entry.dtype for read in reads}:
        disk_dtype = TORCH_DTYPES[dtype]
        direct = tensor.device.type == "cpu" and tensor.dtype == disk_dtype
        for read in (read for read in reads if read.piece.entry.dtype == dtype):
            if direct:
                total += _read_runs(read, box, tensor, files)
                continue
            staging = torch.empty(read.overlap.size, dtype=disk_dtype)
            total += _read_runs(read, read.overlap, staging, files)
            _region(tensor, read.overlap.inside(box)).copy_(staging)
    return total


def _read_runs(read: Read, box: Box, tensor: torch.Tensor, files: dict[Path, int]) -> int:
    memory, total = bytes_of(tensor), 0
    for position, start, length in byte_runs(read, box):
        view = memory[start : start + length]
        while view:
            count = os.preadv(files[read.piece.file], [view], position)
            if count == 0:
                raise UserError(f"{read.piece.file} ended at byte {position}",
                                rule="it was longer when its header was read")  # fmt: skip
            view, position, total = view[count:], position + count, total + count
    return total


def _region(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dim, (start, size) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
