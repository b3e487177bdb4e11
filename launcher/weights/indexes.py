"""Indexes: the JSON file beside several files of weights that maps each tensor to its file."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import UserError
from launcher.extensions import COMPLETE_FORMS, required
from launcher.weights.formats.placeholders import placeholder
from launcher.weights.formats.safetensors import parse_json
from launcher.weights.forms import CompleteForm

LARGEST_INDEX = 1 << 28


def read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name. Raises `UserError`."""
    form: CompleteForm = required(COMPLETE_FORMS, index.name, f"{index} is an index of weights")
    try:
        if index.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX >> 20} MiB")
        content: Any = parse_json(index.read_bytes().decode())
        if form.may_be_flat and "weight_map" not in content:
            content = {"weight_map": content}
        weight_map = content["weight_map"]
        named = set[str]()
        for name, file in weight_map.items():
            if not isinstance(file, str) or not (file in named or _is_beside(file)):
                raise ValueError(f"`{name}` is in {file!r}, which is not a file beside or below it")
            named.add(file)
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if found := placeholder(index, is_text=True):
            raise UserError(found) from error
        why = str(error)[:300] if isinstance(error, ValueError) else type(error).__name__
        raise UserError(
            f"{index} is not an index of weights",
            rule=f"it needs a map named `weight_map` from tensor to file ({why})",
            advice="Copy it again from its origin",
        ) from error
    return dict(weight_map)


def _is_beside(name: str) -> bool:
    """Whether a name is that of a file beside an index, or in a folder beside it."""
    path = PurePosixPath(name)
    is_plain = not path.is_absolute() and ".." not in path.parts and str(path) == name != "."
    return is_plain and all(len(part.encode()) < 256 for part in path.parts) and len(name) < 1024
