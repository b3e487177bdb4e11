"""Merge distributed weights into complete ones.

    python -m launcher.tools.unified_safetensors --mindspore_ckpt_dir output/checkpoint \\
        --output_dir merged --file_suffix 1_100 --filter_out_param_prefix adam_

The result is a Hugging Face directory that `transformers` opens. Argument names are MindSpore's.
The same in Python: `launcher.weights.unified_safetensors(mindspore_ckpt_dir, output_dir, ...)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK
from launcher.extensions import SAVE_FORMATS
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, orders_in, progress, truth


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser(
        "unified_safetensors", "Merge distributed weights into a complete Hugging Face directory."
    )
    add = parser.add_argument
    add(
        "--mindspore_ckpt_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with rank_0/, ...",
    )
    add(
        "--output_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the complete weights",
    )
    add("--file_suffix", default="1_1", metavar="E_S", help="the save: *-E_S.safetensors (1_1)")
    parser.add_strategies()
    add(
        "--has_redundancy",
        type=truth,
        metavar="True|False",
        help="whether ranks hold all replicas; the files take precedence",
    )
    add(
        "--filter_out_param_prefix",
        default="",
        metavar="PREFIX",
        help="leave out tensors with this prefix; adam_ drops the state of AdamW",
    )
    add(
        "--format",
        choices=tuple(SAVE_FORMATS),
        default="huggingface",
        help="form of the complete weights (huggingface)",
    )
    add(
        "--config",
        type=Path,
        metavar="PATH",
        help="config.json or YAML of the model, to map names of MindFormers (default: that of the "
        "run, if it wrote one)",
    )
    add(
        "--naming",
        choices=("legacy", "mcore", "mcore_1.6", "huggingface"),
        help="names in --format mindspore (default: mcore for qwen3, qwen3_moe, deepseek_v3, else "
        "legacy; huggingface: unchanged)",
    )
    add(
        "--qkv_concat",
        type=truth,
        metavar="True|False",
        help="write fused projections under legacy names (False)",
    )
    parser.add_orders()
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="cast the weights (default: unchanged)",
    )
    add("--max_shard_size", default="5GB", metavar="SIZE", help="maximum bytes of a file (5GB)")
    parser.add_threads()
    add("--overwrite", action="store_true", help="replace an existing output_dir")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _merge(parse(arguments), console))


def _merge(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.merge import merge, size_in_bytes

    prefix = options.filter_out_param_prefix
    exported = merge(
        options.mindspore_ckpt_dir,
        options.output_dir,
        suffix=options.file_suffix,
        strategy=options.src_strategy_dirs,
        has_redundancy=options.has_redundancy,
        drop_prefixes=(prefix,) if prefix else (),
        form=options.format,
        max_shard_bytes=size_in_bytes(options.max_shard_size),
        workers=options.max_process_num,
        dtype=options.dtype,
        config=options.config,
        naming=options.naming,
        qkv_concat=options.qkv_concat,
        keys=orders_in(options),
        overwrite=options.overwrite,
        progress=progress(console, "merged"),
        log=console.log,
    )
    files = len(exported.files)
    console.log(
        f"{options.output_dir}: {exported.tensors} tensors in {files} file{'s' * (files != 1)}"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
