"""The first failure of a job, kept in its key-value store, where every process can read it.

Owns the record and its key. The first rank that fails writes it, or the launcher of its machine
when the rank could not (it was killed). Later failures, which are mostly consequences, do not
replace it.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from launcher.environment import ProcessEnvironment

REASON_CHARACTERS = 4000
_KEY = "failure"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Which rank failed first, and why."""

    rank: int
    """-1: the launcher of a machine."""
    host: str
    exit_code: int
    reason: str

    @classmethod
    def of_this_host(cls, rank: int, exit_code: int, reason: str) -> Failure:
        """A failure on this machine, with its reason cut to `REASON_CHARACTERS`."""
        return cls(rank=rank, host=socket.gethostname(), exit_code=exit_code,
                   reason=reason[:REASON_CHARACTERS])  # fmt: skip

    def __str__(self) -> str:
        who = "the launcher" if self.rank < 0 else f"rank {self.rank}"
        return f"{who} on {self.host} failed: {self.reason}"

    def to_json(self) -> str:
        """The form used in the store and between ranks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


def job_prefix(restart_count: int) -> str:
    """Prefix of the keys of a job. The launcher's store still has the keys of earlier attempts, so
    each attempt has a prefix."""
    return f"slipway/attempt{restart_count}"


class FailureRecord:
    """The record of one job, with a separate connection to the job's store.

    Raises `RuntimeError` (`torch.distributed.DistError`) where the store cannot be reached.
    """

    def __init__(self, store: dist.Store, restart_count: int = 0) -> None:
        self.store: dist.Store = dist.PrefixStore(f"{job_prefix(restart_count)}/peers", store)

    @classmethod
    def connect(cls, environment: ProcessEnvironment, timeout: timedelta) -> FailureRecord:
        """Connect to the store whose address is in `environment`."""
        address = environment.master_addr, environment.master_port
        # torch logs a page of C++ frames for each address that does not answer.
        try:
            socket.create_connection(address, timeout.total_seconds()).close()
        except OSError as error:
            raise dist.DistNetworkError(f"{address[0]}:{address[1]}: {error}") from error
        store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
        return cls(store, environment.restart_count)

    def read(self) -> Failure | None:
        """The first failure; None while there is none."""
        return Failure.from_json(self.store.get(_KEY)) if self.store.check([_KEY]) else None

    def write(self, failure: Failure) -> Failure:
        """Record `failure` unless there is one already. Returns the recorded one."""
        return Failure.from_json(self.store.compare_set(_KEY, "", failure.to_json()))


def report_failure(environment: ProcessEnvironment, failure: Failure, timeout: timedelta) -> None:
    """Record a failure of a process that has not joined the job; does nothing without a store."""
    with suppress(RuntimeError):
        FailureRecord.connect(environment, timeout).write(failure)
