"""Rules about records: formats, hub names, splits, columns, steps; each problem at its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config import rules
from launcher.config.printing import to_yaml
from launcher.config.resolve import resolve
from tests.config.workspace import RIGHT

OLD = "    type: TextDataLoader\n    dataset_dir: corpus\n"


def found(loader: str, more: str = "", mode: str = "train", **flags: Any) -> list[str]:
    """Everything wrong with the right configuration that has this data loader."""
    new = "".join(f"    {line}\n" for line in loader.splitlines())
    Path("x.yaml").write_text(RIGHT.replace(OLD, new) + more)
    result = resolve("x.yaml", mode, flags, ())
    rest = rules.check(result.config, result.provenance, world=1, bad_keys=result.bad_keys)
    return [str(problem) for problem in (*result.problems, *rest)]


@pytest.fixture
def data(workspace: Path) -> Path:
    for name in ("d/zh/a.jsonl", "d/train.csv", "saved/state.json", "saved/dataset_info.json"):
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    return workspace


HF = "type: HFDataLoader\n"
CHAT = "type: InstructionDataLoader\ndataset_files: d/zh\n"
RIGHT_ONES = [
    f"{HF}path: json\ndata_files: d/zh/*.jsonl\nsplit: 'train[:10%]'",
    f"{HF}path: d\nsubset: zh\ndata_files: a.jsonl",
    f"{HF}path: csv\ndata_dir: d",
    f"{HF}path: csv\ndata_dir: d\ndelimiter: '\t'\nsplit: 'train[:50%]+train[-3:]'",
    f"{HF}path: d\ndata_files: {{train: train.csv, test: [zh/a.jsonl]}}\nsplit: train+test",
    f"{HF}path: saved\nload_func: load_from_disk\ncolumn_map: {{text: body}}",
    f"{HF}path: d\ntext_column: body\ntransforms: [{{type: shuffle}}, {{type: take, n: 3}}]",
    f"{CHAT}column_map: {{instruction: q, output: a, system: s}}",
    f"{CHAT}format: alpaca\nprompt_template: mindformers_alpaca",
    f"{CHAT}format: sharegpt\ncolumn_map: {{conversations: talk}}",
]


@pytest.mark.parametrize("loader", RIGHT_ONES)
def test_what_is_right(loader: str, data: Path) -> None:
    assert found(loader) == []


@pytest.mark.parametrize("loader", RIGHT_ONES)
def test_what_is_printed_is_the_same_configuration(loader: str, data: Path) -> None:
    assert not found(loader)
    first = resolve("x.yaml", "train", {}, ())
    Path("y.yaml").write_text(to_yaml(first.config, first.provenance))
    second = resolve("y.yaml", "train", {}, ())
    assert not second.problems
    assert second.config == first.config


P = "train_dataset.data_loader"
WRONG: list[tuple[str, list[str]]] = [
    (f"{HF}path: someone/data", [f"{P}.path = 'someone/data'", "hf download --repo-type dataset "
                                 "someone/data --local-dir data", "nothing is downloaded"]),
    (f"{HF}path: jsn", [f"{P}.path = 'jsn'", "did you mean `json`?"]),
    (f"{HF}path: d/zhs", [f"{P}.path = 'd/zhs'", "did you mean `d/zh`?"]),
    (f"{HF}path: json", [f"{P}", "has no files"]),
    (f"{HF}path: json\ndata_files: d/b.jsonl", [f"{P}.data_files = 'd/b.jsonl'", "no such file"]),
    (f"{HF}path: d\ndata_files: b/*.csv", [f"{P}.data_files = 'd/b/*.csv'", "pattern"]),
    (f"{HF}path: d\nsubset: zhh", [f"{P}.subset = 'd/zhh'", "did you mean `d/zh`?"]),
    (f"{HF}subset: zh\ndataset_dir: d", [f"{P}.subset", "below path"]),
    (f"{HF}path: d\ndataset_dir: d", [f"{P}.dataset_dir", "Remove one of the two"]),
    (f"{HF}path: d\nload_func: load_from_disk", [f"{P}.load_func", "Nearest: load_dataset"]),
    (f"{HF}path: json\ndata_dir: d\nload_func: load_from_disk", [f"{P}.load_func", "save_to_disk"]),
    (f"{HF}path: d\ndelimiter: tab", [f"{P}.delimiter = 'tab'", r'Nearest: "\t"']),
    (f"{HF}path: d\ndelimiter: ';;'", [f"{P}.delimiter = ';;'", 'Nearest: ";"']),
    (f"{HF}path: d\nsplit: 'train[1-3]'", [f"{P}.split", "did you mean `train[1:3]`?"]),
    (f"{HF}path: d\nsplit: 'train[:120%]'", [f"{P}.split", "Nearest: 100%"]),
    (f"{HF}path: d\nsplit: tset\ndata_files: {{train: train.csv, test: train.csv}}",
     [f"{P}.split = 'tset'", "did you mean `test`?"]),
    (f"{HF}path: d\ndata_files: {{train: 3}}", [f"{P}.data_files.train = 3", "a file, a glob"]),
    (f"{HF}path: d\ncolumn_map: {{body: text}}", [f"{P}.column_map.body", "`text: body`"]),
    (f"{CHAT}column_map: {{d.q: instruction}}", [f"{P}.column_map.d.q", "`instruction: d.q`"]),
    (f"{CHAT}transforms: [{{type: take, n: 1, a.b: 2}}]", [f"{P}.transforms.0.a.b = 2"]),
    (f"{HF}path: d\ndata_files: {{train: train.csv, a.b: 3}}", [f"{P}.data_files.a.b = 3"]),
    (f"{HF}path: d\ncolumn_map: {{text: 3}}", [f"{P}.column_map.text = 3", "name of a column"]),
    (f"{HF}path: d\ntext_column: a\ncolumn_map: {{text: b}}", [f"{P}.text_column = 'a'"]),
    (f"{CHAT}column_map: {{response: answer}}", [f"{P}.column_map.response", "`output`"]),
    (f"{CHAT}column_map: {{instructon: q}}", [f"{P}.column_map.instructon", "`instruction`"]),
    (f"{CHAT}format: messages\ncolumn_map: {{output: q}}", [f"{P}.column_map.output", "messages"]),
    (f"{CHAT}transforms: [{{type: tak, n: 1}}]", [f"{P}.transforms.0.type", "`take`"]),
    (f"{CHAT}transforms:\n  - {{type: take, n: 1}}\n  - {{type: take, n: x}}",
     ["x.yaml:25", f"{P}.transforms.1.n = 'x'"]),
    (f"{CHAT}transforms: [{{type: map}}]", [f"{P}.transforms.0.type", "script"]),
    (f"{CHAT}format: sharegpt\nprompt_template: mindformers_alpaca", [f"{P}.format", "alpaca"]),
    (f"{CHAT}prompt_template: alpaca", [f"{P}.prompt_template", "did you mean"]),
    ("type: TextDataLoader\ndataset_dir: corpus\ncolumn_map: {text: a}", [f"{P}.column_map"]),
    (f"{HF}path: d\ncolumns: {{prompt: a}}", [f"{P}.columns", "column"]),
]  # fmt: skip


@pytest.mark.parametrize(("loader", "words"), WRONG)
def test_what_is_wrong(loader: str, words: list[str], data: Path) -> None:
    problems = found(loader)
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0]


def test_a_strategy_without_packing(data: Path) -> None:
    (problem,) = found("type: TextDataLoader\ndataset_dir: corpus", "eval_dataset: "
                       "{packing_strategy: first_fit, data_loader: {dataset_dir: corpus}}\n"
                       "do_eval: True\n")  # fmt: skip
    assert "eval_dataset.packing_strategy = 'first_fit'" in problem


def test_data_that_are_not_read_are_not_checked(data: Path) -> None:
    assert not [problem for problem in found(f"{HF}path: a/b", mode="eval") if "a/b" in problem]
