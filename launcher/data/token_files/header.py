"""What a file of token ids holds, with the standard library alone: type, shape, where they begin.

Three kinds of files:

    x.npy           a numpy array of integers, 1-D (a stream of tokens) or 2-D (a row each)
    x.u16, x.int32  raw little-endian integers; the name has the type
    x.bin           the same; `token_dtype` or a file `x.bin.json` beside it has the type

The side file is `{"dtype": "uint16", "eod": 50256}`; `eos` and `eod_token_id` are other names of
`eod`. Invariants: a pickled array is never opened; a file has exactly the bytes that its header or
type requires.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import UserError, did_you_mean

TYPE_BYTES = {"uint8": 1, "uint16": 2, "uint32": 4, "int16": 2, "int32": 4, "int64": 8}
"""Types of token ids, by numpy's names."""
RAW_SUFFIXES = {
    **{f".{name}": name for name in TYPE_BYTES},
    ".u8": "uint8", ".u16": "uint16", ".u32": "uint32", ".i16": "int16", ".i32": "int32",
    ".i64": "int64",
}  # fmt: skip
SUFFIXES = (".npy", ".bin", *RAW_SUFFIXES)
_NPY_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 1 << 16
_LETTERS = {"u1": "uint8", "u2": "uint16", "u4": "uint32", "i2": "int16", "i4": "int32",
            "i8": "int64"}  # fmt: skip
_END_KEYS = ("eod", "eos", "eod_token_id")


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """One file of token ids."""

    path: Path
    dtype: str
    """A key of TYPE_BYTES."""
    byte_order: str
    """`<` or `>`."""
    begin: int
    """Byte of the first token."""
    count: int
    """Tokens."""
    columns: int | None = None
    """Tokens of each row; None: one stream."""
    eod: int | None = None
    """The end token that the side file gives."""
    unknown_keys: tuple[str, ...] = ()
    """Keys of the side file that mean nothing."""


def side_path(path: Path) -> Path:
    """The file beside a file of tokens that may describe it."""
    return path.with_name(f"{path.name}.json")


