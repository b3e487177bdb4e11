"""Forms of complete weights: how a program stores all tensors of a model in one directory.

Owns the form of Hugging Face, the index that maps each tensor to its file, and the questions about
all known forms. Others are entries of `launcher.extensions.COMPLETE_FORMS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from launcher.errors import UserError
from launcher.extensions import COMPLETE_FORMS, NAME_TRANSLATIONS, installed, required
from launcher.layout.box import Shape
from launcher.weights.formats.placeholders import placeholder
from launcher.weights.formats.safetensors import parse_json

INDEX_NAME = "model.safetensors.index.json"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
INDEX_NAMES = COMPLETE_FORMS.keys()
LARGEST_INDEX = 1 << 28
EXTRAS_NAME = "hyper_param.safetensors"
"""File beside complete weights with numbers of the run (step, epoch); the name is MindSpore's."""


@dataclass(frozen=True, kw_only=True)
class CompleteForm:
    """One form."""

    name: str
    index: str
    """File that maps each tensor to the file that holds it."""
    metadata: str
    """`format` in the metadata of its safetensors files."""
    also: tuple[str, ...] = ()
    """Further values of `format`: of files of the same program in another container."""
    indent: int = 2
    """Of the JSON of the index."""
    lists_optimizer: bool = False
    """Whether the index lists optimizer state too."""
    may_be_flat: bool = False
    """Whether the index may be the map itself, without the key `weight_map`."""
    transient: tuple[str, ...] = ()
    """Prefixes of tensors that are never read: buffers of a run."""
    scalars: frozenset[str] = frozenset()
    """Numbers of a run that lie beside the tensors of a model: step, epoch, loss scale."""
    steps: tuple[str, ...] = ()
    """Those of them that count steps, the preferred one first."""


HUGGING_FACE = CompleteForm(name="huggingface", index=INDEX_NAME, metadata="pt")
TORCH = CompleteForm(name="torch", index=TORCH_INDEX_NAME, metadata="")


@cache
def _forms() -> tuple[CompleteForm, ...]:
    return tuple(installed(COMPLETE_FORMS).values())


@cache
def scalar_names() -> frozenset[str]:
    """Names of the numbers of a run in the files of any form."""
    return frozenset[str]().union(*(form.scalars for form in _forms()))


@cache
def step_names() -> tuple[str, ...]:
    """Names of the step counters in the files of any form."""
    return tuple(name for form in _forms() for name in form.steps)


@cache
def _foreign() -> re.Pattern[str] | None:
    return re.compile("|".join(NAME_TRANSLATIONS)) if NAME_TRANSLATIONS else None


def may_be_foreign(names: Iterable[str]) -> bool:
    """Whether tensors may have names of another program, by a first look."""
    marks = _foreign()
    return marks is not None and any(map(marks.search, names))


def is_scalar(name: str, shape: Shape) -> bool:
    """Whether a tensor of a file is a number of the run, not a tensor of the model."""
    return name in scalar_names() and all(size == 1 for size in shape)


@cache
def _by_metadata() -> Mapping[str, CompleteForm]:
    return {value: form for form in _forms() for value in (form.metadata, *form.also) if value}


def has_form(name: str, index: Path | None, metadata: Iterable[Mapping[str, str]]) -> bool:
    """Whether complete weights have the form `name`, by their index or the metadata of a file."""
    return any(
        (index is not None and index.name == form.index)
        or any(form.metadata and found.get("format") == form.metadata for found in metadata)
        for form in _forms() if form.name == name
    )  # fmt: skip


def form_of(metadata: Mapping[str, str]) -> CompleteForm:
    """The form of a file with this metadata; that of Hugging Face by default."""
    return _by_metadata().get(metadata.get("format", ""), HUGGING_FACE)


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
    """Whether a name is a path of a file beside the index or below it."""
    path = PurePosixPath(name)
    is_plain = not path.is_absolute() and ".." not in path.parts and str(path) == name != "."
    return is_plain and all(len(part.encode()) < 256 for part in path.parts) and len(name) < 1024
