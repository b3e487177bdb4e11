"""Slice complete weights into distributed ones.

    python -m launcher.tools.slice_safetensors --unified_safetensors_dir merged \\
        --dst_safetensors_dir sliced --config configs/finetune.yaml

The layout is that of a configuration, or of strategy files of MindSpore (`--predict_strategy`). A
run does not need this: it slices weights while it reads them. The same in Python:
`launcher.weights.load_distributed_checkpoint(predict_strategy=..., unified_safetensors_dir=...,
dst_safetensors_dir=...)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK
from launcher.extensions import STRATEGY_LAYOUTS, required
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, progress


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("slice_safetensors", "Slice complete weights into the rank files of a layout.")
    add = parser.add_argument
    add(
        "--unified_safetensors_dir",
        type=Path,
        required=True,
        metavar="PATH",
        help="complete weights, a file of them, or the rank folders of another layout",
    )
    add(
        "--dst_safetensors_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the new rank_0/, ...",
    )
    layout = parser.add_mutually_exclusive_group(required=True)
    layout.add_argument(
        "--predict_strategy",
        type=Path,
        metavar="PATH",
        help="strategy file of MindSpore, merged or not, or a folder of them",
    )
    layout.add_argument("--config", metavar="YAML", help="a configuration with parallel_config")
    add("--file_suffix", metavar="E_S", help="the save to read, where rank folders hold several")
    parser.add_strategies()
    parser.add_threads()
    add("--overwrite", action="store_true", help="replace an existing dst_safetensors_dir")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _slice(parse(arguments), console))


def _slice(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.slicing import RankLayout, slice_weights
    from launcher.weights.ranks.saves import open_any_format
    from launcher.weights.source import check_all_ranks

    check_all_ranks(options.unified_safetensors_dir)
    source = open_any_format(
        options.unified_safetensors_dir, options.file_suffix, options.src_strategy_dirs, console.log
    )
    layout: RankLayout
    if options.config is not None:
        from launcher.builders.offline import configured_layout

        layout, source = configured_layout(options.config, source, console.log)
    else:
        read = required(STRATEGY_LAYOUTS, "predict_strategy", "--predict_strategy")
        layout = read(options.predict_strategy, source, console.log)
    sliced = slice_weights(
        source,
        layout,
        options.dst_safetensors_dir,
        workers=options.max_process_num,
        overwrite=options.overwrite,
        progress=progress(console, "sliced"),
        log=console.log,
    )
    console.log(
        f"{options.dst_safetensors_dir}: {sliced.tensors} tensors in {sliced.ranks} rank "
        f"file{'s' * (sliced.ranks != 1)}, {sliced.total_bytes / 1e6:,.1f} MB"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
