"""Write the adapter of a checkpoint as a directory that PEFT opens.

    python -m launcher.tools.export_adapter --load_checkpoint output/checkpoint --output_dir adapter

Takes a folder of checkpoints of a run with pet_config (the newest save; --best or --file_suffix
choose another) or one of its rank files. In Python: `launcher.weights.export_adapter(path, dir)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK
from launcher.report.console import Console
from launcher.tools.command import Parser, answer


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("export_adapter", "Write the adapter of a checkpoint in the form of PEFT.")
    add = parser.add_argument
    add("--load_checkpoint", type=Path, required=True, metavar="PATH",
        help="folder of checkpoints, or a rank file")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_save_choice()
    add("--overwrite", action="store_true", help="replace an existing output_dir")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _export(parse(arguments), console))


def _export(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.adapter import export_adapter

    names = export_adapter(
        options.load_checkpoint, options.output_dir, suffix=options.file_suffix,
        best=options.best, overwrite=options.overwrite, log=console.log,
    )  # fmt: skip
    console.log(f"{options.output_dir}: an adapter of {len(names)} tensors in the form of PEFT")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
