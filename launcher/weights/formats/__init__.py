"""File formats of weights, one module each; `header_of` reads the header of any of them.

Owns how a format is told: by the first bytes of a file, never by its name. A safetensors file
begins with the length of its header, which is below that of the file; the numbers that others begin
with, read as such a length, are above it.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import UserError
from launcher.weights.formats import safetensors, torch_pickle
from launcher.weights.formats.placeholders import refuse_placeholder
from launcher.weights.formats.safetensors import ZIP, Header

_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF"
_MINDSPORE = b"\x0a"
_MINDSPORE_ENCRYPTED = (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA)
_PICKLE = b"\x80"


def header_of(path: Path) -> Header:
    """What the file at `path` holds, whatever its format. Raises `UserError`, for a format that is
    known and not read too."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            start, file_bytes = os.read(descriptor, 8), os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(ZIP):
        return torch_pickle.read_header(path)
    if int.from_bytes(start, "little") > file_bytes:
        refuse_placeholder(path)
        _refuse_known(path, start)
    return safetensors.read_header(path)


def _refuse_known(path: Path, start: bytes) -> None:
    if int.from_bytes(start[:4], "little") in _MINDSPORE_ENCRYPTED:
        raise UserError(
            f"{path} is an encrypted file of MindSpore",
            rule="encrypted weights are not read",
            advice="Load it with mindspore.load_checkpoint(path, dec_key=...) and save it as "
            "safetensors",
        )
    if start.startswith(_MINDSPORE):
        raise UserError(
            f"{path} is a .ckpt file of MindSpore",
            rule="of .ckpt files those of torch are read",
            advice="Convert it with mindspore.ckpt_to_safetensors",
        )
    if start.startswith(_PICKLE):
        is_torch = start == _OLD_TORCH
        raise UserError(
            f"{path} was written by torch before version 1.6" if is_torch else
            f"{path} is a pickle that torch did not write",
            rule="files of torch are zip archives, from which tensors are read one by one",
            advice="Convert it: python -m launcher.tools.ckpt_to_safetensors"
            if is_torch else "Give weights as safetensors, or as torch.save writes them",
        )  # fmt: skip
