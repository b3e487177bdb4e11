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
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from launcher.errors import EXIT_OK, UserError
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, count

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_TASK = re.compile(r"^task:[ \t]*[^\s\[]", re.MULTILINE)
"""A file of one task; others are parts that tasks include, or groups."""


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
    add("--num_fewshot", type=_examples, metavar="N", help="examples in front of each question")
    add("--limit", type=count, metavar="N", help="only the first N documents of each task")
    add("--apply_chat_template", action="store_true", help="questions are turns of a chat")
    add("--seed", type=int, default=1, metavar="N", help="of few-shot examples and sampling (1)")
    add("--output_path", type=Path, default=Path("lm_eval.json"), metavar="FILE",
        help="where the results are written (lm_eval.json)")  # fmt: skip
    add("--trust_task_code", action="store_true",
        help="run the Python functions that task files name with !function")  # fmt: skip
    return parser.parse(arguments)


def _examples(text: str) -> int:
    """A number of examples, for `argparse`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


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
            file for file in sorted(path.rglob("*.y*ml"))
            if file.is_file() and _TASK.search(file.read_text("utf-8", errors="replace"))
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
    """Raises `UserError` for files that are no tasks, and for those that name Python functions,
    also in what they include, unless they are `trusted`."""
    for file in files:
        if not {"task", "group"} & _keys(_root(file)):
            raise UserError(
                "there is neither `task` nor `group`", where=str(file),
                rule="a task of lm-eval has a name", nearest=f"Nearest: task: {file.stem}",
            )  # fmt: skip
    waiting, seen = [*files], set[Path]()
    while waiting and not trusted:
        file = waiting.pop(0)
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        for node in _nodes(_root(file)):
            if _is_code(node):
                raise UserError(
                    f"{node.tag}: this runs Python code of the task",
                    where=f"{file}:{node.start_mark.line + 1}",
                    rule="code beside a task runs only if you ask for it",
                    nearest="--trust_task_code",
                )
            waiting += [file.parent / name for name in _included(node)]


def _root(file: Path) -> yaml.Node | None:
    """The tree of a YAML file, of which nothing is constructed. Raises `UserError`."""
    try:
        found: yaml.Node | None = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
        return found
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(
            f"this is not valid YAML: {error.problem or error.context}",
            where=f"{file}:{mark.line + 1}" if mark else str(file), advice="Fix the task",
        ) from None  # fmt: skip
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the task cannot be read: {error}", where=str(file)) from None


def _nodes(root: yaml.Node | None) -> Iterator[yaml.Node]:
    """Every node of a tree once, whatever refers to it several times."""
    waiting, seen = [] if root is None else [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _is_code(node: yaml.Node) -> bool:
    """Whether a tag is none of YAML's own plain ones."""
    return not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag


def _keys(root: yaml.Node | None) -> set[str]:
    return {key.value for key, _ in root.value} if isinstance(root, yaml.MappingNode) else set()


def _included(node: yaml.Node) -> Iterator[str]:
    """The files that a section includes."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "include":
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (str(part.value) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
