"""Peers: a rank that fails or is killed ends all ranks within seconds.

    rank 0 ── a connection to each other rank; closed without `done`, that rank was killed
    store  ── the first failure of the job, written by the first to notice, polled by all

Owns the threads that watch both. A rank may wait for a dead peer anywhere: during the rendezvous,
in an NCCL collective, in a barrier while rank 0 prepares data. Collectives time out late or never,
and the launcher of one machine does not end those of others.

Invariants: a rank that is about to fail itself has `GRACE_SECONDS` to do so, since its own error is
more useful; a rank that has sent `done` is never considered killed.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

from launcher.environment import ProcessEnvironment, has_own_log, process_environment
from launcher.parallel.failure import Failure, FailureRecord

POLL_SECONDS = 0.5
GRACE_SECONDS = 2.0
"""How long a rank may still end with its own error after a failure elsewhere."""
KILL_GRACE_SECONDS = 1.0
"""How long a launcher has to report the signal that killed a rank, before rank 0 reports that it
was killed."""
CONNECT_SECONDS = 30.0
STORE_SECONDS = 3.0
"""How long a failing rank waits to write the reason to the store."""
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Idle seconds, seconds between probes, probes: a machine without power is detected in 30 s."""
_ADDRESS = "address"
_DONE = b'{"done": true}\n'
_MAX_BYTES = 65536
"""Of a message; a connection that sends more without a newline is not from a rank."""

End = Callable[[Failure], None]


