"""The weights a run begins with, as far as names and one header tell.

Owns which path counts, load_checkpoint or another, and what kind of files lie there. Torch-free;
nothing of a tensor is read. What is damaged is told by a rule of its own, or by whoever reads the
tensors: here it is silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.errors import UserError
from launcher.weights.formats.note import Note, read_note
from launcher.weights.formats.safetensors import Header, read_header
from launcher.weights.ranks.rank_folders import first_file, rank_folders
from launcher.weights.source import MINDSPORE_INDEX_NAME, Kind, detect, first_weight_file

LOOKED_AT = 64
"""Files whose headers are read before anything heavy is loaded."""

HEADER_BYTES = 4 << 20
"""The same, of all these headers: some ten thousand tensors, a tenth of a second."""


@dataclass(frozen=True)
class Files:
    """What lies at a path."""

    path: Path
    kind: Kind

    @cached_property
    def one(self) -> Path | None:
        """One of the files; None where there is none to be seen."""
        if self.kind == "distributed":
            return first_file(self.path)
        return self.path if self.path.is_file() else first_weight_file(self.path)

    @cached_property
    def header(self) -> Header | None:
        """The header of that file; None where it is not of safetensors, or damaged."""
        try:
            return read_header(self.one) if self.one else None
        except UserError:
            return None

    @cached_property
    def note(self) -> Note | None:
        """What a rank file of ours says of itself; None where there is none."""
        try:
            return read_note(self.one, self.header) if self.one and self.header else None
        except UserError:
            return None

    @property
    def ranks(self) -> int | None:
        """Ranks that wrote distributed weights; of files that do not say, the folders there are."""
        if self.note is not None:
            return self.note.world_size
        try:
            return len(rank_folders(self.path.parent.parent if self.path.is_file() else self.path))
        except UserError:
            return None

    @property
    def is_mindspore(self) -> bool:
        """Whether they are in MindSpore's form."""
        index = self.path / MINDSPORE_INDEX_NAME
        return index.is_file() or (self.header is not None and (
            self.header.metadata.get("format") == "ms"))  # fmt: skip

    @property
    def is_large(self) -> bool:
        """Whether the headers of complete weights are more than can be read before anybody waits;
        True where that cannot be told."""
        try:
            files = [self.path] if self.path.is_file() else [*self.path.glob("*.safetensors")]
            if len(files) > LOOKED_AT:
                return True
            nbytes = 0
            for file in files:
                with file.open("rb") as opened:
                    claim = int.from_bytes(opened.read(8), "little")
                nbytes += claim if claim < file.stat().st_size else 0  # else it is soon refused
            return nbytes > HEADER_BYTES
        except OSError:
            return True


def files_of(check: Check) -> Files | None:
    """What the run loads its first weights from; None: nothing, or nothing yet."""
    config = check.config
    for place in (config.load_checkpoint, _own_checkpoints(check), config.pretrained_model_dir):
        if not place:
            continue
        try:
            kind = detect(Path(place))
        except UserError:
            continue  # a folder that cannot be listed is told by whoever reads it
        if kind != "nothing" and (kind == "complete" or place != config.pretrained_model_dir):
            return Files(Path(place), kind)
        if place == config.load_checkpoint:
            return None
    return None


def _own_checkpoints(check: Check) -> str:
    """Where a run that resumes looks when no load_checkpoint is given."""
    if check.config.resume_training is False or not check.trains:
        return ""
    monitor = check.config.checkpoint_monitor
    return str(Path((monitor and monitor.directory) or check.config.output_dir) / "checkpoint")
