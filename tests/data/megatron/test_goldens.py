"""The order and the items are those of Megatron-core and of MindFormers.

Two faults of MindFormers are not copied, and the goldens that show them are compared with what is
right: its loss mask, handed out without a copy, stays masked after one padded item
(`mforder_valid_keep_partial`, `mforder_pad_default`), and a compressed mask without another key
fails at the second item (`mforder_compressed_cacheable`, `mforder_compressed_overflow`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.rows import NO_TARGET, Row, RowDataset
from launcher.errors import UserError
from tests.data.megatron.cases import SPLITS, Case, case, cases, megatron_rows, open_loader

ALL = cases()
MASK_STAYS_AFTER_PADDED_ITEM = ("mforder_valid_keep_partial", "mforder_pad_default")


def test_all_goldens_are_here() -> None:
    assert sum(not golden.is_mindformers for golden in ALL) >= 20
    assert sum(golden.is_mindformers for golden in ALL) >= 22


@pytest.mark.parametrize("golden", ALL, ids=lambda golden: golden.name)
def test_order_and_items(golden: Case, tmp_path: Path) -> None:
    content = golden.content
    if "splits" not in content:
        with pytest.raises(UserError, match=r"needs 15 samples of .*b_uint16, which has 13"):
            open_loader(golden.section(), content["seq_length"], tmp_path)
        return
    for split in SPLITS:
        expected = content["splits"][split]
        if expected is None or (expected["length"] == 0 and content["weights"]):
            with pytest.raises(UserError):
                open_loader(golden.section(), content["seq_length"], tmp_path, phase=split)
            continue
        dataset = open_loader(golden.section(), content["seq_length"], tmp_path, phase=split)
        _compare_order(dataset, expected)
        for index in range(len(expected.get("tokens", ()))):
            _compare_item(golden, content, expected, dataset.row(index), index)
        _compare_counts(dataset)


def _compare_order(dataset: RowDataset, expected: dict[str, Any]) -> None:
    rows = megatron_rows(dataset)
    assert len(dataset) == expected["length"]
    for part, arrays in zip(rows.parts, expected["mid"], strict=True):
        order = part.order
        assert len(order) == arrays["length"]
        assert order.documents.tolist() == arrays["document_index"]
        assert order.shuffle.tolist() == arrays["shuffle_index"]
        borders = np.stack(order.borders(np.arange(len(order) + 1)), axis=1)
        assert borders.tolist() == arrays["sample_index"]
    if "dataset_index" in expected:
        assert rows.blend is not None
        assert rows.blend.dataset.tolist() == expected["dataset_index"]
        assert rows.blend.sample.tolist() == expected["dataset_sample_index"]
    else:
        assert rows.blend is None


def _compare_item(
    golden: Case, content: dict[str, Any], expected: dict[str, Any], row: Row, index: int
) -> None:
    assert row.input_ids.tolist() == expected["tokens"][index]
    is_target = row.labels != NO_TARGET
    assert (
        np.where(is_target, row.labels, 0).tolist()
        == np.where(is_target, expected["labels"][index], 0).tolist()
    )
    if golden.name not in MASK_STAYS_AFTER_PADDED_ITEM:
        assert is_target.astype(int).tolist() == expected["loss_mask"][index]
    length = content["seq_length"]
    positions = row.position_ids if row.position_ids is not None else np.arange(length)
    assert positions.tolist() == expected["position_ids"][index]
    apart = bool(content.get("ra") or content.get("cce"))
    assert (row.document_ids is not None) == apart
    if "actual_seq_len" in expected:
        assert _compressed(row, length, content["epl"]) == expected["actual_seq_len"][index]
    blocked = expected.get("attention_mask_true_means_blocked_sum")
    if blocked is not None and apart:
        assert _blocked(row) == blocked[index]


def _compressed(row: Row, length: int, size: int) -> list[int]:
    """The documents of a row as MindFormers' compressed mask has them."""
    assert row.document_ids is not None
    ends = (np.flatnonzero(np.diff(row.document_ids)) + 1).tolist()
    return ends + [length] * (size - len(ends))


def _blocked(row: Row) -> int:
    """Cells of the attention mask that are blocked."""
    assert row.document_ids is not None
    documents, length = row.document_ids, len(row.document_ids)
    seen = np.tril(np.ones((length, length), dtype=bool))
    seen &= documents[:, None] == documents[None, :]
    return int((~seen).sum())


def _compare_counts(dataset: RowDataset) -> None:
    indices = np.arange(len(dataset))
    counts, rows = dataset.counts(indices), [dataset.row(int(index)) for index in indices]
    assert counts.targets.tolist() == [int((row.labels != NO_TARGET).sum()) for row in rows]
    assert dataset.total_targets() == counts.targets.sum()


@pytest.mark.parametrize("name", MASK_STAYS_AFTER_PADDED_ITEM)
def test_masks_after_a_padded_item_are_those_of_megatron(name: str, tmp_path: Path) -> None:
    theirs, right = case(name), case("order_valid_keep_partial")
    masks = right.content["splits"]["valid"]["loss_mask"]
    assert theirs.content["splits"]["valid"]["loss_mask"] != masks, "the fault is in the golden"
    dataset = open_loader(theirs.section(), 16, tmp_path, phase="valid")
    found = [(dataset.row(i).labels != NO_TARGET).astype(int).tolist() for i in range(len(masks))]
    assert found == masks


@pytest.mark.parametrize("name", ["mforder_compressed_cacheable", "mforder_compressed_overflow"])
def test_a_compressed_mask_alone_works(name: str, tmp_path: Path) -> None:
    dataset = open_loader(case(name).section(), 16, tmp_path)
    apart = open_loader(case("order_reset_all").section(), 16, tmp_path)
    for index in range(len(dataset)):
        mine, other = dataset.row(index), apart.row(index)
        assert np.array_equal(mine.input_ids, other.input_ids)
        assert mine.document_ids is not None
        assert other.document_ids is not None
        assert np.array_equal(mine.document_ids, other.document_ids)
        assert mine.position_ids is not None
        assert mine.position_ids.tolist() == list(range(16))
