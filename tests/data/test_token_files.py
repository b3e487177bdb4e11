"""TokenFileDataLoader: files of token ids become rows, and what is wrong with a file is said."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.data.packing import StreamRows
from launcher.data.rows import NO_TARGET, RowDataset
from launcher.data.store import TokenStore
from launcher.data.token_files.header import TYPE_BYTES, describe
from launcher.errors import UserError

EOD = 3


def opened(
    paths: list[Path], seq_length: int = 4, *, packing: bool = False, log: list[str] | None = None,
    **keys: Any,
) -> RowDataset:  # fmt: skip
    loader = DataLoaderSection(
        type="TokenFileDataLoader", dataset_files=[str(path) for path in paths], **keys
    )
    return build_dataset(
        DatasetSection(data_loader=loader, packing=packing),
        tokenizer=None,
        seq_length=seq_length,
        cache_dir=paths[0].parent / "cache",
        once=lambda prepare: prepare(),
        log=(log if log is not None else []).append,
    )


def raw(path: Path, tokens: list[int], dtype: str) -> Path:
    np.array(tokens, dtype=np.dtype(dtype).newbyteorder("<")).tofile(path)
    return path


def saved(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize("dtype", TYPE_BYTES)
@pytest.mark.parametrize("form", ["npy", "big-endian npy", "suffix", "key", "side file"])
def test_every_type_in_every_form(dtype: str, form: str, tmp_path: Path) -> None:
    tokens, keys = list(range(1, 12)), {}
    if "npy" in form:
        order = ">" if form != "npy" else "<"
        array = np.array(tokens, dtype=np.dtype(dtype).newbyteorder(order))
        path = saved(tmp_path / "x.npy", array)
    else:
        path = raw(tmp_path / f"x.{dtype if form == 'suffix' else 'bin'}", tokens, dtype)
        if form == "key":
            keys = {"token_dtype": dtype}
        if form == "side file":
            (tmp_path / "x.bin.json").write_text(json.dumps({"dtype": dtype}))
    dataset = opened([path], **keys)
    found = [(row.input_ids.tolist(), row.labels.tolist()) for row in map(dataset.row, range(3))]
    none = NO_TARGET
    assert found == [
        ([1, 2, 3, 4], [2, 3, 4, 5]),
        ([5, 6, 7, 8], [6, 7, 8, 9]),
        ([9, 10, 11, 0], [10, 11, none, none]),
    ]
    counts = dataset.counts(np.arange(3))
    assert counts.targets.tolist() == [4, 4, 2]
    assert counts.tokens.tolist() == [4, 4, 3]


STREAM = st.lists(st.integers(0, 5), min_size=2, max_size=60)


@given(streams=st.lists(STREAM, min_size=1, max_size=3), seq_length=st.integers(2, 9))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_packed_rows_are_those_of_text(
    streams: list[list[int]], seq_length: int, tmp_path: Path
) -> None:
    """The same documents give the same rows as the loader of text makes of them."""
    for stream in streams:
        stream[-1] = EOD
    paths = [raw(tmp_path / f"{i}.u16", s, "uint16") for i, s in enumerate(streams)]
    dataset = opened(paths, seq_length, packing=True, eod_token_id=EOD)
    joined = np.array([token for stream in streams for token in stream], dtype=np.uint32)
    starts = np.concatenate([[0], np.flatnonzero(joined == EOD) + 1])
    store = TokenStore(tokens=joined, starts=starts, is_target=None, content="")
    expected = StreamRows(store, seq_length, 0)
    assert len(dataset) == len(expected)
    for index in range(len(dataset)):
        for mine, other in zip(dataset.row(index), expected.row(index), strict=True):
            if mine is None:  # is_desirable, of preferences
                assert other is None
                continue
            assert other is not None
            assert mine.tolist() == other.tolist()
    indices = np.arange(len(dataset))
    for found, wanted in zip(dataset.counts(indices), expected.counts(indices), strict=True):
        assert found.tolist() == wanted.tolist()


def test_files_are_documents_where_no_end_token_is_known(tmp_path: Path) -> None:
    streams = {"a.u16": [1, 2, 3], "b.u16": [4, 5]}
    paths = [raw(tmp_path / name, tokens, "uint16") for name, tokens in streams.items()]
    row = opened(paths, 4, packing=True).row(0)
    assert row.labels.tolist() == [2, 3, NO_TARGET, 5]
    assert row.position_ids is not None
    assert row.position_ids.tolist() == [0, 1, 2, 0]
    plain = opened(paths, 4).row(0)
    assert plain.labels.tolist() == [2, 3, 4, 5]
    assert plain.document_ids is None


@pytest.mark.parametrize("columns", [4, 5])
@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_an_array(columns: int, packing: bool, tmp_path: Path) -> None:
    array = np.arange(3 * columns, dtype=np.int64).reshape(3, columns)
    array[1, 1] = EOD = 90
    dataset = opened([saved(tmp_path / "x.npy", array)], packing=packing, eod_token_id=90)
    assert len(dataset) == 3
    row = dataset.row(1)
    assert row.input_ids.tolist() == array[1, :4].tolist()
    labels = [*array[1, 1:].tolist(), NO_TARGET][:4]
    if packing:
        labels[1] = NO_TARGET
        assert row.document_ids is not None
        assert row.document_ids.tolist() == [0, 0, 1, 1]
    assert row.labels.tolist() == labels
    counts = dataset.counts(np.arange(3))
    rows = [dataset.row(i).labels for i in range(3)]
    assert counts.targets.tolist() == [int((label != NO_TARGET).sum()) for label in rows]
    assert array[1, 1] == EOD


def test_side_file(tmp_path: Path) -> None:
    log: list[str] = []
    path = raw(tmp_path / "x.bin", [1, EOD, 2, 5, 6], "uint32")
    (tmp_path / "x.bin.json").write_text('{"dtype": "uint32", "eos": 3, "tokenizer": "gpt2"}')
    dataset = opened([path], packing=True, log=log)
    assert dataset.row(0).labels.tolist() == [EOD, NO_TARGET, 5, 6]
    assert any("tokenizer" in line and "x.bin.json" in line for line in log)


def _npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


WRONG: dict[str, tuple[str, Callable[[Path], Any], dict[str, Any], str]] = {
    # name: (file, make, keys, part of the message)
    "odd size": ("x.u32", lambda p: p.write_bytes(bytes(10)), {}, "byte 8: 10 bytes"),
    "unknown type": ("x.bin", lambda p: p.write_bytes(bytes(10)), {}, "token_dtype: uint16"),
    "pickled": ("x.npy", _pickled, {}, "never opened"),
    "pickle": ("x.npy", lambda p: p.write_bytes(pickle.dumps([1])), {}, "byte 0"),
    "floats": ("x.npy", lambda p: np.save(p, np.zeros(5)), {}, "'<f8'"),
    "structured": (
        "x.npy", lambda p: np.save(p, np.zeros(5, dtype=[("a", "<i4")])), {}, "values are",
    ),
    "Fortran order": (
        "x.npy", lambda p: np.save(p, np.asfortranarray(np.zeros((3, 4), np.int32))), {}, "Fortran",
    ),
    "dimensions": ("x.npy", lambda p: np.save(p, np.zeros((2, 2, 2), np.int32)), {}, "(2, 2, 2)"),
    "row length": ("x.npy", lambda p: np.save(p, np.zeros((3, 9), np.int32)), {}, "9 tokens"),
    "cut": (
        "x.npy", lambda p: (np.save(p, np.zeros(9, np.int32)), p.write_bytes(p.read_bytes()[:-1])),
        {}, "byte 163: 163 bytes",
    ),
    "longer": (
        "x.npy",
        lambda p: (np.save(p, np.zeros(9, np.int32)), p.write_bytes(p.read_bytes() + b"a")),
        {}, "byte 164: 165 bytes",
    ),
    "code in the header": ("x.npy", lambda p: p.write_bytes(_npy("exit()")), {}, "cannot be read"),
    "deep header": ("x.npy", lambda p: p.write_bytes(_npy("[" * 5000)), {}, "cannot be read"),
    "negative shape": (
        "x.npy",
        lambda p: p.write_bytes(_npy("{'descr': '<u2', 'fortran_order': False, 'shape': (-1,)}")),
        {}, "cannot be read",
    ),
    "two types": (
        "x.u16", lambda p: p.write_bytes(bytes(8)), {"token_dtype": "uint32"},
        "token_dtype is uint32",
    ),
    "side file of another type": (
        "x.u16", lambda p: (p.write_bytes(bytes(8)),
                            p.with_name("x.u16.json").write_text('{"dtype": "int64"}')),
        {}, "x.u16.json is int64",
    ),
    "side file without a known type": (
        "x.bin", lambda p: (p.write_bytes(bytes(8)),
                            p.with_name("x.bin.json").write_text('{"dtype": "unit16"}')),
        {}, "did you mean `uint16`?",
    ),
    "side file with two end tokens": (
        "x.bin", lambda p: (p.write_bytes(bytes(8)), p.with_name("x.bin.json").write_text(
            '{"dtype": "uint16", "eod": 0, "eod_token_id": 5}')),
        {}, "eod_token_id = 5",
    ),
    "side file that is no object": (
        "x.bin", lambda p: (p.write_bytes(bytes(8)), p.with_name("x.bin.json").write_text("[1]")),
        {}, "it is a list",
    ),
    "one token": ("x.u16", lambda p: p.write_bytes(bytes(2)), {}, "1 token(s)"),
    "Megatron": (
        "x.bin", lambda p: (p.write_bytes(bytes(8)), p.with_suffix(".idx").write_bytes(b"")),
        {}, "BlendedMegatronDatasetDataLoader",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_an_error(name: str, tmp_path: Path) -> None:
    file, make, keys, part = WRONG[name]
    path = tmp_path / file
    make(path)
    with pytest.raises(UserError) as caught:
        opened([path], **keys)
    problem = caught.value.problems[0]
    assert problem.where.startswith(str(path))
    assert part in str(problem)


def test_files_of_two_shapes(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / "a.npy", np.zeros(9, np.int32)),
        saved(tmp_path / "b.npy", np.zeros((2, 4), np.int32)),
    ]
    with pytest.raises(UserError, match="a stream of tokens"):
        opened(paths)


def test_tokens_outside_the_vocabulary(tmp_path: Path) -> None:
    dataset = opened([raw(tmp_path / "x.i32", [1, 2, -5, 4, 9, 1], "int32")])
    checked = replace(dataset, vocab_size=9)
    with pytest.raises(UserError, match="token -5"):
        checked.row(0)
    with pytest.raises(UserError, match="token 9"):
        checked.row(1)


def test_the_content_is_that_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    same = [raw(tmp_path / name, [1, 2, 3, 4], "uint16") for name in ("a.u16", "other/b.u16")]
    other = raw(tmp_path / "c.u16", [1, 2, 3, 5], "uint16")
    first, second, third = (opened([path]).content for path in (*same, other))
    assert first == second != third
    packed = opened(same[:1], eod_token_id=3, packing=True)
    assert packed.fingerprint != opened(same[:1]).fingerprint


@given(content=st.binary(max_size=200))
@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_no_header_does_more_than_an_error(content: bytes, tmp_path: Path) -> None:
    good = tmp_path / "good.npy"
    if not good.exists():
        saved(good, np.arange(5, dtype=np.uint16))
    (tmp_path / "x.npy").write_bytes(good.read_bytes()[:10] + content)
    try:
        found = describe(tmp_path / "x.npy", None)
    except UserError as error:
        _names(tmp_path / "x.npy", error)
        return
    assert found.begin + found.count * TYPE_BYTES[found.dtype] == found.path.stat().st_size


def _names(path: Path, error: UserError) -> None:
    assert error.problems[0].where == str(path)
