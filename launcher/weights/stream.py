"""Streams: from the files of a source to new files, a portion of a tensor at a time.

Owns how weights move from disk to disk. Torch-free. The source is read once, in long reads; each
portion is cut for every new file that gets a part of it, hashed in the order of the file where it
is to have checksums, and written to its place. Memory: `WORKERS` times twice `PORTION_BYTES`,
whatever the model. Invariant: a file has its final size and content, and is durable, when `stream`
returns; names and renaming are the caller's.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from launcher.errors import UserError
from launcher.layout.box import Box, Shape, whole
from launcher.weights.formats.safetensors import ITEM_BYTES, Slot, header_bytes, in_file_order
from launcher.weights.note import BLOCK_BYTES, Note
from launcher.weights.plan import plan_box, read_runs_of
from launcher.weights.source import Source
from launcher.weights.threads import in_parallel
from launcher.weights.transfer import Bytes, Files, read_runs
from launcher.weights.write import write_all

WORKERS = 4
"""Portions in flight."""

PORTION_BYTES = 16 << 20
OPEN_FILES = 256
"""New files that are kept open at a time."""

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all)."""


@dataclass(frozen=True)
class Output:
    """A file to be: which box of which tensor of the source it gets, under which name."""

    path: Path
    boxes: Mapping[str, tuple[str, Box]]
    """Name in the new file to (name in the source, box of it)."""
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    note: Note | None = None
    """What a rank file says of itself; the checksums are added."""


def stream(source: Source, outputs: Sequence[Output], progress: Progress | None = None) -> int:
    """Write `outputs`, whose folders exist, from `source`. Returns the bytes of tensors written.

    Raises `UserError` when the source does not hold what an output is to get, before anything is
    written, or when a file cannot be written.
    """
    writers = [_Writer(output, source) for output in outputs]
    wanted: dict[str, list[tuple[_Writer, str]]] = {}
    for writer in writers:
        for name, (origin, _) in writer.output.boxes.items():
            wanted.setdefault(origin, []).append((writer, name))
    for origin in wanted:
        plan_box(origin, whole(source.shape(origin)), source.tensors[origin])
    order = in_file_order(Slot(n, source.dtype(n), source.shape(n)) for n in wanted)
    job = _Stream(source, wanted, sum(writer.nbytes for writer in writers), progress)
    descriptors = _Descriptors()
    try:
        with Files() as files:
            job.run(order, files, descriptors)
        in_parallel(lambda writer: writer.finish(descriptors), writers, WORKERS)
    except OSError as error:
        raise UserError(
            f"{error.filename or outputs[0].path.parent} cannot be written: {error.strerror}",
            rule="the new files must fit on the disk, in a folder that is writable",
            advice="Make room or give another folder; nothing was replaced",
        ) from error
    finally:
        descriptors.close()
    return job.done


