"""Compare two checkpoints of any layout or format.

    python -m launcher.tools.diff output/checkpoint merged

Exits with 0 when every tensor has the same name and bits, and with 1 after a table of the
differences. The same in Python: `launcher.weights.diff(a, b)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import EXIT_INTERNAL, EXIT_OK
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, progress

if TYPE_CHECKING:
    from launcher.weights.offline.compare import Row

ROWS_SHOWN = 20
EXIT_DIFFERENT = EXIT_INTERNAL


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("diff", "Compare two checkpoints of any layout or format.")
    add = parser.add_argument
    for name in ("A", "B"):
        add(
            name.lower(),
            type=Path,
            metavar=name,
            help="complete weights, rank folders, or a file (a rank file selects its save)",
        )
    add("--file_suffix", metavar="E_S", help="the save, where rank folders hold several")
    parser.add_strategies()
    add(
        "--filter_out_param_prefix",
        default="",
        metavar="PREFIX",
        help="leave out tensors with this prefix; adam_ leaves out the state of AdamW",
    )
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a difference, or 2 for a mistake of the user."""
    return answer(lambda console: _diff(parse(arguments), console))


def _diff(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.compare import compare
    from launcher.weights.ranks.saves import open_any_format

    a, b = (
        open_any_format(path, options.file_suffix, options.src_strategy_dirs, console.log)
        for path in (options.a, options.b)
    )
    prefix = options.filter_out_param_prefix
    found = compare(
        a,
        b,
        keep=lambda name: not prefix or not name.startswith(prefix),
        progress=progress(console, "compared"),
    )
    for line in table(found.rows):
        console.log(line)
    outcome = "equal" if found.is_equal else f"{len(found.rows)} differ"
    console.log(f"{outcome}: {found.equal} tensors are equal")
    return EXIT_OK if found.is_equal else EXIT_DIFFERENT


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of the table, of at most `ROWS_SHOWN` tensors."""
    if not rows:
        return []
    shown = rows[:ROWS_SHOWN]
    width = max(len("tensor"), *(len(row.name) for row in shown))
    lines = [f"  {'tensor':{width}}  {'':13}  {'largest':>10}"]
    for row in shown:
        largest = "" if row.largest is None or row.kind == "renamed" else f"{row.largest:.3g}"
        lines.append(f"  {row.name:{width}}  {row.kind:13}  {largest:>10}  {row.detail}".rstrip())
    if len(rows) > ROWS_SHOWN:
        lines.append(f"  ... and {len(rows) - ROWS_SHOWN} more")
    return lines


if __name__ == "__main__":
    sys.exit(main())
