"""What the offline commands share: parser, progress and exit codes.

Mistakes on the command line are reported like all others, with the nearest valid option.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from launcher.errors import EXIT_SIGINT, EXIT_USER, UserError, did_you_mean, path_problem
from launcher.report.console import Console

Progress = Callable[[int, int], None]


class Parser(argparse.ArgumentParser):
    """A parser that raises `UserError`; options cannot be abbreviated."""

    def __init__(self, tool: str, description: str) -> None:
        super().__init__(
            prog=f"python -m launcher.tools.{tool}", description=description, allow_abbrev=False
        )

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The command line. Raises `UserError`."""
        given = sys.argv[1:] if arguments is None else arguments
        options = [option for option in self._option_string_actions if option.startswith("--")]
        # Before argparse, which would first report a missing required option.
        words = [word.partition("=")[0] for word in given if word.startswith("--")]
        misspelt = [word for word in words if word not in options and word != "--"]
        known, unknown = (None, misspelt) if misspelt else self.parse_known_args(arguments)
        if unknown or known is None:
            word = unknown[0].partition("=")[0]
            raise UserError(
                f"{word}: no such {'option' if word.startswith('-') else 'argument'}",
                where="command line",
                nearest=did_you_mean(word, options),
                advice=f"See {self.prog} --help",
            )
        return known

    def add_strategies(self) -> None:
        """`--src_strategy_dirs`: the layout of rank files that do not describe it."""
        self.add_argument(
            "--src_strategy_dirs",
            type=Path,
            metavar="PATH",
            help="strategy file, or folder of them, for rank files of MindSpore",
        )

    def add_threads(self) -> None:
        """`--max_process_num`, the name of MindSpore's tools: a number of threads."""
        self.add_argument(
            "--max_process_num",
            type=count,
            default=4,
            metavar="N",
            help="threads that read and write (4, at most 8)",
        )

    def add_conversion(self, files: str) -> None:
        """The arguments of a conversion of files, by MindSpore's names; `files`: which are read."""
        self.add_argument(
            "--file_path",
            type=Path,
            required=True,
            metavar="PATH",
            help=f"{files}, a folder of them, or a folder of rank folders",
        )
        self.add_argument(
            "--save_path",
            type=Path,
            metavar="DIR",
            help="folder of the new files; optional for a single file (default: beside it)",
        )
        add = self.add_argument
        add("--name_map", type=Path, metavar="JSON", help='a file such as {"old name": "new name"}')
        add("--file_name_regex", metavar="REGEX", help="convert only files whose name matches")
        add("--processes_num", type=count, default=1, metavar="N", help="files at a time (1)")
        add("--overwrite", action="store_true", help="replace existing files")

    def add_save_choice(self) -> None:
        """`--file_suffix` or `--best`: which save of a folder of checkpoints."""
        which = self.add_mutually_exclusive_group()
        which.add_argument("--file_suffix", metavar="E_S",
                           help="the save *-E_S (default: the newest)")  # fmt: skip
        which.add_argument("--best", action="store_true",
                           help="the save with the best evaluation (keep_best)")  # fmt: skip

    def add_orders(self) -> None:
        """The orders of rows that files do not show."""
        add = self.add_argument
        add("--qkv_order", choices=("group", "plain"), help="rows of fused query, key, value")
        add("--mlp_order", choices=("pair", "plain"), help="rows of fused gate and up")
        add("--tensor_parallel", type=count, metavar="N", help="degree behind plain orders (1)")
        add("--use_gmm", "--use_grouped_gemm", type=truth, metavar="True|False", dest="use_gmm",
            help="whether stacked experts are transposed")  # fmt: skip
        add("--use_rearrange_rope", type=truth, metavar="True|False",
            help="whether rows of query and key are stored even ones first (GLM-4-9B)")  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """Report an error of argparse."""
        raise UserError(message, where="command line", advice=f"See {self.prog} --help")


def orders_in(options: argparse.Namespace) -> dict[str, object]:
    """The options of `add_orders` as keys of a configuration."""
    return {
        "mindformers_qkv_order": options.qkv_order,
        "mindformers_mlp_order": options.mlp_order,
        "mindformers_tensor_parallel": options.tensor_parallel,
        "mindformers_use_gmm": options.use_gmm,
        "mindformers_rearranged_rope": options.use_rearrange_rope,
    }


def truth(text: str) -> bool:
    """`True` or `False`, in any case."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def count(text: str) -> int:
    """An integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def answer(work: Callable[[Console], int]) -> int:
    """The exit code of a command: that of `work`, or 2 after an error of the user."""
    _allow_many_files()
    try:
        return work(Console(enabled=True))
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER
    except OSError as error:
        if not error.filename:
            raise
        print(f"error: {path_problem(error)}", file=sys.stderr)
        return EXIT_USER
    except KeyboardInterrupt:
        print("interrupted: nothing was replaced", file=sys.stderr)
        return EXIT_SIGINT


def progress(console: Console, verb: str) -> Progress:
    """A progress line in megabytes."""
    return lambda done, total: console.progress(
        f"{verb} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB", last=done == total
    )


def _allow_many_files() -> None:
    """Raise the limit of open files to its maximum: a save has as many files as ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
