"""What is written in a configuration that is being translated.

Owns how a value is read there: texts of the command line are parsed, and a number counts as one
only where it is one. Pure; the other files of this package change the draft.
"""

from __future__ import annotations

from typing import Any

from launcher.config.draft import Draft, asks_for_nothing
from launcher.config.key_checks import plain_value
from launcher.config.nodes import without
from launcher.environment import process_environment
from launcher.errors import UserError

DEGREES = ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel")
"""The keys of parallel_config whose product is the number of processes."""


def written(draft: Draft, key: str, default: Any = None) -> Any:
    """The plain value at a dotted key; `default` where nothing or null is written."""
    node = draft.find(key)
    value = None if node is None else plain_value(node)
    return default if value is None else value


def word(draft: Draft, key: str, default: str = "") -> str:
    """The text at a dotted key; `default` where something else or nothing is written."""
    value = written(draft, key)
    return value if isinstance(value, str) else default


def names(draft: Draft, section: str) -> list[str]:
    """The keys of a section, none where it is no section."""
    node = draft.find(section)
    return list(node.value) if node is not None and isinstance(node.value, dict) else []


def count(draft: Draft, key: str, default: int) -> int:
    """The integer at a dotted key; `default` where something else or nothing is written."""
    value = written(draft, key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int else default


def is_on(draft: Draft, key: str, default: bool = False) -> bool:
    """Whether a switch is on."""
    value = written(draft, key, default)
    return str(value).lower() == "true"


_MARKS = (
    *("use_legacy", "model.arch", "runner_wrapper.type", "parallel.parallel_mode"),
    "trainer.model_name",
)
"""Keys that only a configuration of MindFormers has."""


def is_of_mindformers(draft: Draft) -> bool:
    """Whether a configuration was written for MindFormers, judged by keys without effect here."""
    return any(draft.find(key) is not None for key in _MARKS)


def mode(draft: Draft) -> str:
    """The run mode, `resume` and `predict_with_train_model` as what they mean."""
    value = str(written(draft, "run_mode", ""))
    return {"resume": "train", "predict_with_train_model": "predict"}.get(value, value)


def trains(draft: Draft) -> bool:
    """Whether the run trains, as far as a mode is given."""
    return mode(draft) in ("train", "finetune")


def processes() -> int | None:
    """Processes of this run or of the one that msrun.sh is about to start; None before a start."""
    try:
        environment = process_environment()
    except UserError:
        return None  # reported when the configuration is checked
    if environment.is_launched:
        return environment.world_size
    return environment.planned_world_size


def move_keys(draft: Draft, section: str, new: str, why: str = "") -> None:
    """Rename every key of `section` to the same key of `new`."""
    for name in names(draft, section):
        draft.rename(f"{section}.{name}", f"{new}.{name}", why)
    prune(draft, section)


def prune(draft: Draft, section: str) -> None:
    """Remove a section whose keys were all taken away, or that has none."""
    node = draft.find(section)
    if node is not None and node.value in ({}, None):
        draft.tree = without(draft.tree, section)


def refuse(draft: Draft, key: str, rule: str, *, nearest: str = "", advice: str = "") -> None:
    """Add a problem with a key that is not known here, and take the key away, so that it has one
    problem only."""
    draft.refuse(key, rule, nearest=nearest, advice=advice)
    draft.tree = without(draft.tree, key)


def off_or_refused(draft: Draft, key: str, what: str) -> None:
    """A key that is known and not built: dropped where it asks for nothing, else refused."""
    if draft.find(key) is None:
        return
    if asks_for_nothing(written(draft, key)):
        draft.drop(key, "it is off")
    else:
        refuse(draft, key, f"{what}: not built yet", advice="Remove it")
