"""The launchers on the nodes of a job report failures to each other through the job's store.

Ranks watch each other once they have started (`launcher.parallel.peers`); they cannot see a node
whose configuration is invalid, or a rank that was killed before it joined. Node 0 serves the store,
and keeps it open after a failure until the other nodes have read it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from launcher.environment import ProcessEnvironment
from launcher.parallel.failure import Failure, FailureRecord
from launcher.tools.launch import Launch

POLL_SECONDS = 0.5
CONNECT_SECONDS = 3.0
LINGER_SECONDS = 5.0
"""How long node 0 serves the record of a failure for nodes that have not read it."""
REPORT_SECONDS = 10.0
"""How long a node that does not start tries to reach node 0."""
WORKER_SECONDS = 8.0
"""How long the ranks of this node may take to end by themselves."""
_SEEN = "seen"


class NodeWatch:
    """Ends this node when another one has failed: `with NodeWatch(launch) as watch: ...`."""

    def __init__(self, launch: Launch, write: Callable[[str], None]) -> None:
        """`write`: prints a line on the console of this node."""
        self._launch, self._write = launch, write
        self._server = _serve(launch) if launch.node_rank == 0 else None
        self._record: FailureRecord | None = None
        self._failure: Failure | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
        if self._server is not None and self._failure is not None:
            _linger(FailureRecord(self._server), self._launch.nodes - 1)

    def record(self, failure: Failure) -> Failure:
        """Record a failure of this node. Returns the first one of the job."""
        answers = self._stop()
        if self._failure is None:
            self._failure = failure
            with suppress(RuntimeError, ValueError):
                if answers:
                    record = self._record or self._connect()
                    self._failure = record.write(failure)
                    self._acknowledge(record)
        return self._failure

    @property
    def failure(self) -> Failure | None:
        """The first failure of the job that this node knows of."""
        return self._failure

    def _stop(self) -> bool:
        """End the watch. Returns whether the store answers: without a network that may take 15
        minutes."""
        self._closed.set()
        self._thread.join(CONNECT_SECONDS + POLL_SECONDS)
        return not self._thread.is_alive()

    def _acknowledge(self, record: FailureRecord) -> None:
        """Report to node 0 that this node has read the failure."""
        if self._server is None:
            with suppress(RuntimeError):
                record.store.add(_SEEN, 1)

    def _connect(self) -> FailureRecord:
        if self._server is not None:
            return FailureRecord(self._server)
        return FailureRecord.connect(_address(self._launch), timedelta(seconds=CONNECT_SECONDS))

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                self._record = self._record or self._connect()
                self._failure = self._record.read()
            except (RuntimeError, ValueError):
                self._record = None  # not served yet, or no longer
            if self._failure is not None:
                break
        if self._failure is None:
            return
        if self._record is not None:
            self._acknowledge(self._record)
        if self._closed.wait(WORKER_SECONDS if self._has_workers() else 0):
            return
        self._end(self._failure)

    def _has_workers(self) -> bool:
        return any(self._launch.worker_log(rank).exists() for rank in self._launch.ranks)

    def _end(self, failure: Failure) -> None:
        """End this process, whose main thread waits for other nodes or for ranks that hang. Its
        ranks get SIGTERM."""
        sys.stdout.flush()
        self._write(f"msrun: {failure}")
        if self._server is not None:
            _linger(FailureRecord(self._server), self._launch.nodes - 1)
        os._exit(failure.exit_code)


def report(launch: Launch, failure: Failure) -> None:
    """Record the failure of a node that does not start, for those that wait for it."""
    with suppress(RuntimeError, ValueError, OSError):
        if launch.node_rank == 0:
            record = FailureRecord(_serve(launch))
            record.write(failure)
            _linger(record, launch.nodes - 1)
        else:
            _reach(launch, REPORT_SECONDS).write(failure)


def _reach(launch: Launch, seconds: float) -> FailureRecord:
    """A connection to node 0, which may just be starting. Raises `RuntimeError`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return FailureRecord.connect(_address(launch), timedelta(seconds=CONNECT_SECONDS))
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _linger(record: FailureRecord, others: int) -> None:
    """Keep the store until `others` nodes have read the failure, or for `LINGER_SECONDS`."""
    deadline = time.monotonic() + LINGER_SECONDS
    with suppress(RuntimeError):
        while time.monotonic() < deadline and record.store.add(_SEEN, 0) < others:
            time.sleep(0.1)


def _serve(launch: Launch) -> dist.Store:
    """The store of the job; torchrun's own, in the same process, shares its port."""
    assert launch.master_port is not None
    return dist.TCPStore(
        launch.master_addr, launch.master_port, is_master=True, wait_for_workers=False,
        multi_tenant=True, timeout=timedelta(seconds=launch.timeout_seconds),
    )  # fmt: skip


def _address(launch: Launch) -> ProcessEnvironment:
    assert launch.master_port is not None
    return ProcessEnvironment(master_addr=launch.master_addr, master_port=launch.master_port)
