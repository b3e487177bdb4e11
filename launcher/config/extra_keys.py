"""Keys that are known and have no field in the configuration, and second names of keys.

Owns `EXTRA_KEYS`, `ALIASES` and `PLANNED_CALLBACKS`, filled from the tables that
`launcher.extensions` names; keys of a package that is not installed are unknown. An extra key is
checked like any other, then reported as without effect, or refused as not built yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher import extensions
from launcher.config.schema import FieldInfo
from launcher.extensions import installed

ANY_OTHER = "*"
"""The name for every other key of an open section."""


@dataclass(frozen=True, kw_only=True)
class ExtraKey:
    """The type and the classification of one such key."""

    annotation: Any
    info: FieldInfo


def _without_effect() -> Iterator[tuple[str, ExtraKey]]:
    choices = {path: values for table in installed(extensions.KEY_CHOICES).values()
               for path, values in table.items()}  # fmt: skip
    for table in installed(extensions.KEYS_WITHOUT_EFFECT).values():
        for section, reasons in table.items():
            for why, keys in reasons.items():
                for name, annotation in keys.items():
                    path = f"{section}.{name}".lstrip(".")
                    info = FieldInfo(status="no effect", why=why, choices=choices.get(path, ()))
                    yield path, ExtraKey(annotation=annotation, info=info)


def _not_built() -> Iterator[tuple[str, ExtraKey]]:
    for table in installed(extensions.KEYS_NOT_BUILT).values():
        for section, advices in table.items():
            for advice, rows in advices.items():
                for name, (annotation, *harmless) in rows.items():
                    info = FieldInfo(status="not built yet", why=advice, harmless=tuple(harmless))
                    path = f"{section}.{name}".lstrip(".")
                    yield path, ExtraKey(annotation=annotation, info=info)


EXTRA_KEYS: dict[str, ExtraKey] = dict([*_without_effect(), *_not_built()])
"""Dotted key to what is known about it; keys of callbacks as `callbacks[MFLossMonitor].name`."""
ALIASES: dict[str, str] = {
    alias: key
    for table in installed(extensions.KEY_ALIASES).values()
    for alias, key in table.items()
}
"""Second name of a key to the key; a section before its keys."""
PLANNED_CALLBACKS: tuple[str, ...] = tuple(
    name for names in installed(extensions.CALLBACKS_NOT_BUILT).values() for name in names
)
"""Types of callbacks that are known and not built yet."""

_SAME_KEYS = {
    "train_dataset.data_loader[]": "train_dataset.data_loader",
    "eval_dataset.data_loader[]": "train_dataset.data_loader",
    "train_dataset_task.dataset_config": "train_dataset",
    "eval_dataset_task.dataset_config": "train_dataset",
    "eval_datasets[].data_loader[]": "train_dataset.data_loader",
    "eval_datasets[]": "train_dataset",
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
