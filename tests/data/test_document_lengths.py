"""The lengths of documents that a loader makes, and their tiles, against the mask of their ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.data.joined import joined
from launcher.data.loader import _batch
from launcher.data.packing import SampleRows, StreamRows, plan_rows
from launcher.data.rows import RowDataset
from launcher.parallel.pipeline import ON_HOST, kept_on_host
from models.documents import (
    document_bounds,
    document_lengths,
    document_plan,
    lengths_of_ids,
    lengths_of_padding,
)
from tests.data.megatron.cases import open_loader
from tests.data.megatron.test_loader import LENGTH, section
from tests.data.test_packing import PAD, store_of

PACKINGS = 500


def expected_mask(ids: Tensor, window: int | None) -> Tensor:
    index = torch.arange(ids.shape[1])
    allowed = (ids[:, :, None] == ids[:, None, :]) & (index <= index[:, None])
    return allowed if window is None else allowed & (index > index[:, None] - window)


def mask_of_tiles(
    lengths: Tensor, rows: int, queries: int, window: int | None, most: int | None
) -> Tensor:
    """How often each tile has a query and a key together that attend to each other."""
    plan = document_plan(lengths, rows, queries)
    seen = torch.zeros(rows, plan.total, plan.total, dtype=torch.int64)
    for tile in plan.tiles(window, most):
        mask = tile.mask(window, torch.device("cpu"))
        if tile.is_causal:
            assert torch.equal(mask, torch.ones_like(mask).tril())
        assert most is None or len(tile.queries) <= most
        at = (slice(tile.queries.start, tile.queries.stop), slice(tile.keys.start, tile.keys.stop))
        seen[tile.rows, at[0], at[1]] += mask.long()
    return seen


def random_rows(numbers: np.random.Generator) -> RowDataset:
    """Rows of one of the ways to pack, or of two of them joined."""
    length = int(numbers.integers(4, 48))

    def dataset(kind: int) -> RowDataset:
        sizes = numbers.integers(2, 20, size=int(numbers.integers(1, 12)))
        store = store_of([list(range(size)) for size in sizes])
        if kind == 0:
            rows: StreamRows | SampleRows = StreamRows(store, length, PAD)
        else:
            packed = kind == 1
            plan = plan_rows(store, length, packed=packed)
            rows = SampleRows(store, plan, length, PAD, packed=packed)
        return RowDataset(rows=rows, seq_length=length, packed=kind < 2, content=str(kind))

    kind = int(numbers.integers(4))
    if kind < 2:
        return dataset(kind)
    return joined({"a": dataset(int(numbers.integers(2))), "b": dataset(kind - 1)}, length)


def test_lengths_and_tiles_are_the_mask_of_random_packings() -> None:
    numbers = np.random.default_rng(0)
    for _ in range(PACKINGS):
        dataset = random_rows(numbers)
        indices = numbers.integers(0, len(dataset), size=int(numbers.integers(1, 4)))
        batch = _batch(dataset, indices, indices, pin_memory=False)
        ids, lengths = batch.document_ids, batch.document_lengths
        assert ids is not None
        assert lengths is not None
        assert lengths.dtype == torch.int32
        assert lengths.shape == ids.shape
        found = lengths_of_ids(ids)
        assert found is not None
        assert torch.equal(lengths, found)
        rows, total = ids.shape
        window = int(numbers.integers(1, total)) if numbers.random() < 0.5 else None
        most = int(numbers.integers(1, total)) if numbers.random() < 0.5 else None
        queries = total if numbers.random() < 0.5 else int(numbers.integers(1, total))
        expected = expected_mask(ids, window).long()
        expected[:, : total - queries] = 0
        assert torch.equal(mask_of_tiles(lengths, rows, queries, window, most), expected)
        _check_cumulative(lengths, ids, queries)
        first, last = document_bounds(lengths)
        begins = (ids[:, :, None] == ids[:, None, :]).int().argmax(2)
        assert (first, last) == (begins.amin(0).tolist(), begins.amax(0).tolist())


def _check_cumulative(lengths: Tensor, ids: Tensor, queries: int) -> None:
    """Those of keys are where ids change, over all rows one after another."""
    rows, total = ids.shape
    of_queries, of_keys, most_queries, most_keys = document_plan(
        lengths, rows, queries
    ).cumulative()
    numbered = (ids + torch.arange(rows)[:, None] * total).flatten()
    borders = (numbered.diff() != 0).nonzero().flatten() + 1
    assert of_keys == [0, *borders.tolist(), rows * total]
    assert of_queries[-1] == rows * queries
    assert most_keys == np.diff(of_keys).max()
    assert most_queries == np.diff(of_queries).max()


def test_rows_of_megatron(tmp_path: Path) -> None:
    dataset = open_loader(section(reset_attention_mask=True), LENGTH, tmp_path)
    indices = np.arange(min(len(dataset), 20), dtype=np.int64)
    batch = _batch(dataset, indices, indices, pin_memory=False)
    assert batch.document_ids is not None
    assert batch.document_lengths is not None
    found = mask_of_tiles(batch.document_lengths, len(indices), LENGTH, None, None)
    assert torch.equal(found, expected_mask(batch.document_ids, None).long())


def test_padding_on_the_left_is_a_document() -> None:
    key_mask = torch.arange(6) >= torch.tensor([[2], [0], [5]])
    lengths = lengths_of_padding(key_mask)
    assert lengths is not None
    assert lengths.tolist() == [[2, 4], [0, 6], [5, 1]]
    assert lengths_of_padding(key_mask.flip(1)) is None


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="5 tokens in a row of 6"):
        document_plan(torch.tensor([[6, 0], [2, 3]], dtype=torch.int32), 2, 6)


def test_lengths_stay_on_the_host_where_wrappers_move_tensors() -> None:
    from torch.distributed.utils import _to_kwargs  # what FSDP and DDP call for a root's arguments

    ids = torch.tensor([[0, 0, 1]])
    given = {"document_ids": ids, ON_HOST: document_lengths(ids)}
    _, moved = _to_kwargs((), kept_on_host(given), torch.device("meta"), False)
    assert moved[0]["document_ids"].is_meta
    assert moved[0][ON_HOST].tensor.tolist() == [[2, 1, 0]]
