"""The header of a Megatron `.idx` file, with the standard library alone.

    offset  size   content, little-endian without padding
    0       9      b"MMIDIDX\\0\\0"
    9       8      u64 version, 1
    17      1      code of the type of a token
    18      8      u64 S, the number of sequences
    26      8      u64 D, the number of document borders (documents + 1)
    34      4 * S  int32 tokens of each sequence
            8 * S  int64 byte offset of each sequence in the .bin file
            8 * D  int64 document borders: numbers of sequences, first 0, last S
            S      int8 mode of each sequence, in multimodal datasets only

The `.bin` file has the tokens of all sequences one after another, and no header. Owns both names of
a dataset, the header, and every check that needs no more than it and the sizes of the two files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError, did_you_mean

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code, S, D."""
DTYPE_AT = 17
TOKEN_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32",
    8: "uint16",
}  # fmt: skip
"""Code to the name of the numpy dtype."""
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
FLOATS = frozenset({6, 7})
"""Codes of types that are no token ids."""


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """The content of the header of an `.idx` file."""

    code: int
    """A key of TOKEN_TYPES."""
    sequences: int
    borders: int
    """Documents + 1."""
    has_modes: bool
    """Whether the file has a mode for each sequence. There is no flag: it is S bytes longer."""

    @property
    def dtype(self) -> str:
        """The numpy dtype of a token."""
        return TOKEN_TYPES[self.code]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the `.bin` file."""
        return TOKEN_BYTES[self.code]

    @property
    def offsets_at(self) -> int:
        """Byte where the offsets of the sequences begin; the lengths are before them."""
        return HEADER.size + 4 * self.sequences

    @property
    def borders_at(self) -> int:
        """Byte where the document borders begin."""
        return HEADER.size + 12 * self.sequences

    @property
    def modes_at(self) -> int:
        """Byte after the document borders."""
        return self.borders_at + 8 * self.borders


def index_path(prefix: str | Path) -> Path:
    """The `.idx` file of a dataset. `prefix`: its path without extension, or either file."""
    return _path(prefix, ".idx")


def tokens_path(prefix: str | Path) -> Path:
    """The `.bin` file of a dataset. `prefix`: its path without extension, or either file."""
    return _path(prefix, ".bin")


def _path(prefix: str | Path, ending: str) -> Path:
    text = str(Path(prefix).expanduser())
    for known in (".idx", ".bin"):
        text = text.removesuffix(known)
    return Path(text + ending)


def read_header(prefix: str | Path) -> IndexHeader:
    """The header of a dataset, checked against the sizes of its two files.

    Raises UserError, which names the file and the byte, where a file is missing or damaged.
    """
    index, tokens = index_path(prefix), tokens_path(prefix)
    for path in (index, tokens):
        if not path.is_file():
            raise _absent(path)
    size = index.stat().st_size
    with index.open("rb") as file:
        raw = file.read(HEADER.size)
    header = _parsed(raw, index, size)
    if header.sequences and tokens.stat().st_size == 0:
        _check_not_empty(header, index, tokens)
    elif header.sequences:
        _check_complete(header, index, tokens)
    return header


def _parsed(raw: bytes, path: Path, size: int) -> IndexHeader:
    if raw[: len(MAGIC)] != MAGIC:
        raise damaged(path, 0, f"begins with {raw[: len(MAGIC)]!r}",
                      f"an index file of Megatron begins with {MAGIC!r}")  # fmt: skip
    if len(raw) < HEADER.size:
        raise damaged(path, len(raw), f"ends after {len(raw)} bytes",
                      f"the header has {HEADER.size} bytes")  # fmt: skip
    _, version, code, sequences, borders = HEADER.unpack(raw)
    if version != VERSION:
        raise damaged(path, 9, f"version {version}", f"version {VERSION} is known")
    if code not in TOKEN_TYPES:
        known = ", ".join(f"{code} {name}" for code, name in TOKEN_TYPES.items())
        raise damaged(path, DTYPE_AT, f"type of tokens {code}", f"the types are {known}")
    if borders == 0:
        raise damaged(path, 26, "0 document borders", "the first border is 0, the last the number "
                      "of sequences")  # fmt: skip
    plain = HEADER.size + 12 * sequences + 8 * borders
    if size not in (plain, plain + sequences):
        raise damaged(
            path, min(size, plain),
            f"{size} bytes",
            f"{sequences} sequences and {borders} document borders take {plain} bytes, or "
            f"{plain + sequences} with modes",
        )  # fmt: skip
    return IndexHeader(
        code=code,
        sequences=sequences,
        borders=borders,
        has_modes=sequences > 0 and size == plain + sequences,
    )


def _check_not_empty(header: IndexHeader, index: Path, tokens: Path) -> None:
    """An empty `.bin` file goes with sequences without tokens only."""
    left = 4 * header.sequences
    with index.open("rb") as file:
        file.seek(HEADER.size)
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            if any(block):
                raise damaged(tokens, 0, "has no tokens", f"{index} has sequences with tokens")
            left -= len(block)


def _check_complete(header: IndexHeader, index: Path, tokens: Path) -> None:
    """The `.bin` file has the last sequence: a copy that was interrupted has not."""
    last = header.sequences - 1
    with index.open("rb") as file:
        file.seek(HEADER.size + 4 * last)
        length = int.from_bytes(file.read(4), "little", signed=True)
        file.seek(header.offsets_at + 8 * last)
        begin = int.from_bytes(file.read(8), "little", signed=True)
    size, needed = tokens.stat().st_size, begin + max(length, 0) * header.token_bytes
    if rest := size % header.token_bytes:
        raise damaged(tokens, size - rest, f"{size} bytes",
                      f"by {index} a token has {header.token_bytes} bytes")  # fmt: skip
    if begin >= 0 and needed > size:
        raise damaged(tokens, size, f"has {size} bytes", f"by {index} it has {needed}")


def damaged(path: Path, byte: int, what: str, rule: str) -> UserError:
    """The error for a damaged file of a dataset, at a byte of it."""
    return UserError(
        f"byte {byte}: {what}",
        where=str(path),
        rule=rule,
        advice="The file is damaged or of another kind: copy it again, or make the dataset again",
    )


def _absent(path: Path) -> UserError:
    return UserError(
        "no such file",
        where=str(path),
        rule="a Megatron dataset is two files, `<prefix>.idx` and `<prefix>.bin`",
        nearest=nearest_prefix(path),
        advice="data_path has the prefix, without .bin or .idx; relative paths are relative to the "
        "current directory",
    )


def nearest_prefix(path: Path) -> str:
    """The most similar dataset beside a file that does not exist, or what is there."""
    other = path.with_suffix(".bin" if path.suffix == ".idx" else ".idx")
    if other.is_file():
        return f"`{other}` is there"
    folder = path.parent
    try:
        names = {file.stem for file in folder.iterdir() if file.suffix in (".idx", ".bin")}
    except OSError:
        return f"there is no directory `{folder}`"
    complete = {name for name in names if _has_both(folder / name)}
    stem = path.name.removesuffix(path.suffix)
    extended = [name for name in sorted(complete) if name.startswith(stem)]
    if extended:
        return _meant([str(folder / name) for name in extended])
    if near := did_you_mean(stem, complete):
        return _meant([str(folder / near.removeprefix("did you mean `").removesuffix("`?"))])
    shown = ", ".join(sorted(complete)[:5])
    return f"`{folder}` has the datasets {shown}" if shown else f"`{folder}` has no dataset"


def _has_both(prefix: Path) -> bool:
    return index_path(prefix).is_file() and tokens_path(prefix).is_file()


def _meant(prefixes: Iterable[str]) -> str:
    return f"did you mean {' or '.join(f'`{prefix}`' for prefix in list(prefixes)[:3])}?"
