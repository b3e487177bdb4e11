"""The weights that a run starts from, judged by names and headers.

Owns which path is used, load_checkpoint or another, which kind of files it has, and whether they
are complete (`look`; elsewhere damaged files are ignored). Without torch; no tensor is read.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.errors import UserError
from launcher.weights.complete import Choice, choose
from launcher.weights.formats import rank_header_of
from launcher.weights.formats.placeholders import placeholder
from launcher.weights.formats.rank_metadata import RankFileMetadata, read_rank_metadata
from launcher.weights.formats.safetensors import Header
from launcher.weights.forms import INDEX_NAMES, has_form
from launcher.weights.ranks.rank_folders import first_file, rank_folders
from launcher.weights.source import Kind, detect, holds_complete, open_complete

LOOKED_AT = 64
"""Files whose headers are read before anything heavy is loaded."""

HEADER_BYTES = 1 << 20
"""Limit for the sum of these headers, and for an index: about ten thousand tensors, 0.1 seconds."""


@dataclass(frozen=True)
class Files:
    """The files at a path."""

    path: Path
    kind: Kind
    key: str
    """The key of the configuration that names it."""

    @cached_property
    def one(self) -> Path | None:
        """One of the files; None where none is found."""
        if self.kind == "distributed":
            return first_file(self.path)
        if self.choice is not None:
            return next(iter(self.choice.taken.files), None)
        return self.path if self.path.is_file() else None

    @cached_property
    def choice(self) -> Choice | None:
        """The set of complete weights that is read from a directory; None for other weights, and
        where it is not clear which of two sets is meant."""
        try:
            return choose(self.path) if self.kind == "complete" else None
        except UserError:
            return None

    @cached_property
    def header(self) -> Header | None:
        """The header of that file; None where it is of torch, or damaged."""
        try:
            return rank_header_of(self.one) if self.one else None
        except UserError:
            return None

    @cached_property
    def rank_metadata(self) -> RankFileMetadata | None:
        """The metadata in a rank file of Slipway; None where there is none."""
        try:
            return read_rank_metadata(self.one, self.header) if self.one and self.header else None
        except UserError:
            return None

    @property
    def ranks(self) -> int | None:
        """Ranks that wrote distributed weights; the number of rank directories where that is not
        recorded."""
        if self.rank_metadata is not None:
            return self.rank_metadata.world_size
        try:
            return len(rank_folders(self.path.parent.parent if self.path.is_file() else self.path))
        except UserError:
            return None

    @property
    def is_mindspore(self) -> bool:
        """Whether they are in MindSpore's format."""
        index = self.choice.taken.index if self.choice is not None else None
        headers = [] if self.header is None else [self.header.metadata]
        return has_form("mindspore", index, headers)

    def look(self) -> None:
        """Raise `UserError` for complete weights with missing or damaged files, judged by index and
        headers, or where it is not clear which of two sets is meant. Torch files, and more headers
        than the limits allow, are not checked."""
        if any(_bytes_of(self.path / name) > HEADER_BYTES for name in INDEX_NAMES):
            return
        choice = self.choice or (choose(self.path) if self.path.is_dir() else None)
        files = [self.path] if choice is None else [*choice.taken.files]
        for file in files[:LOOKED_AT]:
            if file != self.one and (found := placeholder(file, is_text=True)):
                raise UserError(found)
        if len(files) <= LOOKED_AT and all(map(is_safetensors, files)) and (
            sum(map(_header_bytes, files)) <= HEADER_BYTES
        ):  # fmt: skip
            open_complete(self.path)


def is_safetensors(file: Path) -> bool:
    """Whether JSON follows the length of the header. For an empty file the suffix decides; what is
    not a file is reported when its tensors are read."""
    start = _start_of(file)
    return start[8:] == b"{" if len(start) == 9 else file.suffix == ".safetensors"


def _start_of(file: Path) -> bytes:
    """The nine bytes that identify a header, or as many as there are. Opening never blocks."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            return opened.read(9) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return b""


def _header_bytes(file: Path) -> int:
    """The length in its header; 0 where the file is shorter, which is refused elsewhere."""
    claim = int.from_bytes(_start_of(file)[:8], "little")
    return claim if claim < _bytes_of(file) else 0


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def files_of(check: Check) -> Files | None:
    """The weights that the run starts from; None where there are none, or not yet."""
    config = check.config
    places = {
        "load_checkpoint": config.load_checkpoint,
        "resume_training": _own_checkpoints(check),
        "pretrained_model_dir": config.pretrained_model_dir,
    }
    for key, place in places.items():
        if not place:
            continue
        try:
            kind = detect(Path(place))
        except UserError:
            kind = "nothing"  # a directory that cannot be listed: reported by another rule
        if key == "pretrained_model_dir":
            kind = "complete" if kind != "nothing" and holds_complete(Path(place)) else "nothing"
        if kind != "nothing":
            return Files(Path(place), kind, key)
        if key == "load_checkpoint":
            return None
    return None


def _own_checkpoints(check: Check) -> str:
    """Where a run that resumes looks without load_checkpoint."""
    if check.config.resume_training is False or not check.trains:
        return ""
    monitor = check.config.checkpoint_monitor
    return str(Path((monitor and monitor.directory) or check.config.output_dir) / "checkpoint")
