"""`.ckpt` files of MindSpore: which tensors they hold, and where.

Owns the way from a file to a header. The file is one protobuf message without a magic number:

    Checkpoint { repeated Value value = 1 }                  0a <length> <Value>, again and again
    Value { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }

and may end in a checksum (`ckpt_checksum`). Torch-free. Invariants: contents are hopped over, so
that memory is that of the header; a header is used only after every length, name, dtype and shape
was checked, and every content against its shape.

Files of Slipway begin with a further field, `METADATA_FIELD`: a JSON map of texts, as in the
header of safetensors. Readers that do not know a field skip it, as protobuf asks.

Format: MindSpore, mindspore/ccsrc/utils/checkpoint.proto, and files written by version 2.10.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import xxhash

from launcher.errors import UserError
from launcher.mindspore.ckpt_checksum import SUFFIX_BYTES, has_suffix
from launcher.mindspore.ckpt_values import TENSOR_LIMIT, Tensors, read_value
from launcher.mindspore.file_bytes import FileBytes
from launcher.mindspore.protobuf_wire import BYTES, Field, WireError, fields_in
from launcher.weights.formats.placeholders import refuse_placeholder
from launcher.weights.formats.safetensors import MAX_HEADER_BYTES, Header, parse_json

VALUE_FIELD = 1
METADATA_FIELD = 2047
"""Far from the numbers of the format, so that a later version of it does not use it soon."""
FORMAT = "ms.ckpt"
"""`format` in the header of a file without metadata."""
CHECK = "mindspore"
"""Name of `check_crc` in `launcher.extensions.FILE_CHECKS`."""


def read_header(path: Path) -> Header:
    """The tensors of the `.ckpt` file at `path`. Raises `UserError` that names tensor and byte for
    a file that is not valid, and for values that have no counterpart here."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{path} is not a file", advice="Give a file of weights")
            return _header(path, descriptor, found)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except EOFError:
        raise broken(path, "it became shorter while it was read") from None


def _header(path: Path, descriptor: int, status: os.stat_result) -> Header:
    has_crc = has_suffix(descriptor, status.st_size)
    length = status.st_size - SUFFIX_BYTES * has_crc
    data = FileBytes(descriptor, length)
    tensors, metadata, start = Tensors(), {"format": FORMAT}, 0
    try:
        for number, field in _fields(data):
            if number == METADATA_FIELD and field.at == 0:
                metadata, start = _metadata(data, field), field.stop
            elif number == VALUE_FIELD and field.protobuf_wire == BYTES:
                tensors.add(read_value(data, field))
        tensors.finish()
    except WireError as error:
        raise broken(path, str(error)) from error
    except UserError as error:  # a value that is valid and not read
        raise UserError(replace(found, where=str(path)) for found in error.problems) from error
    if not tensors.entries and not tensors.texts and not metadata.get("slipway"):
        refuse_placeholder(path)
        raise broken(path, "it holds no value")
    return Header(
        tensors.entries, metadata, start, status.st_size, _digest(tensors, metadata),
        status.st_mtime_ns, tensors.chunks, tensors.texts, ".ckpt", CHECK if has_crc else "",
    )  # fmt: skip


def _fields(data: FileBytes) -> Iterator[tuple[int, Field]]:
    """The fields of the file, of which there is a limited number."""
    for index, (number, field) in enumerate(fields_in(data)):
        if index == TENSOR_LIMIT:
            raise WireError(field.at, f"there are more than {TENSOR_LIMIT} values")
        yield number, field


def _metadata(data: FileBytes, field: Field) -> dict[str, str]:
    if field.protobuf_wire != BYTES or field.stop - field.value > MAX_HEADER_BYTES:
        raise WireError(field.at, "the metadata is not a text")
    try:
        content = parse_json(data[field.value : field.stop].decode())
    except (ValueError, RecursionError) as error:
        raise WireError(field.at, f"the metadata is not JSON ({error})") from None
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise WireError(field.at, "the metadata is not a map of texts")
    return content


def _digest(tensors: Tensors, metadata: dict[str, str]) -> str:
    """A hash of everything in the header."""
    digest = xxhash.xxh3_64(repr(sorted(metadata.items())).encode())
    for name, entry in tensors.entries.items():
        digest.update(repr((name, *entry, tensors.chunks.get(name))).encode("utf-8"))
    digest.update(repr(sorted(tensors.texts.items())).encode())
    return digest.hexdigest()


def broken(path: Path, why: str) -> UserError:
    """The error for a `.ckpt` file that is not valid."""
    return UserError(
        f"{path} is not a valid .ckpt file of MindSpore",
        rule=why if len(why) < 300 else f"{why[:300]}...",
        advice="Copy the file again from its origin; nothing was loaded from it",
    )


def refuse_encrypted(path: Path) -> NoReturn:
    """Raise `UserError` for an encrypted checkpoint of MindSpore."""
    raise UserError(
        f"{path} is an encrypted file of MindSpore",
        rule="encrypted weights are not read",
        advice="Load it with mindspore.load_checkpoint(path, dec_key=...) and save it as "
        "safetensors",
    )
