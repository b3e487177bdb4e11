"""Merge distributed weights into complete ones.

    python -m launcher.tools.unified_safetensors --mindspore_ckpt_dir output/checkpoint \\
        --output_dir merged --file_suffix 1_100 --filter_out_param_prefix adam_

The result is a Hugging Face directory that `transformers` opens. Argument names are the original's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK, EXIT_USER, UserError
from launcher.report.console import Console


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.tools.unified_safetensors",
        description="Merge distributed weights into a complete Hugging Face directory.",
    )
    add = parser.add_argument
    add("--mindspore_ckpt_dir", type=Path, required=True, metavar="DIR", help="holds rank_0/, ...")
    add("--output_dir", type=Path, required=True, metavar="DIR", help="where complete weights go")
    add("--file_suffix", default="1_1", metavar="E_S", help="the save: *-E_S.safetensors (1_1)")
    add(
        "--filter_out_param_prefix",
        default="",
        metavar="PREFIX",
        help="leave out tensors whose name starts so; adam_ drops optimizer state",
    )
    add("--overwrite", action="store_true", help="replace an existing output_dir")
    for name, why in (
        ("--src_strategy_dirs", "no effect: our files describe their own layout"),
        ("--has_redundancy", "no effect: seen from the files"),
        ("--max_process_num", "no effect: one process reads and writes"),
    ):
        add(name, help=why)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    options = parse(arguments)
    from launcher.weights.merge import merge

    console = Console(enabled=True)
    try:
        exported = merge(
            options.mindspore_ckpt_dir,
            options.output_dir,
            suffix=options.file_suffix,
            drop_prefixes=(options.filter_out_param_prefix,)
            * bool(options.filter_out_param_prefix),
            overwrite=options.overwrite,
            progress=lambda done, total: console.progress(
                f"merged {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", last=done == total
            ),
        )
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER
    print(f"{options.output_dir}: {exported.tensors} tensors in {len(exported.files)} files")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
