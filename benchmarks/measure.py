"""Measuring processes side by side, and the page that keeps the results.

Owns how figures are taken and quoted. Invariants: things that are compared run in turns (A B A B
...) in processes of their own, after something uncounted that warms up; a figure is a median with
its smallest and largest value; a comparison is the median of the ratios of neighbours, so that a
machine that slows down for a while slows both sides.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import select
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
PREFACE = """\
# Results

Each section is written by the script it names (`--write`), from the repository root, on a machine
(shared: single figures vary). Processes that are compared ran in turns; figures are
`median (smallest..largest)`, and a ratio is the median over neighbouring pairs.
"""


@dataclass(frozen=True)
class Spread:
    """A median with its smallest and largest value."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, form: str = ",.2f") -> str:
        """`median (smallest..largest)`, each number formatted with `form`."""
        return f"{self.median:{form}} ({self.smallest:{form}}..{self.largest:{form}})"


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of `above[i] / below[i]`."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def in_turns(
    measures: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """`rounds` values of each measure, taken in turns; with `warm_up` after one uncounted round."""
    if warm_up:
        for measure in measures.values():
            measure()
    values: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure())
        latest = ", ".join(f"{name} {taken[-1]:,.3f}" for name, taken in values.items())
        print(f"round {number + 1}/{rounds}: {latest}", file=sys.stderr)
    return values


def run(command: Sequence[str | Path], *, threads: int | None = None, exit_code: int = 0) -> float:
    """Seconds that `command` takes as a whole process, started in the repository root.

    `threads` limits those of torch's kernels. Raises RuntimeError with the end of its output when
    the exit code is not `exit_code`.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, env=_environment(threads), capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode != exit_code:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        words = shlex.join(str(part) for part in command)
        raise RuntimeError(f"{words} ended with {done.returncode}, not {exit_code}:\n{tail}")
    return seconds


def _environment(threads: int | None) -> dict[str, str]:
    environment = dict(os.environ)
    # Python keeps compiled modules unless told otherwise: users have them, so the measure does too.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return environment


class Paced:
    """A process whose work is done in blocks, each when it is asked for (`peers/blocks.py`)."""

    def __init__(self, command: Sequence[str | Path], folder: Path, threads: int) -> None:
        """Start `command`; `folder` becomes the place of its pipes."""
        for name in ("go", "done"):
            os.mkfifo(folder / name)
        self._log = folder / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT, env=_environment(threads), stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        # Read-write, so that opening waits for nobody: the process may end before it opens them.
        self._go = os.open(folder / "go", os.O_RDWR)
        self._done = os.open(folder / "done", os.O_RDWR | os.O_NONBLOCK)

    def block(self) -> float:
        """Let it do a block: the seconds that took. Raises RuntimeError with the end of its output
        if it ends instead."""
        os.write(self._go, b"go\n")
        text = b""
        while not text.endswith(b"\n"):
            if select.select([self._done], [], [], 1.0)[0]:
                text += os.read(self._done, 4096)
            elif self._process.poll() is not None:
                tail = "\n".join(self._log.read_text().splitlines()[-20:])
                raise RuntimeError(f"ended with {self._process.returncode}:\n{tail}")
        return float(text)

    def close(self) -> None:
        """End the process, if its work is not done."""
        self._process.kill()
        self._process.wait()
        os.close(self._go)
        os.close(self._done)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left and the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def conditions(rounds: int) -> str:
    """One line: when, on what, with which versions, how often."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{date.today()}; {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, {packages}; {rounds} rounds."
    )


def parser(module: str, description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The command line that the benchmarks have in common."""
    made = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--rounds", type=int, default=rounds, help="values of each figure")
    made.add_argument("--write", action="store_true", help="keep the result in RESULTS.md")
    return made


def report(title: str, module: str, arguments: argparse.Namespace, body: str) -> None:
    """Print a result and, with --write, make it the section `title` of the results page."""
    command = f"`python -m {module} --rounds {arguments.rounds}`"
    section = f"## {title}\n\n{command}\n{conditions(arguments.rounds)}\n\n{body}\n"
    print(section)
    if arguments.write:
        page = RESULTS.read_text() if RESULTS.exists() else PREFACE
        RESULTS.write_text(with_section(page, title, section))


def with_section(page: str, title: str, section: str) -> str:
    """`page` with `section` in place of the one called `title`, or behind all others."""
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(page):
        page = old.sub(lambda _: section + "\n", page)
    else:
        page = page.rstrip() + "\n\n" + section
    return page.rstrip() + "\n"
