"""MultiSourceDataLoader of MindFormers: what a list of data loaders is made of."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.config.migrate import migrate
from launcher.config.resolve import Resolved, read_tree
from launcher.config.yaml_reader import read_text

SOURCES = """
    sub_data_loader:
      - {type: TextDataLoader, dataset_dir: a}
      - {type: HFDataLoader, dataset_files: b.jsonl, shuffle: True, num_samples: 7}
      - {type: InstructionDataLoader, dataset_files: c.jsonl}
"""


def read(more: str = "", section: str = "train_dataset") -> Resolved:
    lines = "".join(f"    {line}\n" for line in more.splitlines())
    text = f"{section}:\n  data_loader:\n    type: MultiSourceDataLoader"
    return read_tree(read_text(f"run_mode: train\ndo_eval: True\n{text}{SOURCES}{lines}", "x.yaml"))


def sources_of(resolved: Resolved, section: str = "train_dataset") -> list[Any]:
    assert not resolved.problems, resolved.problems
    found = getattr(resolved.config, section).data_loader
    assert isinstance(found, list)
    return found


CASES: dict[str, tuple[str, str, list[Any]]] = {
    "all of each": ("", "max_samples", [None, None, None]),
    "numbers": ("nums_per_dataset: [3, 4, 5]", "max_samples", [3, 4, 5]),
    "ratios": (
        "dataset_ratios: [0.5, 0.25, 0.25]\nsamples_count: 42",
        "max_samples", [21, 10, 10],
    ),
    "ratios win": (
        "dataset_ratios: [0.5, 0.3, 0.2]\nsamples_count: 10\nnums_per_dataset: [1, 1, 1]",
        "max_samples", [5, 3, 2],
    ),
    "files in their order": ("shuffle: files", "shuffle", [False, False, False]),
    "all shuffled": ("shuffle: global", "shuffle", [True, True, True]),
    "shuffled by default": ("shuffle: True", "shuffle", [True, True, True]),
    "arguments of all": (
        "sub_data_loader_args: {num_samples: 3, strict_fields: False}",
        "num_samples", [3, 3, 3],
    ),
    "further arguments win": (
        "sub_data_loader_args: {num_samples: 3}\nnum_samples: 5", "num_samples", [5, 5, 5],
    ),
    "without effect": (
        "shuffle_buffer_size: 3\ndata_source_type: random_access\nnum_shards: 2\nshard_id: 0",
        "is_shuffled", [True, True, True],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_arguments_become_keys_of_the_entries(case: str) -> None:
    more, key, expected = CASES[case]
    found = sources_of(read(more))
    assert [source.type for source in found] == [
        *("TextDataLoader", "HFDataLoader", "InstructionDataLoader")
    ]
    assert [getattr(source, key) for source in found] == expected
    assert all(source.weight is None for source in found)


def test_sources_have_handlers_and_subsets() -> None:
    """Those of HFDataLoader are translated in an entry as in a section."""
    text = """
run_mode: train
train_dataset:
  data_loader:
    type: MultiSourceDataLoader
    nums_per_dataset: [3, 4]
    sub_data_loader:
      - type: HFDataLoader
        path: data
        name: english
        handler:
          - {type: AlpacaInstructDataHandler, prompt_key: question}
          - {type: PackingHandler, pack_strategy: pack}
      - type: CommonDataLoader
        path: json
        data_files: b.jsonl
        handler: [{type: take, n: 5}]
