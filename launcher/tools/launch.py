"""The positional arguments of msrun.sh: those of MindFormers' msrun_launcher.sh.

The first one is split into words as in a shell, and nothing in it is executed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import Problem, UserError
from launcher.project_files import ROOT, run_script

USAGE = """\
usage: bash msrun.sh "run.py --config x.yaml --run_mode train"                          8 workers
       bash msrun.sh "..." WORKER_NUM
       bash msrun.sh "..." WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
       bash msrun.sh "..." WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT NODE_RANK LOG_DIR JOIN \\
           CLUSTER_TIME_OUT\
"""
_FORMS: dict[int, tuple[str, ...]] = {
    1: (),
    2: ("worker_num",),
    6: ("worker_num", "master_port", "log_dir", "join", "cluster_time_out"),
    9: (
        *("worker_num", "local_worker", "master_addr", "master_port", "node_rank", "log_dir"),
        *("join", "cluster_time_out"),
    ),
}
_DEFAULTS = {"worker_num": "8", "log_dir": "output/msrun_log", "cluster_time_out": "7200"}
_PYTHON = re.compile(r"python[\d.]*")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One node's part of a job."""

    script: Path
    arguments: tuple[str, ...]
    workers: int
    """Processes of the job."""
    local_workers: int
    """Processes of each node."""
    master_addr: str
    master_port: int | None
    """None: any free one."""
    node_rank: int
    log_dir: Path
    timeout_seconds: int
    """How long the nodes wait for each other at the start."""

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.workers // self.local_workers

    @property
    def ranks(self) -> range:
        """The ranks of this node."""
        first = self.node_rank * self.local_workers
        return range(first, first + self.local_workers)

    @property
    def has_console(self) -> bool:
        """Whether the console of this node shows rank 0."""
        return 0 in self.ranks

    @property
    def scheduler_log(self) -> Path:
        """The file with the output of torchrun."""
        name = f"scheduler_{self.node_rank}.log" if self.node_rank else "scheduler.log"
        return self.log_dir / name

    def worker_log(self, rank: int) -> Path:
        """The file with the output of one worker."""
        return self.log_dir / f"worker_{rank}.log"


class _Words:
    """The positional arguments by name. All problems are collected."""

    def __init__(self, written: dict[str, str]) -> None:
        self.written = written
        self.problems: list[Problem] = []

    def reject(self, name: str, rule: str, nearest: str = "") -> None:
        self.problems.append(
            Problem(
                what=f"{name.upper()} = {self.written[name]!r}",
                where="msrun.sh",
                rule=rule,
                nearest=nearest,
            )
        )

    def number(self, name: str, least: int, most: int | None, default: int) -> int:
        """An integer from `least` to `most`; `default` where it is not given or not valid."""
        text = self.written.get(name)
        if text is None:
            return default
        number = int(text) if re.fullmatch(r"-?\d{1,9}", text) else None
        if number is not None and number >= least and (most is None or number <= most):
            return number
        nearest = "" if number is None else f"Nearest: {least if number < least else most}"
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        self.reject(name, f"it must be an integer {bounds}", nearest)
        return default


def read(argv: Sequence[str]) -> Launch:
    """The job of the positional arguments. Raises UserError with all problems."""
    if len(argv) not in _FORMS:
        raise UserError(
            f"{len(argv)} arguments",
            where="msrun.sh",
            rule="it takes 1, 2, 6 or 9",
            advice=f"Quote the command, as in\n{USAGE}\n",
        )
    command, *rest = argv
    words = _Words({**_DEFAULTS, **dict(zip(_FORMS[len(argv)], rest, strict=True))})
    workers = words.number("worker_num", 1, None, 1)
    local = words.number("local_worker", 1, None, workers)
    if workers % local:
        near = [n for n in (workers // local * local, (workers // local + 1) * local) if n]
        rule = f"every node has LOCAL_WORKER ({local}) workers"
        words.reject("worker_num", rule, f"Nearest: {' or '.join(map(str, near))}")
        local = workers
    last_node = None if words.problems else workers // local - 1
    node_rank = words.number("node_rank", 0, last_node, 0)
    port = words.number("master_port", 1, 65535, 0)
    timeout = words.number("cluster_time_out", 1, None, 1)
    if words.written.get("join", "False").lower() not in ("true", "false"):
        words.reject("join", "it must be True or False")
    script, arguments = _command(command, words.problems)
    if words.problems:
        raise UserError(words.problems)
    return Launch(
        script=script,
        arguments=tuple(arguments),
        workers=workers,
        local_workers=local,
        master_addr=words.written.get("master_addr", "127.0.0.1")
        if local < workers
        else "127.0.0.1",
        master_port=port or None,
        node_rank=node_rank,
        log_dir=Path(words.written["log_dir"]),
        timeout_seconds=timeout,
    )


def _command(text: str, problems: list[Problem]) -> tuple[Path, list[str]]:
    """Script and arguments of the first argument; a leading interpreter is dropped."""
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        problems.append(
            Problem(
                what=f"the command {text!r} cannot be split into words",
                where="msrun.sh",
                rule=str(error),
                advice="Close every quote: --predict_data 'I love Beijing, because'",
            )
        )
        return Path(), []
    if words and _PYTHON.fullmatch(Path(words[0]).name):
        words = words[1:]
    if not words:
        words = [""]
    for folder in (Path(), ROOT):
        if words[0] and (folder / words[0]).is_file():
            return (folder / words[0]).absolute(), words[1:]
    if words[0] == "run.py":
        return run_script(), words[1:]
    problems.append(
        Problem(
            what=f"script {words[0]!r} not found",
            where="msrun.sh",
            rule="the command begins with a script, in the current directory or next to msrun.sh",
            nearest="Nearest: run.py",
            advice='Write "run.py --config x.yaml --run_mode train"',
        )
    )
    return Path(), []
