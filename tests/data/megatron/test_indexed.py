"""Files are read as Megatron reads them, written as it writes them, and refused when damaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.data.megatron.header import HEADER, index_path, read_header, tokens_path
from launcher.data.megatron.indexed import open_indexed
from launcher.data.megatron.writer import IndexedWriter, token_dtype
from launcher.errors import UserError
from tests.data.megatron.cases import CORPORA, GOLDEN

DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")


def copied(folder: Path, name: str = "a_int32", to: str = "a") -> Path:
    for ending in (".bin", ".idx"):
        shutil.copy(GOLDEN / f"{name}{ending}", folder / f"{to}{ending}")
        (folder / f"{to}{ending}").chmod(0o644)
    return folder / to


@pytest.mark.parametrize("name", CORPORA)
def test_goldens_are_read(name: str) -> None:
    expected, data = json.loads((GOLDEN / f"{name}.json").read_text()), open_indexed(GOLDEN / name)
    assert data.header.dtype == data.tokens.dtype.name == expected["dtype"]
    assert data.lengths.tolist() == expected["sequence_lengths"]
    assert data.borders.tolist() == expected["document_indices"]
    assert (None if data.modes is None else data.modes.tolist()) == expected["sequence_modes"]
    assert [data.sequence(i).tolist() for i in range(len(data))] == expected["sequences"]
    joined = [token for i in range(data.documents) for token in data.document(i).tolist()]
    assert joined == [token for sequence in expected["sequences"] for token in sequence]


@pytest.mark.parametrize("name", CORPORA)
def test_goldens_are_written_byte_by_byte(name: str, tmp_path: Path) -> None:
    expected, data = json.loads((GOLDEN / f"{name}.json").read_text()), open_indexed(GOLDEN / name)
    modes = expected["sequence_modes"]
    with IndexedWriter(tmp_path / "x", dtype=expected["dtype"], modes=modes is not None) as writer:
        for first, stop in zip(data.borders[:-1], data.borders[1:], strict=True):
            for i in range(first, stop):
                writer.add_sequence(expected["sequences"][i], mode=modes[i] if modes else 0)
            writer.end_document()
        writer.finish()
    for ending in (".bin", ".idx"):
        written, golden = tmp_path / f"x{ending}", GOLDEN / f"{name}{ending}"
        assert written.read_bytes() == golden.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.bin", "x.idx"]


DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 100), max_size=6), max_size=3), max_size=12)


@given(documents=DOCUMENTS, dtype=st.sampled_from(DTYPES), modes=st.booleans(), cut=st.integers(0))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(
    documents: list[list[list[int]]], dtype: str, modes: bool, cut: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    cut %= len(documents) + 1
    names = [tmp_path / name for name in ("first", "second", "joined", "at_once")]
    parts = [documents[:cut], documents[cut:], None, documents]
    for name, part in zip(names, parts, strict=True):
        with IndexedWriter(name, dtype=dtype, modes=modes) as writer:
            if part is None:
                writer.append_dataset(names[0])
                writer.append_dataset(names[1])
            for document in part or ():
                writer.add_document(*document)
            writer.finish()
    data = open_indexed(names[3])
    found = [
        [data.sequence(i).tolist() for i in range(first, stop)]
        for first, stop in zip(data.borders[:-1], data.borders[1:], strict=True)
    ]
    assert found == documents
    assert (data.modes is not None) == (modes and len(data) > 0)
    for ending in (".bin", ".idx"):
        joined, whole = names[2].with_suffix(ending), names[3].with_suffix(ending)
        assert joined.read_bytes() == whole.read_bytes()


def test_the_type_of_tokens_is_that_of_megatron() -> None:
    sizes = (None, 100, 65499, 65500, 151936)
    found = [token_dtype(size).name for size in sizes]
    assert found == ["int32", "uint16", "uint16", "int32", "int32"]


def test_a_writer_that_fails_leaves_the_older_files(tmp_path: Path) -> None:
    prefix = copied(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def write() -> None:
        with IndexedWriter(prefix, dtype="uint8") as writer:
            writer.add_document([1, 2])
            writer.add_document([3, 256])

    with pytest.raises(UserError, match="document 1 has token 256") as caught:
        write()
    assert caught.value.problems[0].where == str(tokens_path(prefix))
    with IndexedWriter(prefix, dtype="int32") as writer:
        writer.add_sequence([1])
        with pytest.raises(ValueError, match="not ended"):
            writer.finish()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


Edit = Callable[[Path], Any]


def _index(change: Callable[[bytearray], Any]) -> Edit:
    def edit(prefix: Path) -> None:
        content = bytearray(index_path(prefix).read_bytes())
        changed = change(content)
        index_path(prefix).write_bytes(content if changed is None else changed)

    return edit


def _set(at: int, form: str, value: int) -> Edit:
    return _index(lambda content: struct.pack_into(form, content, at, value))


SEQUENCES = 23
LENGTHS, OFFSETS = HEADER.size, HEADER.size + 4 * SEQUENCES
BORDERS = HEADER.size + 12 * SEQUENCES
DAMAGE: dict[str, tuple[Edit, str, int | None, str]] = {
    # name: (edit, file, byte, part of the message)
    "bad_magic": (_set(0, "<B", 0), ".idx", 0, "begins with"),
    "version_2": (_set(9, "<Q", 2), ".idx", 9, "version 2"),
    "dtype_code_0": (_set(17, "<B", 0), ".idx", 17, "type of tokens 0"),
    "dtype_code_9": (_set(17, "<B", 9), ".idx", 17, "type of tokens 9"),
    "idx_cut_in_header": (_index(lambda content: content[:20]), ".idx", 20, "20 bytes"),
    "idx_cut_in_lengths": (_index(lambda content: content[:60]), ".idx", 60, "60 bytes"),
    "idx_cut_last_byte": (_index(lambda content: content[:-1]), ".idx", 501, "501 bytes"),
    "idx_extra_bytes": (_index(lambda content: content + bytes(5)), ".idx", 502, "507 bytes"),
    "bin_cut": (
        lambda prefix: tokens_path(prefix).write_bytes(tokens_path(prefix).read_bytes()[:-4]),
        ".bin", 1900, "it has 1904",
    ),
    "bin_empty": (lambda prefix: tokens_path(prefix).write_bytes(b""), ".bin", 0, "no tokens"),
    "sequence_count_too_big": (_set(18, "<Q", 10**6), ".idx", 502, "1000000 sequences"),
    "missing_bin": (lambda prefix: tokens_path(prefix).unlink(), ".bin", None, "no such file"),
    "missing_idx": (lambda prefix: index_path(prefix).unlink(), ".idx", None, "no such file"),
    "huge_count": (_set(18, "<Q", 2**63), ".idx", 502, "bytes"),
    "no_borders": (_set(26, "<Q", 0), ".idx", 26, "0 document borders"),
    "negative_length": (_set(LENGTHS + 4, "<i", -3), ".idx", LENGTHS + 4, "-3 tokens"),
    "negative_offset": (_set(OFFSETS + 16, "<q", -8), ".idx", OFFSETS + 16, "byte -8"),
    "odd_offset": (_set(OFFSETS + 8, "<q", 2), ".idx", OFFSETS + 8, "byte 2"),
    "far_offset": (_set(OFFSETS + 8, "<q", 2**62), ".idx", OFFSETS + 8, "1904 bytes"),
    "first_border": (_set(BORDERS, "<q", 1), ".idx", BORDERS, "document border 1"),
    "last_border": (_set(BORDERS + 8 * 23, "<q", 22), ".idx", BORDERS + 8 * 23, "border 22"),
    "falling_border": (_set(BORDERS + 8 * 3, "<q", 9), ".idx", BORDERS + 8 * 4, "4 after 9"),
    "floats": (_set(17, "<B", 7), ".idx", 17, "float32"),
    "odd_bin": (
        lambda prefix: tokens_path(prefix).write_bytes(tokens_path(prefix).read_bytes()[:-1]),
        ".bin", 1900, "1903 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_an_error_with_file_and_byte(name: str, tmp_path: Path) -> None:
    edit, ending, byte, part = DAMAGE[name]
    prefix = copied(tmp_path)
    edit(prefix)
    with pytest.raises(UserError) as caught:
        open_indexed(prefix)
    problem = caught.value.problems[0]
    assert problem.where == f"{prefix}{ending}"
    assert part in f"{problem.what}; {problem.rule}"
    if byte is not None:
        assert problem.what.startswith(f"byte {byte}:")


def test_every_damaged_golden_is_refused() -> None:
    """Megatron itself accepts surplus bytes; here they may be modes and are counted."""
    assert set(json.loads((GOLDEN / "damaged_what_megatron_says.json").read_text())) <= set(DAMAGE)


@given(data=st.data())
@settings(max_examples=300, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_no_header_does_more_than_an_error(data: st.DataObject, tmp_path: Path) -> None:
    """Any bytes in the index are an error that names the file, or a dataset that can be read."""
    source = GOLDEN / f"{data.draw(st.sampled_from(('a_int32', 'g_multiseq', 'h_modes')))}.idx"
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        else:
            at = data.draw(st.sampled_from((9, 18, 26, *range(34, len(content) - 8, 8))))
            value = data.draw(st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1)))
            struct.pack_into("<Q", content, at, value)
    del content[data.draw(st.integers(max(0, len(content) - 9), len(content))) :]
    (tmp_path / "x.idx").write_bytes(content)
    shutil.copyfile(source.with_suffix(".bin"), tmp_path / "x.bin")
    try:
        found = open_indexed(tmp_path / "x")
    except UserError as error:
        _names_a_file_of(tmp_path / "x", error)
        return
    assert [len(found.sequence(i)) for i in range(len(found))] == found.lengths.tolist()
    assert sum(len(found.document(i)) for i in range(found.documents)) == found.lengths.sum()


def _names_a_file_of(prefix: Path, error: UserError) -> None:
    assert error.problems[0].where in (f"{prefix}.idx", f"{prefix}.bin")


@pytest.mark.parametrize(
    ("written", "nearest"),
    [("a_int23", "a_int32"), ("a_int32.bin", None), ("a_int", "a_int32"), ("zzz", "a_int32")],
)
def test_a_missing_prefix_names_the_nearest(
    written: str, nearest: str | None, tmp_path: Path
) -> None:
    copied(tmp_path, to="a_int32")
    if nearest is None:
        assert read_header(tmp_path / written).sequences == SEQUENCES
        return
    with pytest.raises(UserError) as caught:
        read_header(tmp_path / written)
    assert nearest in caught.value.problems[0].nearest


def test_sequences_may_lie_anywhere_in_the_file(tmp_path: Path) -> None:
    """Offsets count, not the order: two sequences change places, and one is there twice."""
    prefix = copied(tmp_path, "g_multiseq")
    expected = open_indexed(GOLDEN / "g_multiseq")
    content = bytearray(index_path(prefix).read_bytes())
    at = HEADER.size
    lengths, offsets = expected.lengths.copy(), expected.offsets.copy()
    lengths[[0, 3]], offsets[[0, 3]] = lengths[[3, 0]], offsets[[3, 0]]
    lengths[5], offsets[5] = lengths[1], offsets[1]
    raw = lengths.astype("<i4").tobytes() + offsets.astype("<i8").tobytes()
    content[at : at + len(raw)] = raw
    index_path(prefix).write_bytes(content)
    found = open_indexed(prefix)
    source = [3, 1, 2, 0, 4, 1]
    for index, other in enumerate(source):
        assert np.array_equal(found.sequence(index), expected.sequence(other))
    with IndexedWriter(tmp_path / "again", dtype="int32") as writer:
        writer.append_dataset(prefix)
        writer.finish()
    again = open_indexed(tmp_path / "again")
    for index in range(len(found)):
        assert np.array_equal(found.sequence(index), again.sequence(index))
