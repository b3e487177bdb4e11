"""--print_config: valid YAML, the origin of every value, and the same configuration again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import cli
from launcher.config.printing import flow, text_scalar, to_yaml
from launcher.config.resolve import Resolved, resolve
from launcher.config.yaml_reader import read_text
from models.keys import GENERATION, every_key
from tests.config.test_resolve import resolved

RICH = """\
seed: 3
register_path: user_callbacks.py
context: {mode: 0, ascend_config: {precision_mode: must_keep}, odd: [1, {a: b}]}
model:
  model_config:
    type: Qwen3Config
    "a key: with colon": 1
    rope_scaling: {rope_type: yarn, factor: 2.0, list: [[1, 2], [3]]}
    empty: {}
    nothing: []
    "yes": "no"
optimizer: {eps: 1e-4, betas: [0.8, 0.9]}
train_dataset: &t
  data_loader: {dataset_files: [a.txt, "b c.txt"], suffixes: [.py]}
  num_parallel_workers: 4
train_dataset_task: {dataset_config: *t}
runner_config: {stop_step: 7, max_steps: 9}
generation: {eos_token_id: [1, 2]}
input_data: ["say \\"hi\\"", "two\\nlines", "ümläut 日本 # no comment"]
callbacks:
  - {type: CheckpointMonitor, prefix: "a: b", async_save: False}
  - {type: Mine, deep: {x: [1, {y: null}]}, text: "# hash"}
  - {type: ObsMonitor, step: 3}
trackers: [wandb]
"""


def again(result: Resolved) -> Resolved:
    """The configuration of the printed text, in which the same keys are written."""
    Path("printed.yaml").write_text(to_yaml(result.config, result.provenance), encoding="utf-8")
    back = resolve("printed.yaml")
    assert not back.problems, "\n".join(map(str, back.problems))
    assert back.provenance.places.keys() <= result.provenance.places.keys()
    return back


@pytest.mark.parametrize("text", ["", RICH])
@pytest.mark.parametrize("mode", ["train", "resume", "predict"])
def test_the_printed_configuration_is_the_same(workspace: Path, text: str, mode: str) -> None:
    result = resolved(text, run_mode=mode)
    back = again(result)
    assert back.config == result.config
    assert again(back).config == result.config
    assert back.no_effect == result.no_effect


def test_the_right_configuration_survives(workspace: Path) -> None:
    result = resolve("right.yaml", "train", {"epochs": 3}, ["callbacks.1.prefix=x"])
    assert again(result).config == result.config


def test_a_default_that_was_edited_is_written(workspace: Path) -> None:
    result = resolved("runner_config: {max_steps: 9}")
    assert not again(result).provenance.is_written("generation_config.max_length")
    printed = Path("printed.yaml")
    text = printed.read_text().replace("max_length: 20", "max_length: 50")
    printed.write_text(text.replace("  epochs: 1  # default", "  epochs: 1"))
    back = resolve("printed.yaml")
    assert back.config.generation_config.max_length == 50
    for key in ("generation_config.max_length", "runner_config.epochs"):
        assert back.provenance.where(key).startswith("printed.yaml:"), key
    assert not back.provenance.is_written("generation_config.top_k")


def test_every_line_says_where_its_value_came_from(workspace: Path) -> None:
    text = to_yaml(*_parts(resolved(RICH, "optimizer.eps=0.5", batch_size=2)))
    for line in text.splitlines()[1:]:
        assert "  # " in line, line
    assert "seed: 3  # x.yaml:1\n" in text
    assert "  eps: 0.5  # command line: optimizer.eps=0.5\n" in text
    assert "  batch_size: 2  # command line: --batch_size\n" in text
    assert "  epochs: 1  # default\n" in text
    assert "  betas: [0.8, 0.9]  # x.yaml:12\n" in text
    assert "\n  num_parallel_workers: 4  # x.yaml:15\n" in text


def _parts(result: Resolved) -> tuple[Any, Any]:
    return result.config, result.provenance


def test_any_yaml_reader_reads_the_same_values(workspace: Path) -> None:
    text = to_yaml(*_parts(resolved(RICH)))
    assert yaml.safe_load(text) == read_text(text, "x").plain()


def test_trust_stays_a_comment(workspace: Path) -> None:
    result = resolved("", "--trust_remote_code", "true")
    text = to_yaml(result.config, result.provenance)
    assert "# trust_remote_code: true  # command line: --trust_remote_code" in text
    assert yaml.safe_load(text).get("trust_remote_code") is None


def test_the_command(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config", "right.yaml", "--run_mode", "train", "--print_config"]
    assert cli.main(argv) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert cli.main(["--config", "printed.yaml", "--check_config"]) == 0
    assert resolve("printed.yaml").config == resolve("right.yaml", "train").config


def test_a_wrong_configuration_is_not_printed(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--config", "right.yaml", "--print_config", "--epohcs", "3"]) == 2
    assert capsys.readouterr().out == ""


texts = st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(text=texts)
def test_any_text_survives(text: str) -> None:
    assert read_text(f"k: {text_scalar(text)}  # c", "x").plain() == {"k": text}


@given(value=values)
def test_any_value_survives(value: Any) -> None:
    assert read_text(f"k: {flow(value)}  # c", "x").plain() == {"k": value}


def test_numbers_that_are_none() -> None:
    assert math.isnan(read_text(f"k: {flow(math.nan)}", "x").plain()["k"])
    assert read_text(f"k: {flow(-math.inf)}", "x").plain() == {"k": -math.inf}


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(section=st.dictionaries(texts.filter(bool), values, max_size=4))
def test_any_open_map_survives(workspace: Path, section: dict[str, Any]) -> None:
    # Known keys have types of their own, and hypothesis tries words that it finds in the code.
    skipped = {"type", "<<", *GENERATION, *every_key()}
    lines = "".join(
        f"    {text_scalar(key)}: {flow(value)}\n"
        for key, value in section.items()
        if key not in skipped
    )
    result = resolved(f"model:\n  model_config:\n    type: Qwen3Config\n{lines}")
    assert again(result).config == result.config
