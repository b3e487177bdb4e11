"""The command `slipway`, which installing the package puts on the path.

    slipway --config x.yaml --run_mode train     the same as `python run.py ...`
    slipway verify output/checkpoint             an offline tool: `python -m launcher.tools.verify`
    slipway msrun "run.py --config x.yaml" 8     the same as `bash msrun.sh ...`

Owns the names of the tools. A folder named `launcher` or `models` in the current directory is never
imported, which `python -m` would do.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from launcher.errors import EXIT_OK, EXIT_USER, UserError, did_you_mean

TOOLS = {
    "convert": "ckpt_to_safetensors",
    "convert_back": "safetensors_to_ckpt",
    "convert_weight": "convert_weight",
    "diff": "diff",
    "inspect_data": "inspect_data",
    "list": "list_checkpoints",
    "merge": "unified_safetensors",
    "merge_strategy": "merge_strategy",
    "msrun": "msrun",
    "slice": "slice_safetensors",
    "tokenize": "tokenize",
    "verify": "verify",
}
"""Word after `slipway` to the module of `launcher.tools`, whose own name is accepted too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _ignore_current_directory()
    if given and not given[0].startswith("-") and "=" not in given[0]:
        return _run_tool(given[0], given[1:])
    from launcher import cli

    code = cli.main(given, owns_process=arguments is None)
    if "--help" in given or "-h" in given:
        print(f"\nTools: slipway {'|'.join(TOOLS)} --help")
    return code


def entry() -> None:
    """The entry point of the package; ends the process."""
    from launcher.cli import leave

    leave(main())


def _run_tool(word: str, arguments: Sequence[str]) -> int:
    name = TOOLS.get(word, word)
    if name not in TOOLS.values():
        problem = UserError(
            f"unknown command `{word}`",
            where="command line",
            rule="slipway takes options of a run (--config x.yaml), or the name of a tool",
            nearest=did_you_mean(word, TOOLS),
            advice=f"Tools: {', '.join(TOOLS)}",
        )
        print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER
    code = import_module(f"launcher.tools.{name}").main(list(arguments))
    return EXIT_OK if code is None else int(code)


def _ignore_current_directory() -> None:
    """Drop the current directory from the path, where PYTHONPATH put it, unless this package is
    imported from there."""
    own = Path(__file__).resolve().parents[1]
    here = Path.cwd()
    if here != own:
        sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != here]


if __name__ == "__main__":
    entry()
