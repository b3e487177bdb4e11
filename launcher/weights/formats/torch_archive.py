"""The zip archive that `torch.save` writes: where its members are in the file.

Owns the archive: one pickle, and the bytes of each storage as an uncompressed member `data/<key>`,
so that they can be read in place. Torch-free. Invariant: a member is inside the file.
"""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from launcher.errors import UserError
from launcher.weights.formats.safetensors import MAX_HEADER_BYTES

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a member: magic, and the lengths of its name and of the extra field after it."""
_ENCRYPTED = 0x1
_MISTAKES = (ValueError, OverflowError, NotImplementedError, struct.error)
"""What zipfile raises, besides its own error, for broken archives."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file, from `start` on."""

    start: int
    length: int


class Archive:
    """An archive open for reading, until the file is closed. Raises `UserError` for a file that
    torch did not write."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.file_bytes = os.fstat(file.fileno()).st_size
        try:
            members = zipfile.ZipFile(file).infolist()
        except (
            zipfile.BadZipFile,
            ValueError,
            OverflowError,
            NotImplementedError,
            struct.error,
        ) as error:
            raise broken(path, f"its list of members cannot be read ({error})") from error
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise broken(path, "two of its members have one name")
        self._folder = self._find_folder()

    def _find_folder(self) -> str:
        found = [n for n in self._members if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(found) != 1:
            raise UserError(
                f"{self._path} is a zip archive that torch.save did not write",
                rule="such a file has one member data.pkl, in a folder",
                nearest=f"It holds: {', '.join(list(self._members)[:3])}",
                advice="Give weights as safetensors, or as torch.save writes them",
            )
        folder = found[0].removesuffix("data.pkl")
        if f"{folder}constants.pkl" in self._members:
            raise UserError(
                f"{self._path} holds a program of TorchScript",
                rule="only weights are read, and nothing is run",
                advice="Save the weights alone: torch.save(module.state_dict(), path)",
            )
        return folder

    def check_byte_order(self) -> None:
        """Check that numbers are stored in little-endian order."""
        if f"{self._folder}byteorder" not in self._members:
            return  # older versions wrote on little-endian machines only
        order = self.read("byteorder")
        if order not in (b"little", b"big"):
            raise broken(self._path, "its member byteorder is neither little nor big")
        if order == b"big":
            raise UserError(
                f"{self._path} is big-endian",
                rule="only little-endian files are read",
                advice="Load it with torch on this machine and save it again",
            )

    def span(self, name: str) -> Span:
        """Where the bytes of a member are in the file."""
        member = self._members.get(self._folder + name)
        if member is None:
            raise broken(self._path, f"the member {name} is missing")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            how = "encrypted" if member.flag_bits & _ENCRYPTED else "compressed"
            raise UserError(
                f"{self._path} is {how}: its member {name}",
                rule="tensors are read in place, from members that are stored as they are",
                advice="Save it again: torch.save(torch.load(old, weights_only=True), new)",
            )
        start = self._data_start(name, member.header_offset)
        if start + member.file_size > self.file_bytes:
            raise broken(self._path, f"the member {name} ends past the end of the file")
        return Span(start, member.file_size)

    def _data_start(self, name: str, header: int) -> int:
        if 0 <= header <= self.file_bytes - _LOCAL_HEADER.size:
            self._file.seek(header)
            magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(
                self._file.read(_LOCAL_HEADER.size)
            )
            if magic == b"PK\x03\x04":
                return header + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
        raise broken(self._path, f"the member {name} is not where it should be")

    def read(self, name: str) -> bytes:
        """The bytes of a small member."""
        span = self.span(name)
        if span.length > MAX_HEADER_BYTES:
            raise broken(self._path, f"the member {name} has {span.length} bytes")
        self._file.seek(span.start)
        return self._file.read(span.length)


def broken(path: Path, why: str) -> UserError:
    """The error for a file of torch that is not valid."""
    return UserError(
        f"{path} is not a valid torch file",
        rule=why if len(why) < 300 else f"{why[:300]}...",
        advice="Copy the file again from its origin; nothing was loaded from it",
    )
