"""Our packing beside that of MindFormers, run on the same samples.

`fixtures/mindformers_packing.json` has eight samples with labels that are not shifted, and what the
functions `pack_examples` and `truncate_examples` of MindFormers (commit 167a50d) made of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.packing import SampleRows, StreamRows, plan_rows
from launcher.data.rows import NO_TARGET, Row
from launcher.data.store import TokenStore, TokenWriter, open_store

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "fixtures" / "mindformers_packing.json").read_text()
)
LENGTH, PAD = GOLDEN["seq_length"], GOLDEN["pad"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("store")
    writer = TokenWriter(folder, with_targets=True)
    tokens = [sample["input_ids"] for sample in GOLDEN["samples"]]
    writer.add(tokens, [np.array(sample["labels"]) != NO_TARGET for sample in GOLDEN["samples"]])
    return open_store(folder, writer.finish())


def rows_of(rows: SampleRows | StreamRows) -> list[Row]:
    return [rows.row(index) for index in range(len(rows))]


def targets(labels: Any) -> list[int]:
    return [int(label) for row in labels for label in row if label != NO_TARGET]


def test_concatenated_rows_are_those_of_truncate_with_labels_shifted_once(
    store: TokenStore,
) -> None:
    ours = rows_of(StreamRows(store, LENGTH, PAD))
    theirs = GOLDEN["truncate"]
    assert [row.input_ids.tolist() for row in ours] == theirs["input_ids"]
    stream = [label for row in theirs["labels"] for label in row]
    shifted = np.array([*stream[1:], NO_TARGET]).reshape(-1, LENGTH)
    assert [row.labels.tolist() for row in ours] == shifted.tolist()


def test_packed_samples_are_complete_and_apart_and_none_is_lost(store: TokenStore) -> None:
    """Theirs drops the sample of 20 tokens, and gives the last token of each sample the label 0."""
    plan = plan_rows(store, LENGTH, packed=True)
    ours = rows_of(SampleRows(store, plan, LENGTH, PAD, packed=True))
    assert (plan.cut, plan.dropped) == (1, 0)
    wanted = []
    for sample in GOLDEN["samples"]:
        labels = sample["labels"][1 : LENGTH + 1]
        wanted += [label for label in labels if label != NO_TARGET]
    assert sorted(targets(row.labels for row in ours)) == sorted(wanted)
    theirs = targets(GOLDEN["pack"]["labels"])
    assert theirs.count(PAD) == 7
    assert set(wanted) - set(theirs)
    for row in ours:
        assert row.document_ids is not None
        assert row.position_ids is not None
        begins = np.flatnonzero(np.diff(row.document_ids)) + 1
        assert (row.position_ids[begins] == 0).all()
    assert len(ours) <= len(GOLDEN["pack"]["input_ids"])
