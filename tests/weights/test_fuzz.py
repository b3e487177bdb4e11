"""20,000 files that lie, seeded: they are refused in clear words, or what they say is true.

Every test counts how many it threw and how many were refused, so that a reader that takes or
refuses everything does not pass.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.weights.formats import header_of
from launcher.weights.formats.rank_metadata import (
    BLOCK_BYTES,
    Checksums,
    RankFileMetadata,
    read_rank_metadata,
)
from launcher.weights.formats.safetensors import (
    ITEM_BYTES,
    Header,
    Slot,
    header_bytes,
    parse_header,
    read_header,
)
from launcher.weights.forms import INDEX_NAME
from launcher.weights.ranks.distributed import check_copies, open_rank_files
from launcher.weights.reading.plan import plan_box, strided_copy_of
from launcher.weights.reading.transfer import Files, read_strided
from launcher.weights.source import Source, open_complete
from tests.weights.mutations import mutate_bytes, mutate_json, mutate_tree

HEADERS, NOTES, INDEXES, FILES, FOLDERS = 11_000, 6_000, 1_500, 1_000, 500
PATH = Path("fuzz.safetensors")
Result = TypeVar("Result")


def test_the_numbers_add_up() -> None:
    assert HEADERS + NOTES + INDEXES + FILES + FOLDERS == 20_000


def reported(function: Callable[..., Result], *arguments: Any) -> Result | None:
    """The result; None when the user was told, in words that can be printed, what is wrong."""
    try:
        return function(*arguments)
    except UserError as error:
        text = str(error).encode().decode()
        assert 20 < len(text) < 6_000, text[:200]
        return None


# --- headers ----------------------------------------------------------------------------------

TENSORS = (Slot("w", "F32", (3, 2)), Slot("h", "BF16", (5,)), Slot("s", "I64", ()),
           Slot("e", "U8", (0, 4)), Slot("b", "BOOL", (2, 1, 3)))  # fmt: skip
RIGHT = header_bytes(TENSORS, {"format": "pt", "other": "text"})
DATA_BYTES = sum(slot.nbytes for slot in TENSORS)
TREE = json.loads(RIGHT[8:])


def assert_true(header: Header) -> None:
    """What was believed is so: the tensors follow each other from the first data byte to the last
    byte of the file."""
    position = header.data_start
    for entry in sorted(header.entries.values(), key=lambda entry: (entry.start, entry.stop)):
        assert all(type(n) is int and n >= 0 for n in entry.shape)
        assert entry.start == position
        position += entry.numel * ITEM_BYTES[entry.dtype]
        assert entry.stop == position
    assert position == header.file_bytes


def test_headers() -> None:
    rng = random.Random(1)
    believed = 0
    for _ in range(HEADERS):
        raw = mutate_json(rng, TREE)
        header = reported(parse_header, PATH, raw, 8 + len(raw) + DATA_BYTES)
        if header is not None:
            believed += 1
            assert_true(header)
    assert HEADERS // 50 < believed < HEADERS // 3


# --- notes ------------------------------------------------------------------------------------


def note_of(rank: int, digests: int = 1) -> str:
    """The note of one of two ranks: `w` is cut in two, the others are on both."""
    places = {slot.name: (slot.shape, full_box(slot.shape)) for slot in TENSORS}
    places["w"] = ((6, 2), Box((3 * rank, 0), (3, 2)))
    note = RankFileMetadata(2, rank, {"dp_shard": 2, "tp": 1}, places, Checksums(BLOCK_BYTES, ()))
    return note.text(("0" * 16,) * digests)


def assert_note_true(header: Header, note: RankFileMetadata) -> None:
    assert note.places.keys() == header.entries.keys()
    for name, (shape, box) in note.places.items():
        assert box.size == header.entries[name].shape
        for start, size, length in zip(box.offset, box.size, shape, strict=True):
            assert {type(start), type(size), type(length)} == {int}
            assert 0 <= start <= start + size <= length
    assert type(note.world_size) is type(note.rank) is int
    assert len(note.checksums.values) == 1


def test_notes() -> None:
    rng, tree = random.Random(2), json.loads(note_of(1))
    header = parse_header(PATH, RIGHT[8:], len(RIGHT) + DATA_BYTES)
    believed = 0
    for _ in range(NOTES):
        header.metadata["slipway"] = mutate_json(rng, tree).decode(errors="replace")
        note = reported(read_rank_metadata, PATH, header)
        if note is not None:
            believed += 1
            assert_note_true(header, note)
    assert NOTES // 50 < believed < NOTES // 2


# --- indexes ----------------------------------------------------------------------------------


def test_indexes(tmp_path) -> None:
    rng = random.Random(3)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(RIGHT + bytes(DATA_BYTES))
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(
            header_bytes([Slot(name, "F32", (2,))], {}) + bytes(8)
        )
    right = {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    names = ("../outside.safetensors", str(outside), "..", ".", "", "gone", "a\0", "n" * 300, "/")
    believed = 0
    for _ in range(INDEXES):
        tree = mutate_tree(rng, right) if rng.random() < 0.5 else right
        if rng.random() < 0.4:
            tree = {"weight_map": {"a": rng.choice(names)}}
        raw = json.dumps(tree).encode()
        (folder / INDEX_NAME).write_bytes(mutate_bytes(rng, raw) if rng.random() < 0.5 else raw)
        source = reported(open_complete, folder)
        if source is not None:
            believed += 1
            assert {path.parent for path in source.headers} <= {folder}
    assert INDEXES // 50 < believed < INDEXES // 2


# --- files ------------------------------------------------------------------------------------


def test_files_and_the_library_that_has_the_format(tmp_path) -> None:
    """What we believe the library of the format believes too, and no memory is taken for it."""
    rng, path = random.Random(4), tmp_path / "model.safetensors"
    believed = 0
    for number in range(FILES):
        raw = mutate_json(rng, TREE) if rng.random() < 0.5 else RIGHT[8:]
        content = len(raw).to_bytes(8, "little") + raw + bytes(DATA_BYTES)
        path.write_bytes(mutate_bytes(rng, content) if rng.random() < 0.7 else content)
        if number % 5 == 0:
            tracemalloc.start()
        header = reported(header_of, path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
        if header is not None:
            believed += 1
            assert_true(header)
            assert library_believes(path)
    assert FILES // 50 < believed < FILES // 2


def library_believes(path: Path) -> bool:
    """Whether the safetensors library opens the file."""
    try:
        with safe_open(path, "np") as file:
            return file.keys() is not None
    except SafetensorError:
        return False


LIES = {
    "length of the header": ((1 << 62).to_bytes(8, "little") + b"{}", {}),
    "header as long as allowed": ((100_000_000).to_bytes(8, "little") + b"{}", {}),
    "shape": (None, {"shape": [1 << 40, 1 << 20]}),
    "offsets": (None, {"data_offsets": [0, 1 << 60]}),
    "shape and offsets": (None, {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}),
}


@pytest.mark.parametrize("lie", LIES)
def test_no_memory_is_taken_on_the_word_of_a_header(tmp_path, lie: str) -> None:
    content, changes = LIES[lie]
    if content is None:
        entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
        raw = json.dumps({"w": entry}).encode()
        content = len(raw).to_bytes(8, "little") + raw + bytes(8)
    path = tmp_path / "lie.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    assert reported(read_header, path) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# --- folders of rank files --------------------------------------------------------------------


def write_rank(folder: Path, rank: int, note: bytes) -> Path:
    path = folder / f"rank_{rank}" / f"x_rank_{rank}-1_1.safetensors"
    path.parent.mkdir(exist_ok=True)
    metadata = {"slipway": note.decode(errors="replace")}
    path.write_bytes(header_bytes(TENSORS, metadata) + bytes(DATA_BYTES))
    return path


def read_all(source: Source) -> int:
    """Read every tensor of the source; bytes read."""
    done = 0
    with Files() as files:
        for name in source.tensors:
            box = full_box(source.shape(name))
            for read in plan_box(name, box, source.tensors[name]):
                assert read.nbytes <= DATA_BYTES
                memory = np.empty(2 * DATA_BYTES, np.uint8)
                path = read.piece.file
                done += read_strided(files, path, strided_copy_of(read, box), memory)
    return done


def open_and_read(folder: Path, files: list[Path]) -> int:
    source = open_rank_files(folder, files)
    check_copies(source)
    return read_all(source)


def test_folders(tmp_path) -> None:
    rng, trees = random.Random(5), [json.loads(note_of(rank)) for rank in range(2)]
    right = [write_rank(tmp_path, rank, note_of(rank).encode()) for rank in range(2)]
    assert open_and_read(tmp_path, right) == DATA_BYTES + TENSORS[0].nbytes
    opened = 0
    for _ in range(FOLDERS):
        wrong = rng.randrange(2)
        write_rank(tmp_path, 1 - wrong, note_of(1 - wrong).encode())
        write_rank(tmp_path, wrong, mutate_json(rng, trees[wrong]))
        done = reported(open_and_read, tmp_path, right)
        opened += done is not None
        assert done in (None, DATA_BYTES, DATA_BYTES + TENSORS[0].nbytes)
    assert 0 < opened < FOLDERS // 2
