"""File formats of weights, one module each; `header_of` reads the header of any of them."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from launcher.errors import UserError
from launcher.weights.formats.safetensors import Header, read_header

_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF"
_MINDSPORE = b"\x0a"


def header_of(path: Path) -> Header:
    """What the file at `path` holds, whatever its format, which is told by its first bytes and not
    by its name. Raises `UserError`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            start, file_bytes = os.read(descriptor, 8), os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(_ZIP):
        # By name: rooms that must not know torch read headers too, those of safetensors.
        header: Header = import_module(f"{__name__}.torch_pickle").read_header(path)
        return header
    if start == _OLD_TORCH:
        raise UserError(
            f"{path} was written by torch before version 1.6",
            rule="in that format tensors cannot be read one by one",
            advice="Convert it: python -m launcher.tools.ckpt_to_safetensors",
        )
    if start.startswith(_MINDSPORE) and int.from_bytes(start, "little") > file_bytes:
        raise UserError(
            f"{path} is a .ckpt file of MindSpore",
            rule="of .ckpt files those of torch are read",
            advice="Convert it with mindspore.ckpt_to_safetensors",
        )
    return read_header(path)
