"""A configuration as a flat map, dotted key to JSON value: what a save keeps of it.

Owns which keys a later run compares: those that act, apart from `OF_ONE_START`. Lists of sections
and of maps are indexed (`callbacks.0.prefix`, as on the command line). Values of None are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from launcher.config.schema import (
    Config,
    IgnoredCallbackSection,
    RegisteredCallbackSection,
    info_of,
)

OF_ONE_START = (
    *("run_mode", "resume_training", "ignore_data_skip", "data_skip_steps", "only_save_strategy"),
    *("load_checkpoint", "load_ckpt_format", "auto_trans_ckpt", "use_parallel"),
    *("remove_redundancy", "src_strategy_path_or_dir", "balanced_load"),
    *("mindformers_qkv_order", "mindformers_mlp_order", "mindformers_tensor_parallel"),
    *("mindformers_use_gmm", "mindformers_rearranged_rope"),
    *("save_unified_checkpoint", "save_converted_checkpoint", "save_file", "output_dir"),
    *("tensorboard.tensorboard_dir", "callbacks.*.directory"),
    *("data_cache.*", "*dataset*.num_parallel_workers"),
)
"""Keys that may differ between two starts of one run."""


def flat(config: Config) -> dict[str, Any]:
    """Every value that is kept, by dotted key, in the order of the schema."""
    return {
        key: value
        for key, value in _section(config, "")
        if value is not None and not any(fnmatchcase(key, pattern) for pattern in OF_ONE_START)
    }


def _section(section: Any, path: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(section):
        info = info_of(field)
        if info.status != "effective":
            continue
        value = getattr(section, field.name)
        # Keys of an open section are at the same level as the typed ones.
        yield from _value(value, path if info.open_keys else _joined(path, field.name))


def _value(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, IgnoredCallbackSection):
        return
    if isinstance(value, RegisteredCallbackSection):
        value = {"type": value.type, **value.arguments}
    if dataclasses.is_dataclass(value):
        yield from _section(value, path)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _value(inner, _joined(path, str(key)))
    elif isinstance(value, list) and any(not _is_plain(item) for item in value):
        for index, item in enumerate(value):
            yield from _value(item, _joined(path, str(index)))
    else:
        yield path, value if _is_plain(value) or isinstance(value, list) else str(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
