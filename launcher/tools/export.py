"""Export weights as a complete Hugging Face directory, with tokenizer, template and model card.

    python -m launcher.tools.export --load_checkpoint output/checkpoint --output_dir hf

Takes a folder of checkpoints (the newest save; --best or --file_suffix choose another), one of its
rank files, or complete weights. The directory opens in `transformers`, vLLM and llama.cpp's
converter. In Python, without a card: `launcher.weights.export_directory(path, output_dir)`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_OK
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, orders_in, progress

if TYPE_CHECKING:
    from launcher.weights.offline.directory import Chosen, Directory

CARD = "README.md"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("export", "Export weights as a complete Hugging Face directory.")
    add = parser.add_argument
    add("--load_checkpoint", type=Path, required=True, metavar="PATH",
        help="folder of checkpoints, a rank file, or complete weights")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="the new directory")
    parser.add_save_choice()
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="cast the weights (default: unchanged)")  # fmt: skip
    add("--max_shard_size", default="5GB", metavar="SIZE", help="maximum bytes of a file (5GB)")
    add("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer of this directory")
    add("--config", type=Path, metavar="PATH",
        help="config.json or YAML of the model (default: that of the run)")  # fmt: skip
    parser.add_orders()
    parser.add_threads()
    add("--overwrite", action="store_true", help="replace an existing output_dir")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _export(parse(arguments), console))


def _export(options: argparse.Namespace, console: Console) -> int:
    from launcher.weights.offline.directory import export_directory

    directory = export_directory(
        options.load_checkpoint, options.output_dir, tokenizer=options.tokenizer,
        config=options.config, **directory_arguments(options, console, "exported"),
    )  # fmt: skip
    report(options, directory, console)
    return EXIT_OK


def directory_arguments(options: argparse.Namespace, console: Console, verb: str) -> dict[str, Any]:
    """What every tool that writes a complete directory passes on: its options, the progress (bytes
    `verb` so far), and the model card."""
    from launcher.weights.offline.merge import size_in_bytes

    def finish(folder: Path, chosen: Chosen, directory: Directory) -> None:
        (folder / CARD).write_text(card(options, chosen, directory), encoding="utf-8")

    return {
        "suffix": options.file_suffix, "best": options.best, "dtype": options.dtype,
        "max_shard_bytes": size_in_bytes(options.max_shard_size), "keys": orders_in(options),
        "workers": options.max_process_num, "overwrite": options.overwrite,
        "progress": progress(console, verb), "finish": finish, "log": console.log,
    }  # fmt: skip


def card(options: argparse.Namespace, chosen: Chosen, directory: Directory) -> str:
    """The model card of a directory that a tool with these options writes."""
    from launcher.report.model_card import CardSubject, model_card
    from launcher.report.run_record import read_run_record

    record = read_run_record(chosen.rank_file) if chosen.rank_file is not None else None
    subject = CardSubject(
        name=options.output_dir.resolve().name,
        config=directory.config,
        parameters=directory.parameters,
        weight_bytes=directory.exported.total_bytes,
        files=len(directory.exported.files),
        has_tokenizer=directory.has_tokenizer,
        has_template=directory.has_template,
        generation=directory.generation,
        source=str(options.load_checkpoint),
    )
    return model_card(subject, record)


def report(options: argparse.Namespace, directory: Directory, console: Console) -> None:
    """Log what was written, and what it lacks."""
    exported, files = directory.exported, len(directory.exported.files)
    template = "its chat template" if directory.has_template else "no chat template"
    tokenizer = f"the tokenizer, {template}" if directory.has_tokenizer else "no tokenizer"
    console.log(
        f"{options.output_dir}: {exported.tensors} tensors, {exported.total_bytes / 1e6:,.1f} MB "
        f"in {files} file{'s' * (files != 1)}, {tokenizer}, {CARD}"
    )
    if not directory.has_tokenizer:
        console.log(
            "warning: no tokenizer lies with the weights: text cannot be encoded. Add it with "
            "--tokenizer DIR --overwrite"
        )


if __name__ == "__main__":
    sys.exit(main())
