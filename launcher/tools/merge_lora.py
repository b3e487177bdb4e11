"""Merge an adapter into its base: a complete Hugging Face directory with W + scaling * B A.

    python -m launcher.tools.merge_lora --load_checkpoint output/checkpoint --output_dir merged

Takes a folder of checkpoints of a run with pet_config (the newest save; --best or --file_suffix
choose another), one of its rank files, or a directory of PEFT. The base is the one that the adapter
names, or given. In Python: `launcher.weights.merge_adapter(path, output_dir)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK
from launcher.report.console import Console
from launcher.tools.command import Parser, answer
from launcher.tools.export import directory_arguments, report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("merge_lora", "Merge an adapter into its base.")
    add = parser.add_argument
    add("--load_checkpoint", type=Path, required=True, metavar="PATH",
        help="folder of checkpoints, a rank file, or a directory of PEFT")  # fmt: skip
    add("--pretrained_model_dir", type=Path, metavar="DIR",
        help="the base (default: the one that the adapter names)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_save_choice()
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="cast the weights (default: that of the base)")  # fmt: skip
    add("--max_shard_size", default="5GB", metavar="SIZE", help="maximum bytes of a file (5GB)")
    parser.add_orders()
    parser.add_threads()
    add("--overwrite", action="store_true", help="replace an existing output_dir")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _merge(parse(arguments), console))


def _merge(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.adapter import merge_adapter

    directory = merge_adapter(
        options.load_checkpoint, options.output_dir, base=options.pretrained_model_dir,
        **directory_arguments(options, console, "merged"),
    )  # fmt: skip
    report(options, directory, console)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
