"""Names of checkpoint files: `{prefix}_rank_{rank}[_{counter}]-{epoch}_{step}.{format}`.

The counter distinguishes runs in the same folder with the same prefix; the first run has none.
Manifest and state have no rank: `{prefix}[_{counter}]-{epoch}_{step}.json`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

RANK_FILE = re.compile(
    r"(?P<prefix>.+)_rank_(?P<rank>\d+)(?:_(?P<counter>\d+))?-(?P<epoch>\d+)_(?P<step>\d+)"
    r"(?:\.(?P<format>safetensors|ckpt))?"
)


DEFAULT_FORMAT = "safetensors"
FORMATS = (DEFAULT_FORMAT, "ckpt")
"""Of rank files."""


@dataclass(frozen=True)
class SaveName:
    """The name of one save of one run, for all ranks."""

    prefix: str
    counter: int
    epoch: int
    step: int
    format: str = field(default=DEFAULT_FORMAT, compare=False)
    """Of the rank files, which is their extension; a save has the same name in any format."""

    def rank_file(self, rank: int) -> str:
        """Name of the file `rank` writes, inside its `rank_{rank}` folder."""
        counter = f"_{self.counter}" if self.counter else ""
        return f"{self.prefix}_rank_{rank}{counter}-{self.epoch}_{self.step}.{self.format}"

    def __str__(self) -> str:
        return f"{self.label}-{self.epoch}_{self.step}"

    def as_json(self) -> dict[str, str | int]:
        """The arguments of this name; the default format is left out."""
        return {
            key: value
            for key, value in vars(self).items()
            if key != "format" or value != DEFAULT_FORMAT
        }

    @property
    def label(self) -> str:
        """Prefix and counter, which identify the run in its folder."""
        return f"{self.prefix}_{self.counter}" if self.counter else self.prefix

    @property
    def record(self) -> str:
        """Name of the manifest and of the state file."""
        return f"{self}.json"


def parse_rank_file(name: str) -> tuple[SaveName, int] | None:
    """(save name, rank) of a rank file's name, with or without extension; None for other names."""
    match = RANK_FILE.fullmatch(name)
    if match is None:
        return None
    numbers = {key: int(match[key] or 0) for key in ("rank", "counter", "epoch", "step")}
    save = SaveName(
        match["prefix"], numbers["counter"], numbers["epoch"], numbers["step"],
        match["format"] or DEFAULT_FORMAT,
    )  # fmt: skip
    return save, numbers["rank"]


def rank_file_paths(root: Path) -> Iterator[Path]:
    """All files in the rank folders of `root` that have the extension of a rank file."""
    for extension in FORMATS:
        yield from root.glob(f"rank*/*.{extension}")


def epoch_and_step_in_name(
    global_step: int, steps_per_epoch: int, sink_size: int
) -> tuple[int, int]:
    """The two numbers of a file name after `global_step` steps.

    The epoch (from 1) and the step inside it; with a sink size k > 1, ceil(steps / k) and k, as in
    MindFormers.
    """
    if sink_size > 1:
        return -(-global_step // sink_size), sink_size
    epoch, step = divmod(global_step - 1, steps_per_epoch)
    return epoch + 1, step + 1


def global_step_of_name(epoch: int, step: int, steps_per_epoch: int, sink_size: int) -> int:
    """The optimizer steps done at the save with these two numbers in its name: the inverse of
    `epoch_and_step_in_name`, rounded up to the sink size."""
    if sink_size > 1 and step == sink_size:
        return epoch * sink_size
    return (epoch - 1) * steps_per_epoch + step
