"""MindDataset in YAML: keys of MindFormers, and what is checked before any process starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.config.nodes import Node
from launcher.config.resolve import Resolved, read_tree
from launcher.config.rules import check
from launcher.config.yaml_reader import read_text
from tests.data.mindrecord_writer import Schema, token_rows, write_mindrecord
from tests.mindspore.test_sections import value_of

LOADER = "data_loader: {type: MindDataset, dataset_dir: a.mindrecord}"
MODEL = "model: {model_config: {type: LlamaConfig, hidden_size: 8, num_layers: 1, num_heads: 1"


def tree(*keys: str, top: str = "") -> Node:
    inner = "".join(f"  {key}\n" for key in keys)
    return read_text(f"{top}run_mode: train\ntrain_dataset:\n{inner}", "x.yaml")


def read(*keys: str, top: str = "") -> Resolved:
    return read_tree(tree(*keys, top=top))


TRANSLATED: dict[str, tuple[tuple[str, ...], str, dict[str, Any]]] = {
    "tokens": (("input_columns: [input_ids]",), "", {"column_map": {"input_ids": "input_ids"}}),
    "by position": (
        ("input_columns: [text, next]",), "",
        {"column_map": {"input_ids": "text", "labels": "next"}},
    ),
    "by name": (
        ("input_columns: [input_ids, target_ids, attention_mask]",), "",
        {"column_map": {"input_ids": "input_ids", "labels": "target_ids"}},
    ),
    "a mask is no label": (
        ("input_columns: [input_ids, attention_mask]",), "",
        {"column_map": {"input_ids": "input_ids"}},
    ),
    "a loss mask": (
        ("input_columns: [input_ids, labels, loss_mask]",), "",
        {"column_map": {"input_ids": "input_ids", "labels": "labels", "loss_mask": "loss_mask"}},
    ),
    "names of arguments": (
        ("input_columns: [a, b, c]", "construct_args_key: [input_ids, labels]"), "",
        {"column_map": {"input_ids": "a", "labels": "b"}},
    ),
    "names of arguments alone": (
        ("construct_args_key: [input_ids, labels]",), "",
        {"column_map": {"input_ids": "input_ids", "labels": "labels"}},
    ),
    "projected": (
        ("input_columns: [a, b]", "output_columns: [b, a]"), "",
        {"column_map": {"input_ids": "b", "labels": "a"}},
    ),
    "nothing said": ((), "", {"column_map": None, "labels": None, "eod_token_id": None}),
    "documents": (
        ("eod_reset: True", "eod_token_id: 7", "input_columns: [input_ids]",
         "output_columns: [input_ids, position_ids, attention_mask]"), "",
        {"eod_token_id": 7, "column_map": {"input_ids": "input_ids"}},
    ),
    "a token without eod_reset": (
        ("eod_reset: False", "eod_token_id: 7"), "", {"eod_token_id": None},
    ),
    "sliced rows": ((), f"{MODEL}, input_sliced_sig: True}}}}\n", {"labels": "shifted"}),
    "not sliced": ((), f"{MODEL}, input_sliced_sig: False}}}}\n", {"labels": None}),
    "new models": ((), "use_legacy: False\n", {"labels": "shifted"}),
    "ignored labels": ((), f"{MODEL}, ignore_token_id: 3}}}}\n", {"ignore_token_id": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSLATED)
def test_keys_become_those_of_the_loader(name: str) -> None:
    keys, top, expected = TRANSLATED[name]
    resolved = read(LOADER, *keys, top=top)
    assert not resolved.problems, resolved.problems
    prefix = "train_dataset.data_loader"
    assert {key: value_of(resolved, f"{prefix}.{key}") for key in expected} == expected


def test_keys_of_a_section_hold_for_every_source_of_a_mixture() -> None:
    resolved = read(
        "input_columns: [a]", "data_loader:", "- {type: MindDataset, dataset_dir: a}",
        "- {type: TextDataLoader, dataset_dir: b}",
        "- {type: MindDataset, dataset_dir: c, column_map: {input_ids: x}}",
    )  # fmt: skip
    sources = resolved.config.train_dataset.data_loader  # type: ignore[union-attr]
    assert isinstance(sources, list)
    assert [source.column_map for source in sources] == [
        {"input_ids": "a"}, None, {"input_ids": "x"}
    ]  # fmt: skip


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "positions": (
        ("input_columns: [input_ids, labels, loss_mask, position_ids]",),
        ("train_dataset.input_columns", "eod_token_id"),
    ),
    "documents without a token": (("eod_reset: True",), ("train_dataset.eod_reset",)),
    "dynamic batches": (("dynamic_batch: True",), ("train_dataset.dynamic_batch",)),
    "repeated data": (("repeat: 2",), ("train_dataset.repeat",)),
    "two lists": (
        ("input_columns: [a]", "data_loader: {type: MindDataset, column_map: {input_ids: b}}"),
        ("train_dataset.input_columns", "data_loader.column_map"),
    ),
    **{
        name: ((f"data_loader: {{type: MindDataset, {name}: {value}}}",), (f"data_loader.{name}",))
        for name, value in {"sampler": "x", "padded_sample": "{a: 1}", "num_padded": 4,
                            "cache": "x", "columns_list": "[a]"}.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    keys, texts = REFUSED[name]
    own = any(key.startswith("data_loader") for key in keys)
    (problem,) = read(*(() if own else (LOADER,)), *keys).problems
    assert all(text in str(problem) for text in texts), problem
    assert problem.where.startswith("x.yaml:")
    assert problem.advice


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a.mindrecord (33 tokens) as the current directory."""
    monkeypatch.chdir(tmp_path)
    schema: Schema = {"input_ids": ("int32", [-1]), "labels": ("int32", [-1])}
    write_mindrecord(tmp_path / "a.mindrecord", schema,
                     token_rows([[range(33), range(33)]], "input_ids", "labels"))  # fmt: skip
    write_mindrecord(tmp_path / "none.mindrecord", schema, [])
    (tmp_path / "text.mindrecord").write_text("some text, and more of it")
    return tmp_path


