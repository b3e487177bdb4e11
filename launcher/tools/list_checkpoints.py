"""List checkpoints: name, step, size, layout and state of every save of a run.

    python -m launcher.tools.list_checkpoints output

Takes the output_dir of a run or a folder of checkpoints. `>` marks the save that a resume takes,
`*` the one with the best evaluation (`keep_best`).
Without `--verify` sizes, headers, manifests and states are checked, but no data. Exits with 1 when
a save is damaged. The same in Python: `launcher.weights.list_checkpoints(path)`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import EXIT_INTERNAL, EXIT_OK
from launcher.report.console import Console
from launcher.tools.command import Parser, answer

if TYPE_CHECKING:
    from launcher.weights.offline.listing import Listed


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("list_checkpoints", "Name, step, size, layout and state of every save.")
    parser.add_argument("path", type=Path, metavar="PATH", help="output_dir, or its checkpoint/")
    parser.add_argument("--verify", action="store_true", help="also read all data and check it")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a damaged save, or 2 for a mistake of the user."""
    return answer(lambda console: _list(parse(arguments), console))


def _list(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.listing import list_checkpoints

    rows = list_checkpoints(options.path, data=options.verify)
    for folder in dict.fromkeys(row.folder for row in rows):
        console.log(f"{folder}:")
        for line in table([row for row in rows if row.folder == folder]):
            console.log(line)
    return EXIT_INTERNAL if any(row.is_damaged for row in rows) else EXIT_OK


def table(rows: Sequence[Listed]) -> list[str]:
    """Lines of aligned columns; the state of a save comes last."""
    cells = [["", "name", "step", "size", "layout", "saved", "state"]]
    cells += [
        [
            ">" * row.is_next + "*" * row.is_best,
            row.name,
            "?" if row.step is None else str(row.step),
            f"{row.nbytes / 1e6:,.1f} MB",
            row.layout,
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.saved_at)),
            row.state,
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


if __name__ == "__main__":
    sys.exit(main())
