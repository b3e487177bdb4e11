"""Streams: from the files of a source to new files, a portion of a tensor at a time.

Owns how weights move from disk to disk. Torch-free. The source is read once, in long reads, and
checked against its checksums on the way. Each portion is sliced for every new file that gets a part
of it, hashed in file order where the file gets checksums, and written to its place. Memory: three
times `PORTION_BYTES` for each portion in flight, whatever the model. Invariant: a file has its
final size and content, and is durable, when `stream` returns. Naming is up to the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from launcher.errors import UserError
from launcher.layout.box import Box, Shape, full_box
from launcher.weights.formats.rank_metadata import BLOCK_BYTES, RankFileMetadata
from launcher.weights.formats.safetensors import ITEM_BYTES, Slot, header_bytes, in_file_order
from launcher.weights.reading.plan import plan_box
from launcher.weights.reading.transfer import Files
from launcher.weights.source import Source
from launcher.weights.streaming.audit import Audit
from launcher.weights.streaming.cast import CASTS, cast
from launcher.weights.streaming.new_files import NewFiles
from launcher.weights.streaming.portion import Portion, PortionReader, Words, slices
from launcher.weights.threads import in_parallel

WORKERS = 4
"""Portions in flight by default."""

MOST_WORKERS = 8
"""More gain nothing on one disk, and cost memory."""

PORTION_BYTES = 16 << 20

Progress = Callable[[int, int], None]
"""Called with (bytes written, total bytes)."""

Edit = Callable[[str, Box, Words, str], tuple[Words, str]]
"""(tensor of the source, box of it, bits of the box, their safetensors dtype) -> other bits of the
box and their dtype, which new files get instead. Called from several threads."""


@dataclass(frozen=True)
class Output:
    """A file to write: which box of which tensor of the source it gets, under which name."""

    path: Path
    boxes: Mapping[str, tuple[str, Box]]
    """Name in the new file to (name in the source, box of it)."""
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    rank_metadata: RankFileMetadata | None = None
    """Metadata of a rank file, without checksums, which are added."""
    dtype: str | None = None
    """Dtype that floating tensors are cast to; None: unchanged."""

    def dtype_of(self, name: str, source: Source) -> str:
        """The dtype that `name` of the new file gets."""
        origin = self.boxes[name][0]
        found, declared = source.dtype(origin), source.written.get(origin)
        wanted = (declared and declared.dtype) or self.dtype
        return wanted if wanted is not None and found in CASTS else found


def stream(
    source: Source, outputs: Sequence[Output], progress: Progress | None = None, *,
    workers: int = WORKERS, edit: Edit | None = None,
) -> int:  # fmt: skip
    """Write `outputs`, whose folders exist, from `source`. Returns the bytes of tensors written.

    `workers`: portions in flight, at most `MOST_WORKERS`. `edit`: what is written instead of what
    is read. Raises `UserError` when the source does
    not hold what an output is to get, before anything is written; when what was read does not have
    the checksums of its file; or when a file cannot be written.
    """
    writers = [_Writer(output, source) for output in outputs]
    wanted: dict[str, list[tuple[_Writer, Slot]]] = {}
    for writer in writers:
        for slot in writer.slots:
            wanted.setdefault(writer.output.boxes[slot.name][0], []).append((writer, slot))
    for origin in wanted:
        plan_box(origin, full_box(source.shape(origin)), source.tensors[origin])
    workers = min(workers, MOST_WORKERS)
    try:
        with Files() as files, NewFiles() as new_files:
            job = _Stream(source, wanted, files, new_files, progress, edit)
            job.run(sorted(wanted, key=lambda name: _order(source, name)), workers)
            in_parallel(lambda writer: writer.finish(new_files), writers, workers)
    except OSError as error:
        raise UserError(
            f"{error.filename or outputs[0].path.parent} cannot be written: {error.strerror}",
            rule="the new files must fit on the disk, in a folder that is writable",
            advice="Make room or give another folder; nothing was replaced",
        ) from error
    return job.done


def _order(source: Source, name: str) -> tuple[int, str]:
    """Sort key of tensors in new files: the order of files, widest dtype first, then by name."""
    return -ITEM_BYTES[source.dtype(name)], name


def _declared(name: str, box: Box, source: Source) -> Shape:
    """The shape of `box` of a tensor in new files."""
    declared = source.written.get(name)
    return box.size if declared is None else declared.shape


class _Writer:
    """One new file: where its tensors go, and its checksums so far."""

    def __init__(self, output: Output, source: Source) -> None:
        self.output = output
        boxes = output.boxes
        # In the order in which the source is read, which is that of the hashes.
        order = sorted(boxes, key=lambda n: (_order(source, boxes[n][0]), boxes[n][1].offset))
        self.slots = [
            Slot(n, output.dtype_of(n, source), _declared(*boxes[n], source)) for n in order
        ]
        if output.rank_metadata is None:  # not hashed: in the order that aligns what was cast too
            self.slots = in_file_order(self.slots)
        self.nbytes = sum(slot.nbytes for slot in self.slots)
        self._digests: list[str] = []
        self._hasher, self._room = xxhash.xxh3_64(), BLOCK_BYTES
        blocks = -(-self.nbytes // BLOCK_BYTES)
        self._hashed = len(self._header(["0" * 16] * blocks))
        self.places: dict[str, int] = {}
        position = self._hashed
        for slot in self.slots:
            self.places[slot.name] = position
            position += slot.nbytes

    def _header(self, digests: Sequence[str]) -> bytes:
        rank_metadata = self.output.rank_metadata
        own = {} if rank_metadata is None else {"slipway": rank_metadata.text(tuple(digests))}
        return header_bytes(self.slots, {**self.output.metadata, **own})

    def hash(self, view: memoryview, position: int) -> None:
        """Take the next bytes of the file, those from `position` on, into the checksums."""
        if self.output.rank_metadata is None:
            return
        assert position == self._hashed, "a file is hashed front to back"
        self._hashed += len(view)
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

    def finish(self, new_files: NewFiles) -> None:
        """Write the header and make the file durable."""
        if self._room < BLOCK_BYTES:
            self._end_block()
        new_files.write(self.output.path, memoryview(self._header(self._digests)), 0)
        new_files.sync(self.output.path)


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes on their way to a place in a new file."""

    writer: _Writer
    position: int
    view: memoryview


