"""Rows against a slow reference that is written token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.packing import SampleRows, StreamRows, plan_rows
from launcher.data.rows import RowDataset
from launcher.data.store import TokenStore

PAD = 999


def store_of(documents: list[list[int]], targets: list[list[bool]] | None = None) -> TokenStore:
    starts = np.cumsum([0, *map(len, documents)])
    flat = [token for document in documents for token in document]
    is_target = None
    if targets is not None:
        is_target = np.array([t for mask in targets for t in mask], dtype=np.uint8)
    return TokenStore(
        tokens=np.array(flat, dtype=np.uint32),
        starts=starts.astype(np.int64),
        is_target=is_target,
        content="x",
    )


@st.composite
def documents_with_numbers(draw: st.DrawFn, least: int = 1) -> list[list[int]]:
    """Documents whose tokens are all different, so that a token identifies its place."""
    lengths = draw(st.lists(st.integers(least, 20), min_size=1, max_size=15))
    numbers = iter(range(100_000, 200_000))
    return [[next(numbers) for _ in range(length)] for length in lengths]


@given(documents=documents_with_numbers(), seq_length=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_packed_stream_is_the_slow_reference(documents: list[list[int]], seq_length: int) -> None:
    rows = StreamRows(store_of(documents), seq_length, PAD)
    stream = [
        (token, number, document[place + 1] if place + 1 < len(document) else -100)
        for number, document in enumerate(documents)
        for place, token in enumerate(document)
    ]
    assert len(rows.target_counts) == -(-(len(stream) - 1) // seq_length)
    for index in range(len(rows.target_counts)):
        piece = stream[index * seq_length : (index + 1) * seq_length]
        missing = seq_length - len(piece)
        row = rows.row(index)
        assert row.input_ids.tolist() == [token for token, _, _ in piece] + [PAD] * missing
        assert row.labels.tolist() == [label for _, _, label in piece] + [-100] * missing
        numbers = [number for _, number, _ in piece] + [-1] * missing
        assert row.document_ids is not None
        assert row.position_ids is not None
        for t in range(seq_length):
            same = [s for s in range(seq_length) if numbers[s] == numbers[t]]
            assert row.position_ids[t] == t - same[0]
            assert [
                s for s in range(seq_length) if row.document_ids[s] == row.document_ids[t]
            ] == same
        assert row.document_ids[0] == 0
        assert rows.target_counts[index] == np.count_nonzero(row.labels != -100)
        assert rows.token_counts[index] == len(piece)


@given(documents=documents_with_numbers(), seq_length=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_packing_text_loses_no_target(documents: list[list[int]], seq_length: int) -> None:
    rows = StreamRows(store_of(documents), seq_length, PAD)
    labels = [
        label for i in range(len(rows.target_counts)) for label in rows.row(i).labels.tolist()
    ]
    expected = [token for document in documents for token in document[1:]]
    assert [label for label in labels if label != -100] == expected


@st.composite
def samples_with_targets(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]]]:
    documents = draw(documents_with_numbers())
    return documents, [[draw(st.booleans()) for _ in document] for document in documents]


@given(samples=samples_with_targets(), seq_length=st.integers(1, 24), packed=st.booleans())
@settings(max_examples=200, deadline=None)
def test_sample_rows_are_the_slow_reference(
    samples: tuple[list[list[int]], list[list[bool]]], seq_length: int, packed: bool
) -> None:
    documents, targets = samples
    expected = []  # (inputs, labels) of each sample that teaches something
    for document, mask in zip(documents, targets, strict=True):
        inputs = document[:-1][:seq_length]
        labels = [
            token if target else -100 for token, target in zip(document[1:], mask[1:], strict=True)
        ][:seq_length]
        if any(label != -100 for label in labels):
            expected.append((inputs, labels))
    bins: list[list[tuple[list[int], list[int]]]] = []
    for sample in expected:  # first-fit, the slow way
        fitting = [b for b in bins if sum(len(i) for i, _ in b) + len(sample[0]) <= seq_length]
        if packed and fitting:
            fitting[0].append(sample)
        else:
            bins.append([sample])

    store = store_of(documents, targets)
    plan = plan_rows(store, seq_length, packed=packed)
    rows = SampleRows(store, plan, seq_length, PAD, packed=packed)
    assert len(rows.target_counts) == len(bins)
    assert plan.dropped == len(documents) - len(expected)
    for index, content in enumerate(bins):
        row = rows.row(index)
        inputs = [token for sample, _ in content for token in sample]
        labels = [label for _, sample in content for label in sample]
        missing = seq_length - len(inputs)
        assert row.input_ids.tolist() == inputs + [PAD] * missing
        assert row.labels.tolist() == labels + [-100] * missing
        assert rows.target_counts[index] == sum(label != -100 for label in labels)
        assert rows.token_counts[index] == len(inputs)
        if not packed:
            assert row.position_ids is None
            assert row.document_ids is None
            continue
        lengths = [len(sample) for sample, _ in content] + ([missing] if missing else [])
        assert row.position_ids is not None
        assert row.document_ids is not None
        assert row.position_ids.tolist() == [t for length in lengths for t in range(length)]
        assert row.document_ids.tolist() == [
            number for number, length in enumerate(lengths) for _ in range(length)
        ]


def test_the_picture_in_the_docstring() -> None:
    a, b, c, end = 1, 2, 3, 9
    rows = StreamRows(store_of([[a] * 4 + [end], [b] * 3 + [end], [c] * 5 + [end]]), 6, 0)
    assert rows.row(0).labels.tolist() == [a, a, a, end, -100, b]
    assert rows.row(1).labels.tolist() == [b, end, -100, c, c, c]
    assert rows.row(2).labels.tolist() == [c, end, -100, -100, -100, -100]
    assert rows.token_counts.tolist() == [6, 6, 3]


def test_cut_samples_are_counted() -> None:
    store = store_of([[1] * 9, [2] * 5, [3] * 4, [4]])
    plan = plan_rows(store, 4, packed=False)
    assert (plan.cut, plan.dropped) == (1, 1)
    assert plan.target_counts.tolist() == [4, 4, 3]


def test_a_hundred_thousand_samples_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(2, 400, 100_000)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.zeros(starts[-1], dtype=np.uint32)
    store = TokenStore(tokens=tokens, starts=starts, is_target=None, content="")
    plan = plan_rows(store, 512, packed=True)
    assert plan.token_counts.max() <= 512
    assert plan.token_counts.sum() == (lengths - 1).sum()
    assert plan.token_counts.sum() > 0.97 * 512 * len(plan.token_counts)


def test_rows_outside_are_an_error() -> None:
    rows = StreamRows(store_of([[1, 2, 3]]), 2, 0)
    dataset = RowDataset(rows=rows, seq_length=2, packed=True, content="", largest_token=3)
    assert len(dataset) == 1
    for index in (-1, 1):
        with pytest.raises(IndexError, match="of 1"):
            dataset.row(index)


def test_the_fingerprint_knows_content_and_cut() -> None:
    rows = StreamRows(store_of([[1, 2, 3]]), 2, 0)
    prints = {
        RowDataset(
            rows=rows, seq_length=length, packed=packed, content=content, largest_token=3
        ).fingerprint
        for length in (2, 3)
        for packed in (True, False)
        for content in ("a", "b")
    }
    assert len(prints) == 8
    assert all(len(value) == 32 for value in prints)


def test_a_path_is_not_needed(tmp_path: Path) -> None:
    """Rows of plain arrays and rows of mapped ones are the same thing."""
    from launcher.data.store import TokenWriter, open_store

    writer = TokenWriter(tmp_path, with_targets=False)
    writer.add([[5, 6, 7], [8, 9]])
    mapped = StreamRows(open_store(tmp_path, writer.finish()), 3, 0)
    plain = StreamRows(store_of([[5, 6, 7], [8, 9]]), 3, 0)
    for index in range(2):
        for left, right in zip(mapped.row(index), plain.row(index), strict=True):
            if left is None:  # is_desirable, of preferences
                assert right is None
                continue
            assert right is not None
            assert left.tolist() == right.tolist()


@given(
    documents=documents_with_numbers(), seq_length=st.integers(1, 12), mask=st.integers(0, 2**60)
)
@settings(max_examples=200, deadline=None)
def test_a_stream_with_context_is_the_slow_reference(
    documents: list[list[int]], seq_length: int, mask: int
) -> None:
    """Targets are the tokens whose bit is set; rows without one are left out."""
    targets = [[bool(mask >> (token % 60) & 1) for token in document] for document in documents]
    rows = StreamRows(store_of(documents, targets), seq_length, PAD)
    stream = [token for document in documents for token in document]
    labels = [
        token if is_target and place else -100
        for document, marks in zip(documents, targets, strict=True)
        for place, (token, is_target) in enumerate(zip(document, marks, strict=True))
    ]
    expected = []
    for begin in range(0, max(len(stream) - 1, 0), seq_length):
        inputs = stream[begin : begin + seq_length]
        wanted = labels[begin + 1 : begin + 1 + seq_length]
        if set(wanted) != {-100}:
            expected.append(
                (inputs + [PAD] * (seq_length - len(inputs)),
                 wanted + [-100] * (seq_length - len(wanted)), len(inputs))
            )  # fmt: skip
    found = [rows.row(index) for index in range(len(rows))]
    assert [(row.input_ids.tolist(), row.labels.tolist()) for row in found] == [
        (inputs, wanted) for inputs, wanted, _ in expected
    ]
    counts = rows.counts(np.arange(len(rows)))
    assert counts.targets.tolist() == [
        sum(label != -100 for label in wanted) for _, wanted, _ in expected
    ]
    assert counts.tokens.tolist() == [length for _, _, length in expected]