def describe(path: Path, token_dtype: str | None) -> TokenFile:
    """What a file holds. `token_dtype`: the type that the configuration gives for raw files.

    Raises UserError, which names the file, where that is not known or the file is damaged.
    """
    side = _read_side(path)
    if path.suffix.lower() == ".npy" or _begins_with(path, _NPY_MAGIC):
        found = _describe_npy(path)
    else:
        found = _describe_raw(path, token_dtype, side)
    for other, where in ((side.get("dtype"), str(side_path(path))), (token_dtype, "token_dtype")):
        if other is not None and other != found.dtype:
            raise UserError(
                f"its tokens are {found.dtype}, but {where} is {other}",
                where=str(path),
                rule="a file has tokens of one type",
                advice="Remove the wrong one of the two",
            )
    eod = next((side[key] for key in _END_KEYS if side.get(key) is not None), None)
    unknown = tuple(key for key in side if key not in ("dtype", *_END_KEYS))
    return replace(found, eod=eod, unknown_keys=unknown)


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _describe_raw(path: Path, token_dtype: str | None, side: dict[str, Any]) -> TokenFile:
    dtype = RAW_SUFFIXES.get(path.suffix.lower()) or side.get("dtype") or token_dtype
    if dtype is None:
        if path.with_suffix(".idx").is_file():
            raise UserError(
                "it is one of the two files of a Megatron dataset",
                where=str(path),
                rule="TokenFileDataLoader reads files of tokens without an index",
                nearest="Nearest: type: BlendedMegatronDatasetDataLoader",
            )
        raise UserError(
            "the type of its tokens is not known",
            where=str(path),
            rule="a raw file has no header with the type of its tokens",
            nearest=f"Nearest: token_dtype: uint16, or {side_path(path).name} with "
            '{"dtype": "uint16"}',
        )
    size, width = path.stat().st_size, TYPE_BYTES[dtype]
    if size % width:
        raise _wrong(path, size - size % width, f"{size} bytes",
                     f"a token of {dtype} has {width} bytes")  # fmt: skip
    return TokenFile(path=path, dtype=dtype, byte_order="<", begin=0, count=size // width)


def _describe_npy(path: Path) -> TokenFile:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start[:6] != _NPY_MAGIC or len(start) < 8 or start[6] not in (1, 2, 3):
            raise _wrong(path, 0, f"begins with {start!r}", "a .npy file begins with "
                         "b'\\x93NUMPY' and its version")  # fmt: skip
        width = 2 if start[6] == 1 else 4
        length = int.from_bytes(file.read(width), "little")
        text = file.read(min(length, _LONGEST_HEADER))
    begin = 8 + width + length
    if len(text) != length:
        raise _wrong(path, 8, f"a header of {length} bytes", "it is at most "
                     f"{_LONGEST_HEADER} bytes and inside the file")  # fmt: skip
    header = _parsed(path, text, 8 + width)
    kind, shape = _kind(path, header), header["shape"]
    if len(shape) == 2 and header["fortran_order"] and min(shape) > 1:
        raise UserError(
            f"it is an array of {shape[0]} x {shape[1]} in Fortran order",
            where=str(path),
            rule="the tokens of a row must lie beside each other",
            advice="Write it again: np.save(path, np.ascontiguousarray(array))",
        )
    if len(shape) not in (1, 2):
        raise UserError(
            f"it is an array with {len(shape)} dimensions, {shape}",
            where=str(path),
            rule="1 dimension is a stream of tokens, 2 are rows",
            advice="Reshape it",
        )
    count = shape[0] * (shape[1] if len(shape) == 2 else 1)
    wanted = begin + count * TYPE_BYTES[kind[1]]
    if size != wanted:
        raise _wrong(path, min(size, wanted), f"{size} bytes",
                     f"a header of {begin} bytes and {count} tokens of {kind[1]} are {wanted}",
                     )  # fmt: skip
    return TokenFile(
        path=path, byte_order=kind[0], dtype=kind[1], begin=begin, count=count,
        columns=shape[1] if len(shape) == 2 else None,
    )  # fmt: skip


def _parsed(path: Path, text: bytes, at: int) -> dict[str, Any]:
    """The header of a .npy file: a Python literal, of which nothing is executed."""
    header: Any = None
    try:
        header = ast.literal_eval(text.decode("latin-1").strip())
        shape = header["shape"]
        is_right = (
            isinstance(header["fortran_order"], bool)
            and isinstance(shape, tuple)
            and all(type(size) is int and size >= 0 for size in shape)
        )
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        is_right = False
    if not is_right:
        raise _wrong(path, at, "the header cannot be read",
                     "it has descr, fortran_order and shape")  # fmt: skip
    return dict(header)


def _kind(path: Path, header: dict[str, Any]) -> tuple[str, str]:
    """Byte order and type of an array. Raises UserError for what is no token id."""
    descr = header.get("descr")
    if isinstance(descr, str) and "O" in descr:
        raise UserError(
            "it holds pickled Python objects",
            where=str(path),
            rule="a pickled file can run code, and is never opened",
            advice="Save an array of integers: np.save(path, np.array(tokens, dtype=np.uint32))",
        )
    name = _LETTERS.get(descr[1:]) if isinstance(descr, str) else None
    if name is None or not isinstance(descr, str) or descr[0] not in "<>|=":
        raise UserError(
            f"its values are {descr!r}",
            where=str(path),
            rule=f"token ids are one of {', '.join(TYPE_BYTES)}",
            advice="Convert it: np.save(path, array.astype(np.uint32))",
        )
    return (">" if descr[0] == ">" else "<"), name


def _read_side(path: Path) -> dict[str, Any]:
    side = side_path(path)
    if not side.is_file():
        return {}
    try:
        content = json.loads(side.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"it cannot be read ({error})",
            where=str(side),
            rule='it describes the file beside it: {"dtype": "uint16", "eod": 0}',
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"it is a {type(content).__name__}", where=str(side),
                        rule='it describes the file beside it: {"dtype": "uint16", "eod": 0}',
                        )  # fmt: skip
    dtype = content.get("dtype")
    if dtype is not None and dtype not in TYPE_BYTES:
        raise UserError(f"dtype = {dtype!r}", where=str(side),
                        rule=f"token ids are one of {', '.join(TYPE_BYTES)}",
                        nearest=did_you_mean(str(dtype), TYPE_BYTES))  # fmt: skip
    for key in _END_KEYS:
        eod = content.get(key)
        if eod is not None and (type(eod) is not int or eod < 0):
            raise UserError(
                f"{key} = {eod!r}",
                where=str(side),
                rule="it is the id of the token at the end of each document",
            )
    ends = {key: content[key] for key in _END_KEYS if content.get(key) is not None}
    if len(set(ends.values())) > 1:
        raise UserError(
            ", ".join(f"{key} = {eod}" for key, eod in ends.items()),
            where=str(side),
            rule="these are names of one thing, the token at the end of each document",
            advice="Remove the wrong ones",
        )
    return content


def _wrong(path: Path, byte: int, what: str, rule: str) -> UserError:
    return UserError(
        f"byte {byte}: {what}",
        where=str(path),
        rule=rule,
        advice="The file is damaged or of another type: copy it again, or set token_dtype",
    )
