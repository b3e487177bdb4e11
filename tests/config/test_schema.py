"""The schema documents itself, and its page is up to date."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from launcher.config.schema import SCHEDULE_ARGUMENTS, Config, LrScheduleSection, info_of
from launcher.config.suggest import nearest_key, schema_keys
from launcher.config.typing_rules import convert, hints
from launcher.tools import config_docs
from tests.config.interpreter import REPOSITORY

SECTIONS = {kind: path for path, kind in config_docs.sections()}


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_means(kind: type) -> None:
    docs = config_docs.field_docs(kind)
    for key in dataclasses.fields(kind):
        assert docs.get(key.name), f"{kind.__name__}.{key.name} has no docstring"


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_defaults_are_of_their_type_and_ask_for_nothing(kind: type) -> None:
    instance = kind()
    for key in dataclasses.fields(kind):
        info, value = info_of(key), getattr(instance, key.name)
        if dataclasses.is_dataclass(value) or key.name == "callbacks":
            continue
        converted = convert(hints(kind)[key.name], value)
        assert (converted, type(converted)) == (value, type(value))
        if info.choices and isinstance(value, str) and value:
            assert value in info.choices
        if info.status == "not built yet":
            assert value in info.harmless
        if info.status == "no effect":
            assert info.why, f"{kind.__name__}.{key.name}: say why it has no effect"


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_sections_are_frozen(kind: type) -> None:
    instance = kind()
    name = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(instance, name, None)


def test_schedule_arguments_are_fields() -> None:
    fields = set(LrScheduleSection.__dataclass_fields__)
    for arguments in SCHEDULE_ARGUMENTS.values():
        assert set(arguments) <= fields


def test_the_sections_of_the_original_are_there() -> None:
    for name in (
        *("trainer", "runner_config", "parallel_config", "parallel", "context", "model"),
        *("processor", "optimizer", "lr_schedule", "runner_wrapper", "train_dataset"),
        *("train_dataset_task", "eval_dataset", "callbacks", "recompute_config", "swap_config"),
        *("moe_config", "monitor_config", "tensorboard", "generation_config"),
    ):
        assert name in Config.__dataclass_fields__


@pytest.mark.parametrize(
    ("written", "section", "expected"),
    [
        ("lr", "optimizer", "optimizer.learning_rate"),
        ("learning_rte", "", "lr_schedule.learning_rate"),
        ("warmup_ratio", "optimizer", "lr_schedule.warmup_ratio"),
        ("tp", "parallel_config", "parallel_config.model_parallel"),
        ("save_checkpoint_steps", "", "callbacks[CheckpointMonitor].save_checkpoint_steps"),
        ("seq_length", "model", "train_dataset.seq_length"),
        ("xyzzy", "", ""),
    ],
)
def test_the_nearest_key_is_searched_everywhere(written: str, section: str, expected: str) -> None:
    assert nearest_key(written, section) == expected


def test_every_key_suggests_itself_when_one_letter_is_lost() -> None:
    """In its own section a key with a letter dropped is always recognised."""
    for key in schema_keys():
        if len(key.name) < 6:
            continue
        broken = key.name[: len(key.name) // 2] + key.name[len(key.name) // 2 + 1 :]
        found = nearest_key(broken, key.section)
        assert found == key.path or found.rpartition(".")[2] == broken, (broken, found)


def test_the_page_is_up_to_date() -> None:
    written = config_docs.PAGE.read_text(encoding="utf-8")
    assert written == config_docs.render(), "run: python -m launcher.tools.config_docs"


def test_the_page_lists_every_key() -> None:
    page = config_docs.render()
    for key in schema_keys():
        assert f"| `{key.name}` |" in page
    for line in page.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 6), line


def test_the_schema_is_a_leaf() -> None:
    code = (
        "import sys, launcher.config.schema; "
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('torch', 'numpy', 'yaml', 'hydra', 'omegaconf', 'models') "
        "or m.startswith('launcher.') and 'config' not in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_needs_neither_schema_nor_yaml() -> None:
    code = (
        "import sys; from launcher import cli; cli.main(['--help']); "
        "print([m for m in sys.modules if m in ('torch', 'yaml', 'omegaconf', 'hydra') "
        "or 'schema' in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
