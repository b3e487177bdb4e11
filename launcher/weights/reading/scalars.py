"""Scalars: numbers of a run (step, epoch, loss scale) that lie in files of weights."""

from __future__ import annotations

import torch

from launcher.layout.box import full_box
from launcher.weights.pieces import Pieces
from launcher.weights.reading.plan import plan_box
from launcher.weights.reading.read import Fill, fill
from launcher.weights.reading.tensor_bytes import TORCH_DTYPES
from launcher.weights.source import Source


def scalars_of(source: Source) -> dict[str, float]:
    """The extras of `source` that are a single number, by name."""
    return {
        name: _number(source, name, pieces)
        for name, pieces in sorted(source.extras.items())
        if full_box(pieces[0].shape).numel == 1
    }


def _number(source: Source, name: str, pieces: Pieces) -> float:
    box = full_box(pieces[0].shape)
    tensor = torch.empty(box.size, dtype=TORCH_DTYPES[pieces[0].entry.dtype])
    fill([Fill(tensor, box, plan_box(name, box, pieces))], source)
    value: float = tensor.item()
    return value
