"""The schema documents itself, and its page is up to date."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from launcher.config.extra_keys import EXTRA_KEYS
from launcher.config.schema import SCHEDULE_ARGUMENTS, LrScheduleSection, info_of
from launcher.config.suggest import nearest_key, schema_keys
from launcher.config.typing_rules import convert, hints
from launcher.tools import config_docs
from tests.config.interpreter import REPOSITORY
from tests.config.workspace import build

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


def test_the_sections_of_mindformers_are_known() -> None:
    known = {key.path for key in schema_keys()}
    for name in (
        *("trainer", "runner_config", "parallel_config", "parallel", "context", "model"),
        *("processor", "optimizer", "lr_schedule", "runner_wrapper", "train_dataset"),
        *("train_dataset_task", "eval_dataset", "callbacks", "recompute_config", "swap_config"),
        *("moe_config", "monitor_config", "tensorboard", "generation_config"),
    ):
        assert name in known


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
    broken = {
        key: key.name[: len(key.name) // 2] + key.name[len(key.name) // 2 + 1 :]
        for key in schema_keys() if len(key.name) >= 6
    }  # fmt: skip
    ambiguous = Counter((key.section, name) for key, name in broken.items())
    for key, name in broken.items():
        found = nearest_key(name, key.section)
        if ambiguous[key.section, name] == 1:  # lora_a_init and lora_b_init lose the same
            assert found == key.path or found.rpartition(".")[2] == name, (name, found)


PAGES = {config_docs.PAGE: config_docs.render, config_docs.OTHER_PAGE: config_docs.render_others}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_pages_are_up_to_date(page: Path) -> None:
    written = page.read_text(encoding="utf-8")
    assert written == PAGES[page](), "run: python -m launcher.tools.config_docs"


def test_the_pages_list_every_key() -> None:
    acting, other = config_docs.render(), config_docs.render_others()
    for key in schema_keys():
        is_section = any(inner.section == key.path for inner in schema_keys())
        page = acting if key.acts else other
        assert f"| `{key.name}` |" in page or (is_section and f"## `{key.path}`" in other), key
    for line in (acting + other).splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4, 5), line


def test_extra_keys_are_checked_as_declared() -> None:
    for path, key in EXTRA_KEYS.items():
        assert key.info.why, path
        assert path not in {known.path for known in schema_keys() if known.acts}
        for harmless in key.info.harmless:
            assert convert(key.annotation, harmless) == harmless, path


def test_without_the_room_of_mindspore_its_keys_are_unknown(tmp_path: Path) -> None:
    """Ordinary keys work, and other spellings and keys without effect are unknown keys."""
    build(tmp_path)
    words = ["context.max_device_memory=1GB", "generation.top_k=3", "optimizer.eps=1e-6"]
    code = (
        "import sys; sys.modules['launcher.mindspore'] = None; "
        "from launcher.config.resolve import resolve; "
        f"found = resolve('right.yaml', 'train', {{}}, {words}); "
        "print(found.config.optimizer.eps); "
        "print(*[problem.what for problem in found.problems], sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "1e-06",
        "unknown key `train_dataset_task.type`",
        "unknown key `context.max_device_memory`",
        "unknown key `generation`",
    ]


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


def test_a_check_imports_nothing_heavy(workspace: Path) -> None:
    code = (
        "import sys; from launcher import cli; "
        "cli.main(['--config', 'right.yaml', '--run_mode', 'train', '--check_config']); "
        "print([m for m in ('torch', 'numpy', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