CHECKED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "right": ((LOADER, "seq_length: 32"), "", ""),
    "longer rows are possible": ((LOADER, "seq_length: 64"), "", ""),
    "rows that are too long": (
        (LOADER, "seq_length: 31"), "train_dataset.seq_length", "Set train_dataset.seq_length: 32",
    ),
    "shifted rows that are too long": (
        ("data_loader: {type: MindDataset, dataset_dir: a.mindrecord, labels: shifted}",
         "seq_length: 32"), "train_dataset.seq_length", "labels: unshifted",
    ),
    "a column that is missing": (
        ("data_loader: {type: MindDataset, dataset_dir: a.mindrecord, column_map: {labels: label, "
         "input_ids: input_id}}",), "train_dataset.data_loader.column_map", "`input_ids`",
    ),
    "columns of a list that are missing": (
        (LOADER, "input_columns: [input_ids, label]"), "train_dataset.data_loader.column_map",
        "`labels`",
    ),
    "a file that is missing": (
        ("data_loader: {type: MindDataset, dataset_dir: b.mindrecord}",),
        "train_dataset.data_loader.dataset_dir", "`a.mindrecord`",
    ),
    "another file": (
        ("data_loader: {type: MindDataset, dataset_files: [a.mindrecord, text.mindrecord]}",),
        "train_dataset.data_loader.dataset_files", "text.mindrecord",
    ),
    "no rows": (
        ("data_loader: {type: MindDataset, dataset_dir: none.mindrecord}",),
        "train_dataset.data_loader.dataset_dir", "none.mindrecord",
    ),
    "packing": ((LOADER, "seq_length: 32", "packing: True"), "train_dataset.packing",
                "eod_token_id"),
    "a key of another loader": (
        ("data_loader: {type: MindDataset, dataset_dir: a.mindrecord, text_column: x}",),
        "train_dataset.data_loader.text_column", "HFDataLoader",
    ),
    "its key at another loader": (
        ("data_loader: {type: TextDataLoader, dataset_dir: a.mindrecord, eod_token_id: 3}",),
        "train_dataset.data_loader.eod_token_id", "MindDataset",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKED)
def test_files_are_checked_with_the_configuration(name: str, data: Path) -> None:
    keys, key, text = CHECKED[name]
    resolved = read(*keys)
    assert not resolved.problems
    found = check(resolved.config, resolved.provenance, world=1)
    problems = [problem for problem in found if "dataset" in getattr(problem, "key", "")]
    assert {getattr(problem, "key", "") for problem in problems} == ({key} if key else set())
    assert not key or text in "\n".join(map(str, problems))
    assert not key or problems[0].where.startswith("x.yaml:")


def test_the_check_imports_nothing_heavy() -> None:
    code = (
        "import sys; import launcher.mindspore.mindrecord.checks; "
        "print([m for m in ('numpy', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
