"""Conversion of one file: what a new file gets from an old one, and how it is written.

Owns what is left out (and logged), the order of tensors, and metadata: what MindSpore's own tools
write (`format`: ms, or none). The layout in a rank file of Slipway is carried over. Torch is
imported for files of torch only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.errors import UserError
from launcher.extensions import FILE_FORMATS, required
from launcher.weights.formats import header_of
from launcher.weights.formats.rank_metadata import REDUNDANCY, RankFileMetadata
from launcher.weights.formats.safetensors import Header, in_file_order
from launcher.weights.log import Log
from launcher.weights.offline.stored import is_empty, layout_of, stored_parts
from launcher.weights.reading.checksums import check_file
from launcher.weights.reading.transfer import Files
from launcher.weights.streaming.write import Container, Part, check_dtypes, write_file

NAMED = 5
"""Things named in a message."""
_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF")
"""First bytes of files of torch, new and old."""


@dataclass(frozen=True)
class Task:
    """What is converted to what."""

    format: str
    """Of the new files, a key of `FILE_FORMATS`."""
    suffixes: tuple[str, ...]
    """Extensions of the files of a folder that are converted."""
    names: Mapping[str, str]
    crc_check: bool = False
    """Whether new files end in a checksum, as those of MindSpore may."""

    @property
    def container(self) -> Container:
        """The format of the new files. Raises `UserError` where it was removed."""
        found: Container = required(FILE_FORMATS, self.format, f"{self.format} files are written")
        return found


@dataclass(frozen=True)
class Content:
    """What a new file gets."""

    parts: list[Part]
    """Under their new names, in the order of the new file."""
    names: frozenset[str]
    """The tensors of the old file."""
    metadata: Mapping[str, str]
    layout: RankFileMetadata | None = None


def content_of(task: Task, path: Path, files: Files, log: Log) -> Content:
    """The content of a file, under new names. Raises `UserError`."""
    if task.format == "safetensors" and _is_torch(path):
        from launcher.weights.offline.torch_files import torch_parts

        parts, left_out = torch_parts(path)
        _log_left_out(path, "no tensors", left_out, log)
        renamed = _renamed(path, parts, task.names)
        return Content(in_file_order(renamed), frozenset(parts), {"format": "pt"})
    header = _header(task, path)
    parts = stored_parts(path, header, files)
    _log_left_out(path, "texts and no tensors", header.texts, log)
    if task.format == "ckpt":
        _log_left_out(path, "no elements", [n for n, p in parts.items() if is_empty(p)], log)
    renamed = _renamed(path, parts, task.names)
    if task.format == "safetensors":
        ordered = in_file_order(renamed)
    else:
        ordered = sorted((p for p in renamed if not is_empty(p)), key=lambda part: part.name)
    layout = layout_of(path, header, task.names, ordered)
    return Content(ordered, frozenset(parts), _metadata(task, header, layout), layout)


def _metadata(
    task: Task, header: Header, layout: RankFileMetadata | None
) -> Mapping[str, str]:  # fmt: skip
    """The metadata of a new file: that of MindSpore's tools, or that of a rank file of Slipway."""
    if layout is not None:
        return {key: header.metadata[key] for key in ("format", REDUNDANCY)
                if key in header.metadata}  # fmt: skip
    return {"format": "ms"} if task.format == "safetensors" else {}


def _is_torch(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(_TORCH)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _header(task: Task, path: Path) -> Header:
    """The header of a file to convert, whose checksum fits. Raises `UserError`."""
    header = header_of(path)
    if header.extension == task.container.extension or (
        task.format == "ckpt" and header.extension != ".safetensors"
    ):
        raise UserError(
            f"{path} is a {header.extension.removeprefix('.')} file already",
            rule="files of torch and MindSpore are converted" if task.format == "safetensors" else
            "files of safetensors are converted",
        )  # fmt: skip
    check_file(path, header)
    return header


def _log_left_out(path: Path, why: str, names: Iterable[str], log: Log) -> None:
    shown = list(names)
    if shown:
        more = " ..." * (len(shown) > NAMED)
        log(f"{path}: left out, {why}: {', '.join(shown[:NAMED])}{more}")


def write_content(task: Task, target: Path, content: Content) -> None:
    check_dtypes(target, content.parts, task.container)
    write_file(target, content.parts, content.metadata, content.layout, task.container)
    if task.crc_check and task.container.seal is not None:
        task.container.seal(target)


def _renamed(path: Path, parts: Mapping[str, Part], name_map: Mapping[str, str]) -> list[Part]:
    new = [name_map.get(name, name) for name in parts]
    if len({*new}) < len(new):
        twice = next(name for name in new if new.count(name) > 1)
        raise UserError(f"{path}: two tensors would be named `{twice}`", rule="names are unique",
                        advice="Correct the name_map")  # fmt: skip
    return [replace(part, name=name) for part, name in zip(parts.values(), new, strict=True)]
