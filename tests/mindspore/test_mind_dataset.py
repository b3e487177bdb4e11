"""MindDataset: the rows that a model is trained on, as MindFormers' models make them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.data.loader import Loader
from launcher.data.order import GlobalOrder
from launcher.data.progress import Progress, ignore_progress
from launcher.data.rows import NO_TARGET, RowDataset
from launcher.errors import UserError
from tests.data.mindrecord_writer import Schema, token_rows, write_mindrecord
from tests.mindspore.records import expected, unpack

N = NO_TARGET
IDS_LABELS: Schema = {"input_ids": ("int32", [-1]), "labels": ("int32", [-1])}


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("mindrecord"))


Build = Callable[..., RowDataset]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def build(tmp_path: Path, lines: list[str]) -> Build:
    """The rows of a file, with keys of the loader."""

    def build(
        path: Path, seq_length: int, model: dict[str, Any] | None = None, **keys: Any
    ) -> RowDataset:
        packing, on_progress = keys.pop("packing", False), keys.pop("on_progress", ignore_progress)
        loader = DataLoaderSection(type="MindDataset", dataset_dir=str(path), **keys)
        section = DatasetSection(data_loader=loader, packing=packing)
        return build_dataset(
            section, tokenizer=None, seq_length=seq_length, cache_dir=tmp_path / "cache",
            once=lambda prepare: prepare(), log=lines.append,
            on_progress=on_progress, model_config=model,
        )  # fmt: skip

    return build


def written(folder: Path, rows: Sequence[Sequence[Sequence[int]]], *names: str) -> Path:
    """A file of int32 columns; `rows`: for each row its columns."""
    schema: Schema = {name: ("int32", [-1]) for name in names}
    path = folder / f"{len(list(folder.iterdir()))}.mindrecord"
    write_mindrecord(path, schema, token_rows(rows, *names))
    return path


NAMES = ("input_ids", "labels", "loss_mask")
RULES: dict[str, tuple[list[list[int]], dict[str, Any], list[int], list[int]]] = {
    "tokens alone": ([[5, 6, 7, 8, 9]], {}, [5, 6, 7, 8], [6, 7, 8, 9]),
    "padding by the input": (
        [[5, 0, 7, 8, 0]], {"pad_token_id": 0}, [5, 0, 7, 8], [0, N, 8, 0],
    ),
    "unshifted labels": (
        [[5, 6, 7, 8, 9], [N, N, 7, 8, 9]], {}, [5, 6, 7, 8], [N, 7, 8, 9],
    ),
    "shifted labels": ([[5, 6, 7, 8], [N, 7, 8, 9]], {}, [5, 6, 7, 8], [N, 7, 8, 9]),
    "unshifted, padded": (
        [[5, 6, 7, 0, 0], [N, 6, 7, N, N]], {"pad_token_id": 0}, [5, 6, 7, 0], [6, 7, N, N],
    ),
    "shifted, padded": (
        [[5, 6, 0, 0], [6, 7, 8, 9]], {"labels": "shifted", "pad_token_id": 0}, [5, 6, 0, 0],
        [6, 7, N, N],
    ),
    "another ignored label": (
        [[5, 6, 7, 8, 9], [3, 3, 7, 8, N]], {"ignore_token_id": 3}, [5, 6, 7, 8], [N, 7, 8, N],
    ),
    "a mask instead of the padding": (
        [[5, 0, 7, 8], [0, 7, 8, 9], [1, 1, 0, 1]], {"pad_token_id": 0, "labels": "shifted"},
        [5, 0, 7, 8], [0, 7, N, 9],
    ),
    "a mask of unshifted labels": (
        [[5, 6, 7, 8, 9], [5, 6, N, 8, 9], [0, 1, 1, 1, 0]], {}, [5, 6, 7, 8], [N, N, 8, 9],
    ),
    "a short row": ([[5, 6, 7]], {"pad_token_id": 3}, [5, 6, 3, 3], [6, 7, N, N]),
    "a short row, no padding token": ([[5, 6, 7]], {}, [5, 6, 0, 0], [6, 7, N, N]),
}  # fmt: skip
TOKENS = {"padding by the input": 3, "unshifted, padded": 3, "shifted, padded": 2,
          "a short row": 2, "a short row, no padding token": 2}  # fmt: skip
"""Tokens without padding, where it is not all four."""


@pytest.mark.parametrize("name", RULES)
def test_rules_of_a_row(name: str, build: Build, tmp_path: Path) -> None:
    columns, keys, tokens, labels = RULES[name]
    path = written(tmp_path, [columns], *NAMES[: len(columns)])
    dataset = build(path, 4, **keys)
    row = dataset.row(0)
    assert row.input_ids.tolist() == tokens
    assert row.labels.tolist() == labels
    assert row.position_ids is None
    assert row.input_ids.dtype == row.labels.dtype == np.int64
    counts = dataset.counts(np.array([0]))
    assert counts.targets.tolist() == [len(labels) - labels.count(N)]
    assert dataset.total_targets() == counts.targets[0]
    assert counts.tokens.tolist() == [TOKENS.get(name, 4)]


def test_documents_are_those_of_eod_reset(goldens: Path, build: Build, tmp_path: Path) -> None:
    known = json.loads((goldens / "eod_reset.json").read_text())
    path = written(tmp_path, [[ids] for ids in known["input_ids"]], "input_ids")
    dataset = build(path, 8, eod_token_id=known["eod_token_id"])
    assert dataset.packed
    for index, (positions, mask) in enumerate(
        zip(known["position_ids"], known["attention_mask"], strict=True)
    ):
        row = dataset.row(index)
        assert row.position_ids is not None
        assert row.document_ids is not None
        assert row.position_ids.tolist() == positions
        same = row.document_ids[:, None] == row.document_ids[None, :]
        assert np.tril(same).astype(int).tolist() == mask
        assert row.labels.tolist() == known["input_ids"][index][1:]  # borders count, as there


@pytest.mark.parametrize(
    ("keys", "documents"),
    [({"eod_token_id": 2}, [0, 0, 1, 2, 2, 2]), ({"packing": True}, [0, 0, 0, 1, 1, 1])],
    ids=["documents", "beside packed rows of a mixture"],
)
def test_padding_is_a_document_of_its_own(
    keys: dict[str, Any], documents: list[int], build: Build, tmp_path: Path
) -> None:
    dataset = build(written(tmp_path, [[[5, 2, 6, 7]]], "input_ids"), 6, **keys)
    assert dataset.packed
    row = dataset.row(0)
    assert row.document_ids is not None
    assert row.document_ids.tolist() == documents


@pytest.mark.parametrize("name", ["wiki64", "alpaca65", "qwen_like", "manypages"])
def test_golden_rows(name: str, goldens: Path, build: Build, lines: list[str]) -> None:
    known = expected(goldens, f"{name}.mindrecord")["values"]
    length = len(known[0]["input_ids"])
    dataset = build(goldens / f"{name}.mindrecord", length - 1, {"pad_token_id": 0})
    assert len(dataset) == len(known)
    labels_of = {"alpaca65": "labels", "qwen_like": "target_ids"}.get(name, "input_ids")
    for index, values in enumerate(known):
        ids = np.array(values["input_ids"])
        row = dataset.row(index)
        assert row.input_ids.tolist() == ids[:-1].tolist()
        labels = np.where(ids[:-1] != 0, np.array(values[labels_of])[1:], N)
        assert row.labels.tolist() == labels.tolist()
    counts = dataset.counts(np.arange(len(dataset)))
    rows = [dataset.row(index) for index in range(len(dataset))]
    assert counts.targets.tolist() == [int((row.labels != N).sum()) for row in rows]
    assert any("attention_mask" in line for line in lines) == (name == "qwen_like")


def test_order_without_shuffle_is_that_of_the_original(goldens: Path, build: Build) -> None:
    known = expected(goldens, "sharded_order")
    dataset = build(goldens / "wiki64.mindrecord", 64)
    order = GlobalOrder(len(dataset), seed=1, shuffle=False)
    for ranks, rows in ((2, [known["0"], known["1"]]), (3, known["three_of_20"])):
        for rank in range(ranks):
            loader = Loader(dataset, order, batch_size=1, micro_steps=1, data_parallel=ranks,
                            data_rank=rank, prefetch=False)  # fmt: skip
            ids = [loader.step(ranks * step).batches[0] for step in range(len(rows[rank]))]
            for batch, row in zip(ids, rows[rank], strict=True):
                assert batch.input_ids[0].tolist() == dataset.row(row).input_ids.tolist()


def test_columns_are_chosen_by_name(build: Build, tmp_path: Path, lines: list[str]) -> None:
    rows = [[[5, 6, 7], [6, 7, 8], [9, 9, 9]]]
    path = written(tmp_path, rows, "text", "next", "other")
    dataset = build(path, 3, column_map={"input_ids": "text", "labels": "next"})
    assert dataset.row(0).labels.tolist() == [6, 7, 8]
    assert any(line.endswith("not used: other") for line in lines)
    with pytest.raises(UserError, match=r"no column with tokens.*column_map\.input_ids"):
        build(path, 3, column_map={"labels": "next"})
    with pytest.raises(UserError, match="`input_ids: text`"):
        build(path, 3, column_map={"text": "input_ids"})


def test_a_map_without_tokens_takes_those_of_the_usual_name(build: Build, tmp_path: Path) -> None:
    path = written(tmp_path, [[[5, 6, 7], [1, 2, 3], [6, 7, 8]]], "input_ids", "labels", "next")
    assert build(path, 3, column_map={"labels": "next"}).row(0).labels.tolist() == [6, 7, 8]
    alone = build(path, 2, column_map={"input_ids": "input_ids"})
    assert alone.row(0).labels.tolist() == [6, 7]


def test_an_end_token_that_ends_nothing_is_said(
    build: Build, tmp_path: Path, lines: list[str]
) -> None:
    path = written(tmp_path, [[[5, 6, 7, 8]]], "input_ids")
    for eod, count in ((6, 0), (9, 1)):
        build(path, 3, eod_token_id=eod)
        assert sum("data_loader.eod_token_id" in line for line in lines) == count


def test_num_samples_takes_the_first_rows(goldens: Path, build: Build) -> None:
    dataset = build(goldens / "shards.mindrecord0", 32, num_samples=8)
    assert len(dataset) == 8
    known = expected(goldens, "shards.mindrecord")["values"][7]["input_ids"]
    assert dataset.row(7).input_ids.tolist() == known[:-1]


WRONG: dict[str, tuple[list[list[list[int]]], dict[str, Any], tuple[str, ...]]] = {
    "a longer row": (
        [[[5, 6, 7]], [[5] * 6], [[5] * 8]], {}, ("row 1", "6 tokens", "seq_length: 7"),
    ),
    "a row of seq_length + 1 with shifted labels": (
        [[[5, 6, 7, 8, 9], [6, 7, 8, 9, 5]]], {},
        ("5 tokens", "seq_length: 5", "labels: unshifted"),
    ),
    "labels of other tokens": (
        [[[5, 6, 7], [8, 8, 8]]], {}, ("data_loader.labels", "unshifted", "shifted"),
    ),
    "columns of different lengths": (
        [[[5, 6, 7], [5, 6]]], {"labels": "unshifted"}, ("3 input_ids", "2 labels", "page 0"),
    ),
    "a negative token": ([[[5, -6, 7]]], {}, ("token -6", "row 0")),
    "a negative label": (
        [[[5, 6, 7], [5, -1, 7]]], {"labels": "unshifted"}, ("token -1", "ignore_token_id"),
    ),
    "no target": ([[[0, 0, 0]]], {"pad_token_id": 0}, ("nothing to train on", "token 0")),
    "weights in the mask": (
        [[[5, 6, 7], [5, 6, 7], [1, 2, 1]]], {}, ("loss_mask", "neither 0 nor 1"),
    ),
    "a column that is missing": (
        [[[5, 6, 7]]], {"column_map": {"input_ids": "input_id"}}, ("'input_id'", "`input_ids`"),
    ),
    "a role that is none": (
        [[[5, 6, 7]]], {"column_map": {"label": "input_ids"}}, ("column_map.label", "`labels`"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_before_training(name: str, build: Build, tmp_path: Path) -> None:
    rows, keys, texts = WRONG[name]
    path = written(tmp_path, rows, *NAMES[: len(rows[0])])
    with pytest.raises(UserError) as error:
        build(path, 4, **keys)
    assert all(text in str(error.value) for text in texts), error.value


def test_a_token_outside_the_vocabulary_is_known(goldens: Path, build: Build) -> None:
    known = expected(goldens, "wiki64.mindrecord")["values"]
    dataset = build(goldens / "wiki64.mindrecord", 64)
    assert dataset.largest_token == max(max(row["input_ids"]) for row in known)


def test_labels_that_contradict_the_key_are_a_warning(
    goldens: Path, build: Build, lines: list[str]
) -> None:
    build(goldens / "alpaca65.mindrecord", 65, labels="shifted")
    assert any(line.startswith("warning: data_loader.labels is shifted") for line in lines)


def test_what_a_killed_preparation_left_is_removed(
    goldens: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.data.progress.FIRST_SECONDS", -1.0)
    monkeypatch.setattr("launcher.data.progress.REPORT_SECONDS", -1.0)
    build(goldens / "wiki64.mindrecord", 64)
    (folder,) = (tmp_path / "cache").iterdir()
    folder.rename(folder.with_name(f".{folder.name}.1234.tmp"))
    seen = list[Progress]()
    build(goldens / "wiki64.mindrecord", 64, on_progress=seen.append)
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert seen[-1].fraction == 1


def test_the_index_is_made_once_and_again_where_it_is_damaged(
    goldens: Path, build: Build, tmp_path: Path, lines: list[str]
) -> None:
    path = tmp_path / "wiki64.mindrecord"
    shutil.copy(goldens / "wiki64.mindrecord", path)
    first = build(path, 64)
    (folder,) = (tmp_path / "cache").iterdir()
    assert not any("from the index" in line for line in lines)
    again = build(path, 64)
    assert any(str(folder) in line for line in lines)
    (folder / "targets.bin").write_bytes(b"")
    third = build(path, 64)
    assert any("damaged" in line for line in lines)
    assert first.fingerprint == again.fingerprint == third.fingerprint
    elsewhere = build(Path(shutil.copy(path, tmp_path / "copy.mindrecord")), 64)
    assert elsewhere.fingerprint == first.fingerprint
    assert build(goldens / "wiki64.mindrecord", 65).fingerprint != first.fingerprint


def test_a_changed_file_has_another_index(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "x.mindrecord"
    prints = set()
    for tokens in ([5, 6, 7], [5, 6, 8, 9]):
        write_mindrecord(path, {"input_ids": ("int32", [-1])}, token_rows([tokens]))
        prints.add(build(path, 4).fingerprint)
    assert len(prints) == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
