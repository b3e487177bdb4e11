"""Keys that are known and have no field in the configuration, and second names of keys.

Owns the two dicts through which other rooms add keys: `EXTRA_KEYS` and `ALIASES`. Both are filled
from launcher.mindspore; without that room these keys are unknown. An extra key is checked like any
other, then reported as without effect, or refused as not built yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.config.schema import FieldInfo

ANY_OTHER = "*"
"""The name that stands for every other key of an open section."""


@dataclass(frozen=True, kw_only=True)
class ExtraKey:
    """The type and the classification of one such key."""

    annotation: Any
    info: FieldInfo


def _mindspore_keys() -> Iterator[tuple[str, ExtraKey]]:
    try:
        from launcher.mindspore.keys_not_built import KEYS_NOT_BUILT
        from launcher.mindspore.keys_without_effect import CHOICES, KEYS_WITHOUT_EFFECT
    except ImportError:
        return
    for section, reasons in KEYS_WITHOUT_EFFECT.items():
        for why, keys in reasons.items():
            for name, annotation in keys.items():
                path = f"{section}.{name}".lstrip(".")
                info = FieldInfo(status="no effect", why=why, choices=CHOICES.get(path, ()))
                yield path, ExtraKey(annotation=annotation, info=info)
    for section, advices in KEYS_NOT_BUILT.items():
        for advice, rows in advices.items():
            for name, (annotation, *harmless) in rows.items():
                info = FieldInfo(status="not built yet", why=advice, harmless=tuple(harmless))
                yield f"{section}.{name}".lstrip("."), ExtraKey(annotation=annotation, info=info)


def _mindspore_aliases() -> dict[str, str]:
    try:
        from launcher.mindspore.key_aliases import ALIASES as mindspore_aliases
    except ImportError:
        return {}
    return mindspore_aliases


EXTRA_KEYS: dict[str, ExtraKey] = dict(_mindspore_keys())
"""Dotted key to what is known about it; keys of callbacks as `callbacks[MFLossMonitor].name`."""
ALIASES: dict[str, str] = _mindspore_aliases()
"""Second name of a key to the key; a section before its keys."""

_SAME_KEYS = {
    "train_dataset_task.dataset_config": "train_dataset",
    "eval_dataset_task.dataset_config": "train_dataset",
    "eval_dataset_task": "train_dataset_task",
    "eval_dataset": "train_dataset",
}
"""Sections that have the same keys as another one."""
EXTRA_SECTIONS = dict.fromkeys(path.rpartition(".")[0] for path in EXTRA_KEYS if "." in path)
"""The sections with extra keys, in order."""


def _table_name(section: str) -> str:
    for same, name in _SAME_KEYS.items():
        if section == same or section.startswith(f"{same}."):
            return name + section[len(same) :]
    return section


def extra_key(section: str, name: str) -> ExtraKey | None:
    """The extra key `name` of a section, None where there is none."""
    table = f"{_table_name(section)}."
    return EXTRA_KEYS.get(f"{table}{name}".lstrip(".")) or EXTRA_KEYS.get(f"{table}{ANY_OTHER}")


def is_extra_section(section: str) -> bool:
    """Whether a section has extra keys, perhaps beside keys of the schema."""
    return _table_name(section) in EXTRA_SECTIONS


def extra_names(section: str) -> list[str]:
    """The names of the extra keys of a section, `*` included."""
    prefix = f"{_table_name(section)}.".lstrip(".")
    paths = (path for path in EXTRA_KEYS if path.startswith(prefix))
    return [name for path in paths if "." not in (name := path[len(prefix) :])]
