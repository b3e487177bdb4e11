"""The weights a run begins with, as far as names and headers tell.

Owns which path counts, load_checkpoint or another, what kind of files lie there, and whether they
are whole (`look`; what is damaged is silence otherwise). Torch-free; nothing of a tensor is read.
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
from launcher.weights.formats.placeholders import placeholder
from launcher.weights.formats.rank_metadata import RankFileMetadata, read_rank_metadata
from launcher.weights.formats.safetensors import Header, read_header
from launcher.weights.forms import INDEX_NAMES, has_form
from launcher.weights.ranks.rank_folders import first_file, rank_folders
from launcher.weights.source import Kind, detect, holds_complete, open_complete

LOOKED_AT = 64
"""Files whose headers are read before anything heavy is loaded."""

HEADER_BYTES = 1 << 20
"""The same, of all these headers, and of an index: some ten thousand tensors, a tenth of a
second."""


@dataclass(frozen=True)
class Files:
    """What lies at a path."""

    path: Path
    kind: Kind
    key: str
    """Of the configuration, that names it."""

    @cached_property
    def one(self) -> Path | None:
        """One of the files; None where there is none to be seen."""
        if self.kind == "distributed":
            return first_file(self.path)
        if self.choice is not None:
            return next(iter(self.choice.taken.files), None)
        return self.path if self.path.is_file() else None

    @cached_property
    def choice(self) -> Choice | None:
        """Of complete weights in a folder, those that are read; None of others, and where nothing
        says which of two sets is meant."""
        try:
            return choose(self.path) if self.kind == "complete" else None
        except UserError:
            return None

    @cached_property
    def header(self) -> Header | None:
        """The header of that file; None where it is not of safetensors, or damaged."""
        try:
            return read_header(self.one) if self.one else None
        except UserError:
            return None

    @cached_property
    def rank_metadata(self) -> RankFileMetadata | None:
        """What a rank file of ours says of itself; None where there is none."""
        try:
            return read_rank_metadata(self.one, self.header) if self.one and self.header else None
        except UserError:
            return None

    @property
    def ranks(self) -> int | None:
        """Ranks that wrote distributed weights; of files that do not say, the folders there are."""
        if self.rank_metadata is not None:
            return self.rank_metadata.world_size
        try:
            return len(rank_folders(self.path.parent.parent if self.path.is_file() else self.path))
        except UserError:
            return None

    @property
    def is_mindspore(self) -> bool:
        """Whether they are in MindSpore's form."""
        index = self.choice.taken.index if self.choice is not None else None
        headers = [] if self.header is None else [self.header.metadata]
        return has_form("mindspore", index, headers)

    def look(self) -> None:
        """Raise `UserError` for complete weights that are not whole, as far as their index and
        headers tell, or where nothing says which of two sets is meant. Nothing is said of files of
        torch, and where there is too much to look at."""
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
    """By content: JSON stands behind the length of the header. An empty file is what it is named,
    and what is no file is told by whoever reads its tensors."""
    start = _start_of(file)
    return start[8:] == b"{" if len(start) == 9 else file.suffix == ".safetensors"


def _start_of(file: Path) -> bytes:
    """The nine bytes that tell a header, or as many as there are. Opening waits for nobody."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            return opened.read(9) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return b""


def _header_bytes(file: Path) -> int:
    """What its header claims to be long; 0 where the file is not as long, which is refused."""
    claim = int.from_bytes(_start_of(file)[:8], "little")
    return claim if claim < _bytes_of(file) else 0


def _bytes_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def files_of(check: Check) -> Files | None:
    """What the run loads its first weights from; None: nothing, or nothing yet."""
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
            kind = "nothing"  # a folder that cannot be listed: told by a rule of its own
        if key == "pretrained_model_dir":
            kind = "complete" if kind != "nothing" and holds_complete(Path(place)) else "nothing"
        if kind != "nothing":
            return Files(Path(place), kind, key)
        if key == "load_checkpoint":
            return None
    return None


def _own_checkpoints(check: Check) -> str:
    """Where a run that resumes looks when no load_checkpoint is given."""
    if check.config.resume_training is False or not check.trains:
        return ""
    monitor = check.config.checkpoint_monitor
    return str(Path((monitor and monitor.directory) or check.config.output_dir) / "checkpoint")