"""
    resolved = read_tree(read_text(text, "x.yaml"))
    one, other = sources_of(resolved)
    assert (one.type, one.subset, one.name) == ("InstructionDataLoader", "english", "")
    assert (one.format, one.prompt_template) == ("alpaca", "mindformers_alpaca")
    assert one.column_map == {"instruction": "question"}
    assert other.transforms == [{"type": "take", "n": 5}]
    assert (one.shuffle, other.shuffle) == (True, True)
    assert (one.max_samples, other.max_samples) == (3, 4)
    assert resolved.config.train_dataset.packing


def test_a_name_in_a_list_of_this_launcher_is_the_name_of_the_source() -> None:
    text = "train_dataset: {data_loader: [{type: HFDataLoader, path: data, name: english}]}\n"
    (one,) = sources_of(read_tree(read_text(text, "x.yaml")))
    assert (one.name, one.subset) == ("english", "")


def test_a_source_without_samples_is_left_out() -> None:
    found = sources_of(read("nums_per_dataset: [3, 0, 5]"))
    assert [source.type for source in found] == ["TextDataLoader", "InstructionDataLoader"]
    (dropped,) = (c for c in read("nums_per_dataset: [3, 0, 5]").changes if c.kind == "no effect")
    assert dropped.key == "train_dataset.data_loader.sub_data_loader.1"


def test_an_evaluation_has_no_order() -> None:
    found = sources_of(read("shuffle: False", section="eval_dataset"), "eval_dataset")
    assert len(found) == 3


REFUSED = {
    "one after another": ("shuffle: False", "shuffle"),
    "files shuffled alone": ("shuffle: infile", "shuffle"),
    "an unknown shuffle": ("shuffle: some", "shuffle"),
    "indices to read": ("load_indices_npz_path: x.npz", "load_indices_npz_path"),
    "indices to write": ("save_indices_npz_path: x.npz", "save_indices_npz_path"),
    "too few numbers": ("nums_per_dataset: [1, 2]", "nums_per_dataset"),
    "broken numbers": ("nums_per_dataset: [1, 2, 0.5]", "nums_per_dataset"),
    "negative numbers": ("nums_per_dataset: [1, 2, -1]", "nums_per_dataset"),
    "no samples at all": ("nums_per_dataset: [0, 0, 0]", "nums_per_dataset"),
    "ratios of something else": (
        "dataset_ratios: [0.5, 0.5, 0.5]\nsamples_count: 9", "dataset_ratios"
    ),
    "ratios of nothing": ("dataset_ratios: [0.5, 0.25, 0.25]", "samples_count"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_something_else_is_refused_by_name(case: str) -> None:
    more, key = REFUSED[case]
    (problem,) = read(more).problems
    assert f"train_dataset.data_loader.{key}" in problem.what


def test_a_misspelled_argument_is_not_one_of_the_sources() -> None:
    (problem,) = read("nums_per_datset: [1, 2, 3]").problems
    assert "train_dataset.data_loader.nums_per_datset" in problem.what
    assert "`nums_per_dataset`" in problem.nearest


@pytest.mark.parametrize("sources", ["", "    sub_data_loader: []", "    sub_data_loader: [a]"])
def test_sources_are_a_list_of_sections(sources: str) -> None:
    text = f"train_dataset:\n  data_loader:\n    type: MultiSourceDataLoader\n{sources}\n"
    (problem,) = read_tree(read_text(text, "x.yaml")).problems
    assert "train_dataset.data_loader.sub_data_loader" in problem.what


def test_a_migrated_configuration_is_the_same() -> None:
    resolved = read("dataset_ratios: [0.5, 0.25, 0.25]\nsamples_count: 42\nshuffle: files")
    text = migrate(resolved, (), "x.yaml", {}).text
    assert "- type: TextDataLoader" in text
    assert "max_samples: 21  # replaced: train_dataset.data_loader.samples_count = 42" in text
    again = read_tree(read_text(text, "again.yaml"))
    assert sources_of(again) == sources_of(resolved)
    assert not again.changes


def test_every_key_is_accounted_for() -> None:
    resolved = read("nums_per_dataset: [3, 4, 5]\nshuffle: files\nshuffle_buffer_size: 3")
    changed = {change.key.rpartition(".")[2]: change.kind for change in resolved.changes}
    assert changed == {
        "type": "replaced", "nums_per_dataset": "replaced", "shuffle": "replaced",
        "shuffle_buffer_size": "no effect",
    }  # fmt: skip
    assert "train_dataset.data_loader.shuffle_buffer_size" in resolved.no_effect
