"""File formats of weights, one module each; `header_of` reads the header of any of them.

Owns how the format of a file is detected: by its first bytes, never by its name. A safetensors file
begins with the length of its header, which is smaller than the file. The signatures of other
formats, read as such a length, are larger.
"""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import UserError
from launcher.extensions import HEADER_READERS, required
from launcher.weights.formats import safetensors
from launcher.weights.formats.placeholders import refuse_placeholder
from launcher.weights.formats.safetensors import ZIP, Header


def rank_header_of(path: Path) -> Header:
    """The header of the rank file at `path`, in any format but that of torch, in which no program
    writes rank files that are read here. Raises `UserError`."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            is_torch = file.read(len(ZIP)) == ZIP
    except OSError:
        is_torch = False
    return safetensors.read_header(path) if is_torch else header_of(path)


def header_of(path: Path) -> Header:
    """The header of the file at `path`, in any format. Raises `UserError` for files that cannot be
    read, also for known formats that are not supported."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            start, file_bytes = os.read(descriptor, 8), os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    is_zip = start.startswith(ZIP)
    if not is_zip and int.from_bytes(start, "little") <= file_bytes:
        return safetensors.read_header(path)
    if not is_zip:
        refuse_placeholder(path)
    signature = next((known for known in HEADER_READERS if start.startswith(known)), None)
    if signature is None:
        return safetensors.read_header(path)
    what = f"{path} is in a format that needs an extension"
    header: Header = required(HEADER_READERS, signature, what)(path)
    return header
