"""Weights of the base that PEFT copies into the files of an adapter without training them: the
head below an adapter of it, and embeddings (`save_embedding_layers`).

Owns their recognition: a tensor that is no part of the adapter and equal to the base. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.weights.adapters.tensors import numbers_of, words_of
from launcher.weights.reading.transfer import Files
from launcher.weights.source import Source
from launcher.weights.streaming.cast import CASTS
from launcher.weights.streaming.portion import PortionReader


def without_copies(adapter: Source, names: Collection[str]) -> Source:
    """`adapter` without the tensors `names`."""
    kept = {name: pieces for name, pieces in adapter.tensors.items() if name not in names}
    return replace(adapter, tensors=kept)


def check_copies(adapter: Source, base: Source | None, names: Collection[str]) -> None:
    """Check that the tensors `names` of `adapter` are those of `base`, rounded to their dtype.
    Raises `UserError`."""
    with Files() as files:
        for name in names:
            if base is None or not _is_copy(adapter, base, name, files):
                raise UserError(
                    f"it holds `{name}`, which is not in modules_to_save and differs from the base",
                    where=str(adapter.path),
                    rule="an adapter leaves weights of the base as they are, but for those in "
                    "modules_to_save: the base was changed before (tokens added, or other weights)",
                    advice="Give the base that the adapter was trained on, or merge the adapter "
                    "with PEFT (merge_and_unload), and load the complete weights",
                )


def _is_copy(adapter: Source, base: Source, name: str, files: Files) -> bool:
    """Whether the base has the same tensor; a head may be there as the embedding it is tied to."""
    shape, dtype = adapter.shape(name), adapter.dtype(name)
    same = [other for other in base.tensors if base.shape(other) == shape]
    candidates = [name] if name in base.tensors else same
    own = PortionReader(adapter, files).read(name, full_box(shape)).values
    for other in candidates:
        if other not in same or not {dtype, base.dtype(other)} <= {*CASTS}:
            continue
        words = PortionReader(base, files).read(other, full_box(shape)).values
        if np.array_equal(own, words_of(numbers_of(words, base.dtype(other)), dtype)):
            return True
    return False