class _Stream:
    """The portions of all tensors, in order, on their way to the writers."""

    def __init__(
        self, source: Source, wanted: Mapping[str, list[tuple[_Writer, Slot]]], files: Files,
        new_files: NewFiles, progress: Progress | None, edit: Edit | None,
    ) -> None:  # fmt: skip
        self._source, self._wanted, self._new_files = source, wanted, new_files
        self._edit = edit
        self._reader = PortionReader(source, files)
        self._audit = Audit(source, self._reader.descriptor)
        self._total = sum(slot.nbytes for slots in wanted.values() for _, slot in slots)
        self._progress = progress
        self.done = 0
        self._turn = 0
        self._failed = False
        self._changed = threading.Condition()

    def run(self, order: Sequence[str], workers: int) -> None:
        """Move every portion of the tensors, in this order."""
        in_parallel(self._move, enumerate(self._portions(order)), workers)
        self._audit.finish()

    def _portions(self, order: Sequence[str]) -> Iterator[tuple[str, Box]]:
        for name in order:
            limit = max(PORTION_BYTES // ITEM_BYTES[self._source.dtype(name)], 1)
            for box in full_box(self._source.shape(name)).portions(limit):
                yield name, box

    def _move(self, task: tuple[int, tuple[str, Box]]) -> None:
        turn, (name, box) = task
        try:
            portion = self._reader.read(name, box)
            parts = self._cut(name, box, portion)
            self._in_turn(turn, portion, parts)
            for part in parts:
                self._new_files.write(part.writer.output.path, part.view, part.position)
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise
        with self._changed:
            self.done += sum(len(part.view) for part in parts)
            if self._progress is not None:
                self._progress(self.done, self._total)

    def _cut(self, name: str, box: Box, portion: Portion) -> list[_Part]:
        """What each new file gets of a portion; files that get the same share the memory."""
        parts, known = [], dict[tuple[Box, str], memoryview]()
        values, dtype = portion.values, self._source.dtype(name)
        if self._edit is not None:
            values, dtype = self._edit(name, box, values, dtype)
        for writer, slot in self._wanted[name]:
            own = writer.output.boxes[slot.name][1]
            common = box.intersect(own)
            if common is None:
                continue
            if (common, slot.dtype) not in known:
                cut = np.ascontiguousarray(values[slices(common.inside(box))])
                bits = cast(cut.reshape(-1), dtype, slot.dtype)
                known[common, slot.dtype] = bits.view(np.uint8).data
            start = _linear(common.inside(own).offset, own.size) * ITEM_BYTES[slot.dtype]
            view = known[common, slot.dtype]
            parts.append(_Part(writer, writer.places[slot.name] + start, view))
        return parts

    def _in_turn(self, turn: int, portion: Portion, parts: Sequence[_Part]) -> None:
        """Hash in the order of the portions, which is the order of every file."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == turn or self._failed)
            if self._failed:
                return
        for taken in portion.taken:
            self._audit.take(taken)
        for part in parts:
            part.writer.hash(part.view, part.position)
        with self._changed:
            self._turn += 1
            self._changed.notify_all()


def _linear(index: Shape, sizes: Shape) -> int:
    position = 0
    for i, size in zip(index, sizes, strict=True):
        position = position * size + i
    return position
