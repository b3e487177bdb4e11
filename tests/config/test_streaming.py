"""Rules about streams: what they need, where they are refused, and which URLs are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config import rules
from launcher.config.resolve import resolve
from tests.config.workspace import RIGHT, build

STREAM = {
    "train_dataset.data_loader.type": "HFDataLoader",
    "train_dataset.data_loader.streaming": "True",
    "runner_config.max_steps": "10",
}
LOADER = "train_dataset.data_loader."
SECRET = "s3cr3t"
MIXTURE = "[{type: HFDataLoader, dataset_dir: corpus, streaming: True}, {dataset_dir: corpus}]"


@pytest.fixture(autouse=True)
def _in_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(build(tmp_path))


def problems(changes: dict[str, str | None], add: str = "", mode: str = "train") -> list[Any]:
    """What is wrong with the right configuration, made a stream, and with `changes`."""
    Path("x.yaml").write_text(RIGHT + add)
    words = [f"{key}={value}" for key, value in (STREAM | changes).items() if value is not None]
    result = resolve("x.yaml", mode, {}, words)
    rest = rules.check(result.config, result.provenance, world=1, bad_keys=result.bad_keys)
    return [*result.problems, *rest]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {LOADER + "type": "CommonDataLoader"},
        {LOADER + "type": "InstructionDataLoader", LOADER + "format": "alpaca"},
        {LOADER + "shuffle_buffer": "5", LOADER + "streaming_cache_gb": "0.5"},
        {LOADER + "dataset_dir": "s3://bucket/corpus/*.parquet"},
        {LOADER + "shuffle_buffer": "5", LOADER + "streaming": "False"},
        {LOADER + "size": "100", LOADER + "dataset_state_dir": "state"},
    ],
)
def test_streams_that_are_right(changes: dict[str, str | None]) -> None:
    assert problems(changes) == []


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"runner_config.max_steps": None}, "runner_config.max_steps", "streaming"),
        ({LOADER + "type": "TextDataLoader"}, LOADER + "streaming", "HFDataLoader"),
        ({LOADER + "streaming": None, LOADER + "shuffle_buffer": "7"},
         LOADER + "shuffle_buffer", "streaming: True"),
        ({LOADER + "streaming": None, LOADER + "dataset_dir": "http://host/a.jsonl"},
         LOADER + "dataset_dir", "streaming: True"),
        ({LOADER + "dataset_dir": f"'https://me:{SECRET}@host/a.jsonl?key={SECRET}'"},
         LOADER + "dataset_dir", "https://host/a.jsonl"),
        ({LOADER + "dataset_files": f"[corpus,'ftp://{SECRET}@host/a.jsonl']"},
         LOADER + "dataset_files", "ftp://host/a.jsonl"),
        ({LOADER + "dataset_dir": f"https://me:{SECRET}@host/a.jsonl?key={SECRET}"},
         LOADER + "dataset_dir", "https://host/a.jsonl"),  # not Hydra's grammar
        ({LOADER + "dataset_dir": f"'zip://a.jsonl::http://me:{SECRET}@host/a.zip'"},
         LOADER + "dataset_dir", "protocol"),
        ({LOADER + "transforms": "[{type: take, n: 5}]"}, LOADER + "transforms", "streaming"),
        ({LOADER + "split": "'train[:5]'"}, LOADER + "split", "streaming"),
        ({LOADER + "shuffle_buffer": "0"}, LOADER + "shuffle_buffer", "1"),
    ],
)  # fmt: skip
def test_streams_that_are_wrong(changes: dict[str, str | None], key: str, words: str) -> None:
    [problem] = problems(changes)
    assert key in str(problem)
    assert words in str(problem)
    assert SECRET not in str(problem)


@pytest.mark.parametrize("kind", ["MindDataset", "BlendedMegatronDatasetDataLoader"])
def test_credentials_are_in_no_message_of_other_loaders(kind: str) -> None:
    url = f"'https://me:{SECRET}@host/a?key={SECRET}'"
    changes = {LOADER + "type": kind, LOADER + "streaming": None, LOADER + "dataset_dir": url}
    found = problems(changes)
    assert found
    assert not any(SECRET in str(problem) for problem in found)


def test_an_evaluation_is_no_stream() -> None:
    add = "do_eval: True\neval_dataset:\n  data_loader:\n    type: HFDataLoader\n"
    add += "    dataset_dir: corpus\n    streaming: True\n"
    [problem] = problems({}, add)
    assert "eval_dataset.data_loader.streaming" in str(problem)
    assert "num_samples" in str(problem)


def test_a_source_of_a_mixture_is_no_stream() -> None:
    changes = dict.fromkeys(STREAM) | {"train_dataset.data_loader": MIXTURE}
    changes |= {"runner_config.max_steps": "10"}
    assert any("train_dataset.data_loader.0.streaming" in str(p) for p in problems(changes))
