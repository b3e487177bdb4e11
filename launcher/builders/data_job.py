"""A job that only opens its data: one process, no process group, no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from launcher.builders.job import Job
from launcher.config import rules
from launcher.config.command_line import parse
from launcher.config.resolve import resolve_command_line
from launcher.errors import UserError
from launcher.parallel.world import World
from launcher.report.console import Console


def data_job(arguments: Sequence[str], console: Console) -> Job:
    """The job of a command line of `run.py`, in this process alone whatever its layout.

    Raises `UserError` with all problems of its data; without a run mode it is that of training.
    """
    named = any(word.partition("=")[0].lstrip("+-") == "run_mode" for word in arguments)
    resolved = resolve_command_line(
        parse([*arguments, *([] if named else ["--run_mode", "train"])])
    )
    found = rules.check(
        resolved.config, resolved.provenance, world=None, bad_keys=resolved.bad_keys,
        rules=rules.DATA_RULES,
    )  # fmt: skip
    if problems := (*resolved.problems, *found):
        raise UserError(problems)
    alone = World(rank=0, size=1, device=torch.device("cpu"))
    return Job(resolved.config, resolved.provenance, alone, console)
