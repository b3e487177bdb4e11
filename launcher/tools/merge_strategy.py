"""Merge the strategy files of all pipeline stages of MindSpore into one.

    python -m launcher.tools.merge_strategy --src output/strategy \\
        --dst output/merged_strategy/dst_strategy.ckpt

For slicing with MindSpore's tools; checkpoints of Slipway need no strategy files. The same in
Python: `launcher.weights.merge_pipeline_strategys(src_strategy_dirs, dst_strategy_file)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK
from launcher.extensions import PYTHON_CALLS, required
from launcher.report.console import Console
from launcher.tools.command import Parser, answer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("merge_strategy", "Merge the strategy files of all pipeline stages into one.")
    add = parser.add_argument
    add(
        "--src",
        "--src_strategy_dirs",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with ckpt_strategy_rank_0.ckpt, ...: at least one file of every stage",
    )
    add(
        "--dst",
        "--dst_strategy_file",
        dest="target",
        type=Path,
        required=True,
        metavar="FILE",
        help="the merged file; JSON when it ends in .json",
    )
    add("--overwrite", action="store_true", help="replace an existing FILE")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _merge(parse(arguments), console))


def _merge(options: argparse.Namespace, console: Console) -> int:
    merge = required(PYTHON_CALLS, "merge_pipeline_strategys", "merge_strategy")
    merged = merge(options.source, options.target, overwrite=options.overwrite, log=console.log)
    stages = len(merged.by_stage())
    console.log(
        f"{options.target}: {len(merged.layouts)} parameters of {stages} pipeline "
        f"stage{'s' * (stages > 1)}"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
