"""Merge the strategy files of all pipeline stages into one.

    python -m launcher.tools.merge_strategy --src output/strategy \\
        --dst output/merged_strategy/dst_strategy.ckpt

For slicing with MindSpore's tools; our own checkpoints need no strategy files. The same in Python:
`launcher.weights.merge_pipeline_strategys(src_strategy_dirs, dst_strategy_file)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK, EXIT_USER, UserError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.tools.merge_strategy",
        description="Merge the strategy files of all pipeline stages into one.",
    )
    add = parser.add_argument
    add(
        "--src",
        "--src_strategy_dirs",
        dest="source",
        type=Path,
        required=True,
        metavar="DIR",
        help="holds ckpt_strategy_rank_0.ckpt, ...: of every stage one file or more",
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
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    options = parse(arguments)
    from launcher.weights.strategies import merge_pipeline_strategys

    try:
        merged = merge_pipeline_strategys(
            options.source, options.target, overwrite=options.overwrite
        )
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER
    stages = len(merged.by_stage())
    print(
        f"{options.target}: {len(merged.layouts)} parameters of {stages} pipeline "
        f"stage{'s' * (stages > 1)}"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
