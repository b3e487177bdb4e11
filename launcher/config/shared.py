"""Settings that must be equal on all processes of a job, although each machine reads its own YAML.

Paths may differ from machine to machine; whether a path is given may not. What only rank 0 does
(trackers, where predictions go) and the arguments of registered callbacks are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from launcher.config.schema import Config, RegisteredCallbackSection, info_of

_PATHS = re.compile(r"(^|_)(dir|directory|files?|paths?)(_|$)|^(load_checkpoint|input_data)$")
_OF_RANK_0 = frozenset({"save_file", "tensorboard", "trackers", "loss_monitor"})


def shared_settings(config: Config) -> dict[str, Any]:
    """Dotted key to value; of a path, whether it is given."""
    return dict(_flat(config, ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    name = key.rpartition(".")[2]
    if isinstance(value, RegisteredCallbackSection):
        yield key, value.type
    elif is_dataclass(value):
        for field in fields(value):
            if info_of(field).status != "no effect" and (key or field.name not in _OF_RANK_0):
                yield from _flat(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, list) and any(map(is_dataclass, value)):
        for index, item in enumerate(value):
            yield from _flat(item, f"{key}.{index}")
    elif isinstance(value, dict):
        for entry, item in value.items():
            yield from _flat(item, f"{key}.{entry}")
    elif _PATHS.search(name) and isinstance(value, str | list | None):
        yield f"{key} is given", bool(value)
    else:
        yield key, value
