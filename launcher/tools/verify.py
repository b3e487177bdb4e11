"""Check weights: checksums, coverage, shapes, manifest and index.

    python -m launcher.tools.verify output/checkpoint

Takes a folder of rank folders with all its saves, complete weights, or one file. Exits with 0 when
everything is valid, and with 1 after listing file, tensor and rank of every fault. The same in
Python: `launcher.weights.verify(path)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_INTERNAL, EXIT_OK
from launcher.report.console import Console
from launcher.tools.command import Parser, answer

EXIT_FAULTS = EXIT_INTERNAL


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("verify", "Check weights: checksums, coverage, shapes, manifest and index.")
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder of weights, or a file")
    parser.add_strategies()
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for faults, or 2 for a mistake of the user."""
    return answer(lambda console: _verify(parse(arguments), console))


def _verify(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.inspection import verify

    verdict = verify(options.path, options.src_strategy_dirs)
    for fault in verdict.faults:
        print(f"fault: {fault}", file=sys.stderr)
    for remark in verdict.remarks:
        console.log(remark)
    if not verdict.is_complete:
        return EXIT_FAULTS
    checked = verdict.files - verdict.unchecked
    sums = (
        "checksums match" if not verdict.unchecked else
        f"checksums match in {checked}, the others have none" if checked else
        "headers are valid, there are no checksums"
    )  # fmt: skip
    files = f"{verdict.files} file{'s' * (verdict.files != 1)}"
    console.log(f"{options.path}: complete: {files}, {verdict.total_bytes / 1e6:,.1f} MB, {sums}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
