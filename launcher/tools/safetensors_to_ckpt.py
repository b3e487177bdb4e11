"""Convert files of safetensors to the `.ckpt` of MindSpore.

    python -m launcher.tools.safetensors_to_ckpt --file_path model.safetensors --save_path converted

Takes a file, a folder of files, or a folder of rank folders. The same in Python:
`launcher.weights.safetensors_to_ckpt(file_path, save_path)`.
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
    parser = Parser(
        "safetensors_to_ckpt", "Convert files of safetensors to the .ckpt of MindSpore."
    )
    parser.add_conversion("a file of safetensors")
    parser.add_argument(
        "--crc_check", action="store_true", help="end each file in a checksum for MindSpore"
    )
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _convert(parse(arguments), console))


def _convert(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.convert import read_name_map, safetensors_to_ckpt

    converted = safetensors_to_ckpt(
        options.file_path,
        options.save_path,
        read_name_map(options.name_map) if options.name_map else None,
        options.file_name_regex,
        options.processes_num,
        crc_check=options.crc_check,
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
