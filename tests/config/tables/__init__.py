"""Tables of wrong configurations and command lines, and what a row of them holds.

Each row changes the right configuration of workspace.py. It names every error that must be
reported; the full text is in tests/messages.golden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.config.workspace import RIGHT
from tests.messages import nearest

TRAIN = ("--run_mode", "train")
FILE = "wrong.yaml"


@dataclass(frozen=True)
class Error:
    """What one error must name."""

    subject: str
    """`key = value`, the key alone, or another name."""
    at: str = ""
    """Text in the first line of the file with it, which is the place of the error."""
    place: str = ""
    """The place, where it is not in the file."""
    near: str | tuple[str, ...] = ()
    """The nearest right values."""

    def where(self, text: str) -> str:
        """The place in front of the message, for a file with this text."""
        if not self.at:
            return f"{self.place}: " if self.place else ""
        lines = enumerate(text.splitlines(), 1)
        return f"{FILE}:{next(number for number, line in lines if self.at in line)}: "

    @property
    def nearest(self) -> tuple[str, ...]:
        """`near` as a tuple."""
        return (self.near,) if isinstance(self.near, str) else self.near

    def check(self, line: str, text: str) -> None:
        """Assert that `line` is this error."""
        head = f"error: {self.where(text)}"
        assert line.startswith(head), (head, line)
        assert self.subject in line.removeprefix(head), (self, line)
        assert nearest(line) == self.nearest, (self, line)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One wrong configuration or command line."""

    name: str
    replace: dict[str, str] = field(default_factory=dict)
    """Text in the right file and what replaces it."""
    degrees: str = ""
    """`parallel_config`, on one line; as many processes are started."""
    add: str = ""
    """Lines put at the end of the file."""
    argv: tuple[str, ...] = TRAIN
    env: dict[str, str] = field(default_factory=dict)
    errors: tuple[Error, ...]
    fix: str = ""
    """The key that takes the nearest values; empty: that of the first error."""

    @property
    def text(self) -> str:
        """The wrong file."""
        text = RIGHT
        for old, new in self.replace.items():
            assert old in text, (self.name, old)
            text = text.replace(old, new, 1)
        degrees = f"parallel_config: {{{self.degrees}}}\n" if self.degrees else ""
        return text + degrees + self.add

    @property
    def processes(self) -> dict[str, str]:
        """The environment of as many processes as the degrees need."""
        if not self.degrees:
            return {}
        written = yaml.safe_load(f"{{{self.degrees}}}")
        axes = ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel")
        return {"WORLD_SIZE": str(math.prod(written.get(axis, 1) for axis in axes))}

    def case(self, folder: Path) -> dict[str, Any]:
        """The file written, as a case of interpreter.py."""
        (folder / FILE).write_text(self.text)
        given = [] if "--config" in self.argv else ["--config", FILE]
        return {"argv": [*given, *self.argv], "cwd": str(folder), "env": self.processes | self.env}

    def fixed_cases(self, folder: Path) -> Iterator[dict[str, Any]]:
        """The same with each nearest value, as cases of interpreter.py."""
        error = self.errors[0]
        key = self.fix or error.subject.partition(" = ")[0]
        for value in error.nearest:
            argv = ["--config", FILE, *TRAIN, f"{key}={value}", "--check_config"]
            yield {"argv": argv, "cwd": str(folder), "env": self.env}