class _Descriptors:
    """New files opened for writing: the ones used last stay open."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()
        self._in_use: dict[int, int] = {}

    def write(self, path: Path, view: memoryview, position: int) -> None:
        """Write `view` to the file at `path`, made if need be."""
        descriptor = self._take(path)
        try:
            write_all(descriptor, view, position)
        finally:
            self._give_back(descriptor)

    def sync(self, path: Path) -> None:
        """Make the file durable."""
        descriptor = self._take(path)
        try:
            os.fsync(descriptor)
        finally:
            self._give_back(descriptor)

    def _take(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                flags = os.O_WRONLY | os.O_CREAT
                self._open[path] = os.open(path, flags, 0o666)
                self._let_go()
            self._open.move_to_end(path)
            descriptor = self._open[path]
            self._in_use[descriptor] = self._in_use.get(descriptor, 0) + 1
            return descriptor

    def _give_back(self, descriptor: int) -> None:
        with self._lock:
            self._in_use[descriptor] -= 1

    def _let_go(self) -> None:
        for path, descriptor in list(self._open.items())[:-OPEN_FILES]:
            if not self._in_use.get(descriptor):
                os.close(self._open.pop(path))

    def close(self) -> None:
        """Close them all."""
        while self._open:
            os.close(self._open.popitem()[1])


class _Writer:
    """One new file: where its tensors go, and its checksums so far."""

    def __init__(self, output: Output, source: Source) -> None:
        self.output = output
        self.slots = in_file_order(
            Slot(name, source.dtype(origin), box.size)
            for name, (origin, box) in output.boxes.items()
        )
        self.nbytes = sum(slot.nbytes for slot in self.slots)
        self._digests: list[str] = []
        self._hasher, self._room = xxhash.xxh3_64(), BLOCK_BYTES
        blocks = -(-self.nbytes // BLOCK_BYTES)
        self.start = len(self._header(["0" * 16] * blocks))
        self.places: dict[str, int] = {}
        position = self.start
        for slot in self.slots:
            self.places[slot.name] = position
            position += slot.nbytes

    def _header(self, digests: Sequence[str]) -> bytes:
        note = self.output.note
        own = {} if note is None else {"slipway": note.text(tuple(digests))}
        return header_bytes(self.slots, {**self.output.metadata, **own})

    def hash(self, view: memoryview) -> None:
        """Take the next bytes of the data section into the checksums."""
        while view:
            taken = view[: self._room]
            self._hasher.update(taken)
            self._room -= len(taken)
            view = view[len(taken) :]
            if not self._room:
                self._end_block()

    def _end_block(self) -> None:
        self._digests.append(self._hasher.hexdigest())
        self._hasher, self._room = xxhash.xxh3_64(), BLOCK_BYTES

    def finish(self, descriptors: _Descriptors) -> None:
        """Write the header and make the file durable."""
        if self._room < BLOCK_BYTES:
            self._end_block()
        descriptors.write(self.output.path, memoryview(self._header(self._digests)), 0)
        descriptors.sync(self.output.path)


class _Stream:
    """The portions of all tensors, in order, on their way to the writers."""

    def __init__(
        self, source: Source, wanted: Mapping[str, list[tuple[_Writer, str]]], total: int,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self._source, self._wanted, self._total = source, wanted, total
        self._progress = progress
        self.done = 0
        self._turn = 0
        self._failed = False
        self._changed = threading.Condition()

    def run(self, order: Sequence[Slot], files: Files, descriptors: _Descriptors) -> None:
        def move(task: tuple[int, tuple[str, Box]]) -> None:
            try:
                self._move(task[0], *task[1], files, descriptors)
            except BaseException:
                with self._changed:
                    self._failed = True
                    self._changed.notify_all()
                raise

        for path in self._source.headers:
            files.descriptor(path, self._source.headers[path].file_bytes)
        in_parallel(move, enumerate(self._portions(order)), WORKERS)

    def _portions(self, order: Sequence[Slot]) -> Iterator[tuple[str, Box]]:
        for slot in order:
            limit = max(PORTION_BYTES // ITEM_BYTES[slot.dtype], 1)
            for box in whole(slot.shape).portions(limit):
                yield slot.name, box

    def _move(
        self, turn: int, name: str, portion: Box, files: Files, descriptors: _Descriptors
    ) -> None:
        values = self._read(name, portion, files)
        parts = []
        for writer, new_name in self._wanted[name]:
            box = writer.output.boxes[new_name][1]
            common = portion.intersect(box)
            if common is not None:
                position = writer.places[new_name] + values.itemsize * _linear(
                    common.inside(box).offset, box.size
                )
                cut = values[_slices(common.inside(portion))]
                parts.append((writer, position, _as_bytes(cut)))
        self._in_turn(turn, parts)
        for writer, position, view in parts:
            descriptors.write(writer.output.path, view, position)
        with self._changed:
            self.done += sum(len(view) for _, _, view in parts)
            if self._progress is not None:
                self._progress(self.done, self._total)

    def _read(self, name: str, portion: Box, files: Files) -> np.ndarray[tuple[int, ...], np.dtype]:
        item = ITEM_BYTES[self._source.dtype(name)]
        memory: Bytes = np.empty(portion.numel * item, np.uint8)
        for read in plan_box(name, portion, self._source.tensors[name]):
            path = read.piece.file
            read_runs(files.descriptor(path), path, read_runs_of(read, portion), memory)
        return memory.view(f"u{item}").reshape(portion.size)

    def _in_turn(self, turn: int, parts: Sequence[tuple[_Writer, int, memoryview]]) -> None:
        """Hash in the order of the portions, which is the order of every file."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == turn or self._failed)
            if self._failed:
                return
        for writer, _, view in parts:
            if writer.output.note is not None:
                writer.hash(view)
        with self._changed:
            self._turn += 1
            self._changed.notify_all()


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + n) for start, n in zip(box.offset, box.size, strict=True))


def _as_bytes(values: np.ndarray[tuple[int, ...], np.dtype]) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _linear(index: Shape, sizes: Shape) -> int:
    position = 0
    for i, size in zip(index, sizes, strict=True):
        position = position * size + i
    return position
