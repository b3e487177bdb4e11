"""The description of a model that an offline tool was given: a config.json, or a YAML file.

Torch-free, and without the rooms of a run: what reads YAML is an entry of
`launcher.extensions.MODEL_CONFIGS`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.extensions import MODEL_CONFIGS, required
from launcher.weights.formats.safetensors import parse_json
from launcher.weights.offline.slicing import copy_side_files

LARGEST = 1 << 24
NAME = "config.json"
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Described:
    """A model."""

    config: Mapping[str, Any]
    """Content of its config.json."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Keys in the file about the orders of rows in weights, see `foreign_names.KEYS`."""
    folder: Path | None = None
    """The folder of its config.json."""


def described(given: Path | None, *places: Path) -> Described | None:
    """The model of the file `given` (--config), or of the config.json in the first of `places` that
    has one; None without any. Raises `UserError` for a file that cannot be read."""
    if given is None:
        found = (place / NAME for place in places if (place / NAME).is_file())
        given = next(found, None)
        if given is None:
            return None
    path = given / NAME if given.is_dir() else given
    if path.suffix in (".yaml", ".yml"):
        config, keys = required(MODEL_CONFIGS, "yaml", f"--config {path}")(path)
        return Described(config, keys)
    return Described(_read(path), folder=path.parent)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        content = parse_json(path.read_bytes().decode())
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no config.json",
            rule=str(error)[:300],
            advice="Give the config.json of the model, its folder, or a YAML file",
        ) from error
    return content


def write_description(folder: Path, model: Described | None, dtype: str | None = None) -> None:
    """Put config.json and the tokenizer of a model beside its weights in `folder`. `dtype`: a
    safetensors name, of weights that were cast."""
    if model is None:
        return
    if model.folder is not None:
        copy_side_files(model.folder, folder)
    if dtype is None and (folder / NAME).is_file():
        return
    config = dict(model.config)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = _NAMES[dtype]
    (folder / NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