def end_process(failure: Failure) -> None:
    """End this process with the exit code of the failure, wherever its main thread waits."""
    environment = process_environment()
    if environment.local_rank == 0 or has_own_log():  # else the ranks of a machine share a console
        print(f"[rank {environment.rank}] error: ended, because {failure}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure.exit_code)


class Peers:
    """Watches the other ranks of the job in threads, until `close` or `fail`.

    One thread reads the connections and one the store: after a network failure a request to the
    store takes a quarter of an hour.
    """

    def __init__(self, environment: ProcessEnvironment, *, end: End = end_process) -> None:
        self._environment = environment
        self._end = end
        self._record: FailureRecord | None = None
        self._link: _Hub | _Spoke | None = None
        self._closed = threading.Event()

    def start(self, record: FailureRecord) -> None:
        """Begin to watch. `record`: its connection must not be used elsewhere."""
        self._record = record
        is_main = self._environment.rank == 0
        self._link = _Hub(record) if is_main else _Spoke(record, self._environment)
        for look in (self._at_connections, self._at_store):
            threading.Thread(target=self._watch, args=(look,), name="peers", daemon=True).start()

    def fail(self, exit_code: int, reason: str) -> None:
        """Report to all ranks that this one fails, and stop watching. The first failure counts."""
        if self._closed.is_set() or self._link is None:
            return
        self._closed.set()
        self._pass_on(Failure.of_this_host(self._environment.rank, exit_code, reason))

    def close(self) -> None:
        """Stop watching: this rank is done."""
        if self._closed.is_set() or self._link is None:
            return
        self._closed.set()
        self._link.send(_DONE)

    def _watch(self, look: Callable[[], Failure | None]) -> None:
        while not self._closed.is_set():
            failure = look()
            if failure is not None:
                if not self._closed.wait(GRACE_SECONDS):
                    self._end(failure)
                return

    def _at_connections(self) -> Failure | None:
        assert self._link is not None
        failure = self._link.poll(POLL_SECONDS)
        if failure is not None and isinstance(self._link, _Hub):
            self._pass_on(failure)
        return failure

    def _at_store(self) -> Failure | None:
        assert self._record is not None
        self._closed.wait(POLL_SECONDS)
        try:
            return self._record.read()
        except (RuntimeError, ValueError):  # the store is gone: the connections report why
            self._closed.wait(CONNECT_SECONDS)
            return None

    def _pass_on(self, failure: Failure) -> None:
        """Send a failure to the connected ranks, and record it."""
        assert self._link is not None
        assert self._record is not None
        self._link.send(_line(failure))
        writing = threading.Thread(target=_write, args=(self._record, failure), daemon=True)
        writing.start()
        writing.join(STORE_SECONDS)


def _write(record: FailureRecord, failure: Failure) -> None:
    with suppress(RuntimeError, ValueError):
        record.write(failure)


def _line(failure: Failure) -> bytes:
    return f'{{"failed": {failure.to_json()}}}\n'.encode()


class _Connection:
    """A socket, and the received part of an incomplete line."""

    def __init__(self, sock: socket.socket, rank: int | None = None) -> None:
        self.sock, self.rank = sock, rank
        self.host = "an unknown machine"
        self.is_done = False
        self.ended_at: float | None = None
        self._pending = b""
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def messages(self) -> Iterator[dict[str, Any]]:
        """The received messages; sets `ended_at` when the other end has closed."""
        try:
            data = self.sock.recv(_MAX_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(self._pending) > _MAX_BYTES:
            self.ended_at = time.monotonic()
            return
        *lines, self._pending = (self._pending + data).split(b"\n")
        for line in lines:
            with suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    yield message

    def send(self, data: bytes) -> None:
        """Send a short message; without room in the buffer it is dropped."""
        with suppress(OSError):
            self.sock.send(data)


class _Hub:
    """Rank 0: a connection to every other rank."""

    def __init__(self, record: FailureRecord) -> None:
        self._token = secrets.token_hex(16)
        self._listener = socket.create_server(
            ("", 0), family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
            backlog=1024, dualstack_ipv6=socket.has_dualstack_ipv6(),
        )  # fmt: skip
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: list[_Connection] = []
        port = self._listener.getsockname()[1]
        record.store.set(_ADDRESS, json.dumps({"port": port, "token": self._token}))

    def send(self, data: bytes) -> None:
        """Send to every rank."""
        for connection in list(self._connections):
            if connection.rank is not None:
                connection.send(data)

    def poll(self, seconds: float) -> Failure | None:
        """A failure that another rank has sent, or that of a rank that ended without a message."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._accept()
                continue
            for message in key.data.messages():
                failure = self._take(key.data, message)
                if failure is not None:
                    return failure
            if key.data.ended_at is not None:
                self._selector.unregister(key.data.sock)
                key.data.sock.close()
        return self._killed()

    def _accept(self) -> None:
        with suppress(OSError):
            connection = _Connection(self._listener.accept()[0])
            self._connections.append(connection)
            self._selector.register(connection.sock, selectors.EVENT_READ, connection)

    def _take(self, connection: _Connection, message: dict[str, Any]) -> Failure | None:
        if connection.rank is None:
            if message.get("token") == self._token:
                connection.rank, connection.host = int(message["rank"]), str(message["host"])
        elif message.get("done"):
            connection.is_done = True
        elif "failed" in message:
            return Failure(**message["failed"])
        return None

    def _killed(self) -> Failure | None:
        now = time.monotonic()
        for connection in self._connections:
            ended = connection.ended_at
            if ended is None or connection.is_done or connection.rank is None:
                continue
            if now - ended >= KILL_GRACE_SECONDS:
                return _killed(connection.rank, connection.host)
        return None


class _Spoke:
    """A rank other than 0: one connection, to rank 0."""

    def __init__(self, record: FailureRecord, environment: ProcessEnvironment) -> None:
        self._record, self._environment = record, environment
        self._connection: _Connection | None = None

    def send(self, data: bytes) -> None:
        """Send to rank 0."""
        if self._connection is not None:
            self._connection.send(data)

    def poll(self, seconds: float) -> Failure | None:
        """A failure that rank 0 has sent, or that of rank 0 if it ended without a message."""
        if self._connection is None:
            self._connection = self._connect()
            if self._connection is None:
                time.sleep(seconds)
            return None
        connection = self._connection
        if connection.is_done or connection.ended_at is not None:
            time.sleep(seconds)
        else:
            with selectors.DefaultSelector() as selector:
                selector.register(connection.sock, selectors.EVENT_READ)
                if selector.select(seconds):
                    for message in connection.messages():
                        if "failed" in message:
                            return Failure(**message["failed"])
                        connection.is_done |= bool(message.get("done"))
        ended = connection.ended_at
        late = ended is not None and time.monotonic() - ended >= KILL_GRACE_SECONDS
        if not late or connection.is_done:
            return None
        return _killed(0, self._environment.master_addr)

    def _connect(self) -> _Connection | None:
        """A connection, once rank 0 has published its port."""
        with suppress(RuntimeError, OSError, ValueError):
            if not self._record.store.check([_ADDRESS]):
                return None
            address = json.loads(self._record.store.get(_ADDRESS))
            sock = socket.create_connection(
                (self._environment.master_addr, address["port"]), CONNECT_SECONDS
            )
            connection = _Connection(sock)
            hello = {"rank": self._environment.rank, "host": socket.gethostname(),
                     "token": address["token"]}  # fmt: skip
            connection.send(json.dumps(hello).encode() + b"\n")
            return connection
        return None


def _killed(rank: int, host: str) -> Failure:
    return Failure(
        rank=rank, host=host, exit_code=1,
        reason="it ended without a message: it was killed, or its machine or network failed",
    )  # fmt: skip


_watching: Peers | None = None


def watch(environment: ProcessEnvironment) -> None:
    """Watch the peers of this process until it ends. Raises `RuntimeError` when the store of the
    job cannot be reached."""
    global _watching
    record = FailureRecord.connect(environment, timedelta(seconds=CONNECT_SECONDS))
    _watching = Peers(environment)
    _watching.start(record)


def watching() -> Peers | None:
    """The `Peers` of this process, if any."""
    return cast("Peers | None", _watching)
