"""Convert files of torch or MindSpore to safetensors.

    python -m launcher.tools.ckpt_to_safetensors --file_path pytorch_model.bin --save_path converted

Takes a file, a folder of files (with pytorch_model.bin.index.json or without), or a folder of rank
folders. Nothing in the files is executed. The same in Python:
`launcher.weights.ckpt_to_safetensors(file_path, save_path)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from launcher.errors import EXIT_OK
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, progress


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("ckpt_to_safetensors", "Convert files of torch or MindSpore to safetensors.")
    parser.add_conversion("a file (.ckpt, .pt, .pth, .bin)")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _convert(parse(arguments), console))


def _convert(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.convert import ckpt_to_safetensors, read_name_map

    converted = ckpt_to_safetensors(
        options.file_path,
        options.save_path,
        read_name_map(options.name_map) if options.name_map else None,
        options.file_name_regex,
        options.processes_num,
        overwrite=options.overwrite,
        progress=progress(console, "converted"),
        log=console.log,
    )
    files = converted.files
    where = options.save_path or files[0]
    console.log(
        f"{where}: {converted.tensors} tensors in {len(files)} file{'s' * (len(files) != 1)}"
    )
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
