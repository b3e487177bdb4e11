"""Forms of complete weights: how a program stores all tensors of a model in one directory.

Owns the form of Hugging Face, and the questions about all known forms. Others are entries of
`launcher.extensions.COMPLETE_FORMS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from launcher.extensions import COMPLETE_FORMS, installed
from launcher.layout.box import Shape

INDEX_NAME = "model.safetensors.index.json"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
INDEX_NAMES = COMPLETE_FORMS.keys()
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


def is_scalar(name: str, shape: Shape) -> bool:
    """Whether a tensor of a file is a number of the run, not a tensor of the model."""
    return name in scalar_names() and all(size == 1 for size in shape)


@cache
def _by_metadata() -> Mapping[str, CompleteForm]:
    return {form.metadata: form for form in _forms() if form.metadata}


def has_form(name: str, index: Path | None, metadata: Iterable[Mapping[str, str]]) -> bool:
    """Whether complete weights have the form `name`, by their index or the metadata of a file."""
    return any(
        (index is not None and index.name == form.index)
        or any(form.metadata and found.get("format") == form.metadata for found in metadata)
        for form in _forms() if form.name == name
    )  # fmt: skip


def form_of(metadata: Mapping[str, str]) -> CompleteForm:
    """The form of a file with this metadata; that of Hugging Face where it does not say."""
    return _by_metadata().get(metadata.get("format", ""), HUGGING_FACE)
