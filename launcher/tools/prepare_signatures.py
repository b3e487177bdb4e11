"""Pairs of a question and its answer for fine-tuning: from the docstring of a function in Python's
standard library to its signature.

    python -m launcher.tools.prepare_signatures --output_dir data/signatures

Owns the folder it makes: `train.jsonl` and `heldout.jsonl`, one conversation a line (`messages` of
a user and an assistant). Files of the library that the quickstart holds out are held out here.
Invariants: the folder appears complete or not at all, and an existing one is never changed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.errors import EXIT_OK, EXIT_USER, UserError
from launcher.tools.standard_library import is_held_out, sources, standard_library

LONGEST_QUESTION, LONGEST_ANSWER = 240, 100
"""Characters; functions beyond are left out."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tools.prepare_signatures")
    parser.add_argument("--output_dir", type=Path, default=Path("data/signatures"))
    arguments = parser.parse_args(argv)
    try:
        counts = prepare(arguments.output_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    print(f"{arguments.output_dir} is made: {counts['train']} pairs to train on and "
          f"{counts['heldout']} held out")  # fmt: skip
    return EXIT_OK


def prepare(output_dir: Path) -> dict[str, int]:
    """Make the folder. Returns the number of pairs in each file. Raises UserError."""
    if output_dir.exists():
        raise UserError(
            f"--output_dir {output_dir} exists",
            rule="an existing folder is never changed",
            advice="Name another folder, or remove that one yourself",
        )
    library = standard_library()
    scratch = output_dir.parent / f".{output_dir.name}.{os.getpid()}.tmp"
    scratch.mkdir(parents=True)
    counts = {"train": 0, "heldout": 0}
    seen: set[str] = set()
    try:
        with (
            (scratch / "train.jsonl").open("w") as train,
            (scratch / "heldout.jsonl").open("w") as heldout,
        ):
            for path in sources(library):
                name, file = ("heldout", heldout) if is_held_out(path, library) else (
                    "train", train)  # fmt: skip
                for question, answer in pairs(path.read_text(encoding="utf-8")):
                    if question not in seen:
                        seen.add(question)
                        counts[name] += 1
                        file.write(json.dumps(_conversation(question, answer)) + "\n")
        scratch.rename(output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return counts


def pairs(source: str) -> Iterator[tuple[str, str]]:
    """(first paragraph of the docstring, signature) of every function in `source` that has both."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in old files
            tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        question = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        answer = f"def {node.name}({ast.unparse(node.args)}):"
        if 10 <= len(question) <= LONGEST_QUESTION and len(answer) <= LONGEST_ANSWER:
            yield question, answer


def _conversation(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


if __name__ == "__main__":
    sys.exit(main())
