"""The environment variables that describe this process in a job (those of `torchrun`).

Owns their names and types; nothing else in the project reads them. Variables left over from another
job are a common cause of a run that hangs, so values that do not fit together are errors that name
the variable. Imports the standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import Problem, UserError

PLANNED_WORLD_SIZE = "SLIPWAY_WORLD_SIZE"
"""Set by msrun.sh while it checks the configuration: processes it is about to start."""
OWN_LOG = "SLIPWAY_WORKER_LOG"
"""Set by msrun.sh for its workers: the file their output goes to."""
OF_A_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""Variables that a launcher sets for each process, and that it should not have itself."""
_LARGEST_PORT = 65535
_ADVICE = "Unset it, or start the job with msrun.sh or torchrun"


@dataclass(frozen=True, kw_only=True)
class ProcessEnvironment:
    """This process among those of its job; the defaults are those of a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    """Processes of the job on this machine."""
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    restart_count: int = 0
    """How often torchrun has restarted the job."""
    uses_agent_store: bool = False
    """Whether the key-value store of the job is served by the launcher and not by rank 0."""
    planned_world_size: int | None = None

    @property
    def is_launched(self) -> bool:
        """Whether a launcher started this process as one of several."""
        return self.world_size > 1

    @property
    def has_several_machines(self) -> bool:
        """Whether other machines belong to the job."""
        return self.world_size > self.local_world_size


def process_environment() -> ProcessEnvironment:
    """The variables of this process. Raises `UserError` with every one that is wrong."""
    reader = _Reader(os.environ)
    size = reader.integer("WORLD_SIZE", 1, least=1)
    rank = reader.integer("RANK", 0)
    local_size = reader.integer("LOCAL_WORLD_SIZE", size, least=1)
    local_rank = reader.integer("LOCAL_RANK", 0)
    port, restarts = 29500, 0
    if size > 1:  # a single process does not use these
        port = reader.integer("MASTER_PORT", port, least=1, most=_LARGEST_PORT)
        restarts = reader.integer("TORCHELASTIC_RESTART_COUNT", restarts)
    planned = reader.integer(PLANNED_WORLD_SIZE, 0)
    if not reader.problems:
        reader.check_together(rank, size, local_rank, local_size)
    if reader.problems:
        raise UserError(reader.problems)
    return ProcessEnvironment(
        rank=rank, world_size=size, local_rank=local_rank, local_world_size=min(local_size, size),
        master_addr=os.environ.get("MASTER_ADDR") or "127.0.0.1", master_port=port,
        restart_count=restarts,
        uses_agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        planned_world_size=planned or None,
    )  # fmt: skip


def check_rendezvous() -> None:
    """Several processes have an address to meet: otherwise one that was started alone, with
    WORLD_SIZE left over, would wait for the others. Raises `UserError`."""
    reader = _Reader(os.environ)
    if process_environment().is_launched:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                reader.wrong("WORLD_SIZE", f"a job of several processes also requires {name}")
    if reader.problems:
        raise UserError(reader.problems)


def has_own_log() -> bool:
    """Whether the output of this process goes to a file of its own."""
    return bool(os.environ.get(OWN_LOG))


def rank_or_zero() -> int:
    """The rank of this process, for messages: 0 where the variables are wrong."""
    try:
        return process_environment().rank
    except UserError:
        return 0


class _Reader:
    """Reads variables and collects their problems."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = variables
        self.problems: list[Problem] = []

    def integer(self, name: str, default: int, *, least: int = 0, most: int | None = None) -> int:
        """The number in a variable; `default` where it is not set or wrong."""
        text = self.variables.get(name)
        if text is None:
            return default
        digits = text.strip()
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None
        if number is not None and number >= least and (most is None or number <= most):
            return number
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        self.wrong(name, f"must be an integer {limits}")
        return default

    def check_together(self, rank: int, size: int, local_rank: int, local_size: int) -> None:
        """A rank is below the number of processes."""
        if rank >= size:
            given = "WORLD_SIZE is not set" if "WORLD_SIZE" not in self.variables else (
                f"WORLD_SIZE is {size}")  # fmt: skip
            self.wrong("RANK", f"{given}, so it must be 0 to {size - 1}")
        if local_rank >= local_size:
            self.wrong("LOCAL_RANK", f"this machine has {local_size} processes of the job")

    def wrong(self, name: str, rule: str) -> None:
        """Add a problem with a variable."""
        self.problems.append(
            Problem(
                what=f"{name} = {self.variables.get(name, '')!r}",
                where="environment variable",
                rule=rule,
                advice=_ADVICE,
            )
        )
