"""Files of torch (`.pt`, `.bin`, `.ckpt`): where each tensor lies in the zip archive.

Owns the way from a pickle to offsets. Nothing in it is executed: torch reads it, `weights_only`,
and no tensor is loaded, only where its storage lies.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from launcher.errors import UserError
from launcher.weights.formats.safetensors import Entry, Header


def read_header(path: Path) -> Header:
    """The tensors of the torch file at `path`, as entries with strides. Raises `UserError`."""
    try:
        with FakeTensorMode():
            content: Any = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    from launcher.weights.memory import DTYPE_NAMES

    entries = {}
    for name, tensor in content.items():
        storage = tensor.untyped_storage()
        item = tensor.element_size()
        start = storage._checkpoint_offset + tensor.storage_offset() * item
        entries[name] = Entry(
            DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), start,
            start + tensor.numel() * item, tuple(tensor.stride()),
        )  # fmt: skip
    return Header(entries, {}, 0, os.stat(path).st_size, "")
