"""Multiple-choice and other tasks of lm-eval, from local files.

    pip install "slipway[lm-eval]"
    python -m launcher.tools.lm_eval --load_checkpoint output/checkpoint --tasks my_tasks/

Takes a folder of checkpoints, a rank file, or a Hugging Face directory. A task is a YAML file of
lm-eval (https://github.com/EleutherAI/lm-evaluation-harness, docs/task_guide.md) whose data is
local, such as `dataset_path: json` with `dataset_kwargs: {data_files: ...}`; a folder has several.
Nothing is downloaded. Prints a table and writes `--output_path`. Under torchrun the model is spread
over all processes with tensor parallelism.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import EXIT_OK, UserError
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, count

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_TASK = re.compile(r"^task:[ \t]*[^\s\[]", re.MULTILINE)
"""A file of one task; others are parts that tasks include, or groups."""
_INCLUDE = re.compile(r"^include:[ \t]*(\S+)", re.MULTILINE)
_FUNCTION = re.compile(r"!function\b")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("lm_eval", "Evaluate a model on local tasks of lm-eval.")
    add = parser.add_argument
    add("--load_checkpoint", type=Path, required=True, metavar="PATH",
        help="folder of checkpoints, a rank file, or a Hugging Face directory")  # fmt: skip
    add("--tasks", type=Path, nargs="+", required=True, metavar="PATH",
        help="YAML files of tasks, or folders of them")  # fmt: skip
    add("--config", metavar="YAML",
        help="configuration of the model (default: config.json beside the weights)")  # fmt: skip
    add("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer of this directory")
    add("--compute_dtype", choices=("float32", "bfloat16", "float16"), metavar="DTYPE",
        help="of the model (default: that of config.json)")  # fmt: skip
    add("--batch_size", type=count, default=8, metavar="N", help="rows computed together (8)")
    add("--num_fewshot", type=int, metavar="N", help="examples in front of each question")
    add("--limit", type=count, metavar="N", help="only the first N documents of each task")
    add("--apply_chat_template", action="store_true", help="questions are turns of a chat")
    add("--seed", type=int, default=1, metavar="N", help="of few-shot examples and sampling (1)")
    add("--output_path", type=Path, default=Path("lm_eval.json"), metavar="FILE",
        help="where the results are written (lm_eval.json)")  # fmt: skip
    add("--trust_task_code", action="store_true",
        help="run the Python functions that task files name with !function")  # fmt: skip
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _evaluate(parse(arguments), console))


def _evaluate(options: argparse.Namespace, console: Console) -> int:
    files = task_files(options.tasks)
    check_tasks(files, trusted=options.trust_task_code)
    check_installed()
    os.environ.update(dict.fromkeys(OFFLINE, "1"))  # read when datasets is imported
    from launcher.builders.harness import evaluate_tasks

    return evaluate_tasks(options, files, console) or EXIT_OK


def check_installed() -> None:
    """Raises `UserError` without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "the Python package lm-eval is not installed",
            rule="it computes the tasks",
            advice='Install it: pip install "slipway[lm-eval]"',
        )


def task_files(paths: Sequence[Path]) -> list[Path]:
    """The YAML files of tasks at `paths`. Raises `UserError` where there are none."""
    found: list[Path] = []
    for path in paths:
        files = [path] if path.is_file() else [
            file for file in sorted(path.rglob("*.y*ml")) if _TASK.search(file.read_text("utf-8"))
        ]  # fmt: skip
        if not files:
            raise UserError(
                f"--tasks: {path} {'has no task' if path.is_dir() else 'does not exist'}",
                rule="a task is a YAML file of lm-eval, with local data",
                advice="Names of tasks of lm-eval are not known here: their data is on the hub",
            )
        found += files
    return found


def check_tasks(files: Sequence[Path], *, trusted: bool) -> None:
    """Raises `UserError` for task files that name Python functions, also in what they include,
    unless they are `trusted`."""
    waiting, seen = [*files], set[Path]()
    while waiting and not trusted:
        file = waiting.pop(0)
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8")
        waiting += [file.parent / name.strip("'\"") for name in _INCLUDE.findall(text)]
        for number, line in enumerate(text.splitlines(), 1):
            if _FUNCTION.search(line.partition(" #")[0]):
                raise UserError(
                    f"{line.strip()}: this runs Python code of the task",
                    where=f"{file}:{number}",
                    rule="code beside a task runs only if you ask for it",
                    nearest="--trust_task_code",
                )


if __name__ == "__main__":
    sys.exit(main())
