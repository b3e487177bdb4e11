"""Long work of some ranks, for which the others wait: hours if need be, with its progress.

    leader   runs the work; a thread writes `{"beat": n, "status": ...}` to the store every second
    others   read it, show it, and wait; no collective runs, so that none can time out

Owns the heartbeat. Invariants: the wait has no limit while the heartbeats of all leaders go on;
when one stops for `SILENCE_SECONDS` (its process was stopped or hangs, its machine has failed),
every rank that waits raises an error which names it; an error of the work is the same on every
rank, as everywhere (`all_ranks`). A leader that is killed ends all ranks within seconds (`peers`).
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch.distributed as dist

from launcher.errors import UserError
from launcher.parallel.all_ranks import (
    Outcome,
    P,
    Result,
    capture_error,
    raise_if_any_failed,
)
from launcher.parallel.filesystems import FilesystemGroups
from launcher.parallel.world import World

BEAT_SECONDS = 1.0
POLL_SECONDS = 0.25
FIRST_POLL_SECONDS = 0.01
"""Data from the cache is there at once."""
SILENCE_SECONDS = 180.0
"""Without a heartbeat. A leader may hold the interpreter for long, as while it parses one JSON text
of some gigabytes."""
LOST_SECONDS = 10.0
"""How long a rank that has lost the store waits to be ended for the reason (`peers`)."""

OnWait = Callable[[int, str], None]
"""Called now and then while a rank waits, with the rank it waits for and that one's status."""

_numbers = itertools.count()
"""One for each work, as all ranks begin the same ones in the same order."""


class LongWork:
    """Work on one rank of each file system. `what` names it in errors: `tokenize the data`."""

    def __init__(
        self, world: World, filesystems: FilesystemGroups, *, what: str, on_wait: OnWait
    ) -> None:
        self._world, self._filesystems = world, filesystems
        self._what, self._on_wait = what, on_wait
        self._status = ""

    def report(self, status: str) -> None:
        """Set the status that the waiting ranks are shown; called by the work."""
        self._status = status

    def on_own(self, fn: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        """The result of `fn` on the file system of this rank, run by its leader.

        Called by all ranks together. Raises `UserError` on every rank when it fails on one.
        """
        world, filesystems = self._world, self._filesystems
        if world.size == 1 or world.store is None:
            return filesystems.on_own(world, "", fn, *args, **kwargs)
        store = dist.PrefixStore(f"long_work/{next(_numbers)}", world.store)
        leaders = [group[0] for group in filesystems.groups] or [0]
        outcome: Outcome[Result] | None = None
        if world.rank in leaders:
            with self._beating(store):
                outcome = capture_error(fn, *args, **kwargs)
        others = [leader for leader in leaders if leader != world.rank]
        _Wait(store, others, self._what).until_done(self._on_wait)
        results = raise_if_any_failed(world, outcome)
        if not filesystems.groups:
            return results[0]
        return results[filesystems.groups.index(tuple(filesystems.peers(world)))]

    @contextmanager
    def _beating(self, store: dist.Store) -> Iterator[None]:
        """Write heartbeats, and the end."""
        key, stop = str(self._world.rank), threading.Event()

        def write(beat: int, end: str) -> None:
            store.set(key, json.dumps({"beat": beat, "status": self._status, "end": end}))

        def beat() -> None:
            with suppress(RuntimeError):  # the store is gone, and with it who would read
                for number in itertools.count():
                    write(number, "")
                    if stop.wait(BEAT_SECONDS):
                        return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        end = "done"
        try:
            yield
        except BaseException as error:
            end = type(error).__name__
            raise
        finally:
            stop.set()
            thread.join()
            with suppress(RuntimeError):
                write(-1, end)


class _Wait:
    """The wait of one rank for the leaders.

    A thread reads the store, which may be in a process that hangs: a request to it then returns
    after minutes or never.
    """

    def __init__(self, store: dist.Store, leaders: Sequence[int], what: str) -> None:
        self._store, self._what = store, what
        self._waiting = {leader: _Beat() for leader in leaders}
        self._lost = ""
        self._is_over = False
        self._read_at = time.monotonic()
        self._changed = threading.Condition()

    def until_done(self, on_wait: OnWait) -> None:
        """Return when all leaders are done. Raises UserError."""
        threading.Thread(target=self._read, name="waiting", daemon=True).start()
        try:
            while True:
                with self._changed:
                    if not self._waiting:
                        return
                    self._changed.wait(POLL_SECONDS)
                    lost = self._lost
                    waiting = dict(self._waiting)
                self._check(waiting, lost)
                for leader in itertools.islice(waiting, 1):
                    on_wait(leader, waiting[leader].status)
        finally:
            self._is_over = True

    def _check(self, waiting: Mapping[int, _Beat], lost: str) -> None:
        now = time.monotonic()
        for leader, beat in waiting.items():
            if beat.ended_by:
                raise self._failed(leader, f"has ended by {beat.ended_by}")
            if now - beat.at > SILENCE_SECONDS:
                both = ", and neither did rank 0" if now - self._read_at > SILENCE_SECONDS else ""
                raise self._failed(leader, f"gave no sign of life for {now - beat.at:.0f} s{both}")
        if lost and waiting:
            time.sleep(LOST_SECONDS)
            raise self._failed(next(iter(waiting)), f"has ended, or rank 0 has ({lost})")

    def _failed(self, leader: int, how: str) -> UserError:
        return UserError(
            f"rank {leader}, which has to {self._what}, {how}",
            rule="the rank that prepares data reports every second, however long its work takes",
            advice=f"See the log of rank {leader}, and start the job again: what the cache of data "
            "has is complete",
        )

    def _read(self) -> None:
        pause = FIRST_POLL_SECONDS
        while self._waiting and not self._is_over:
            for leader in list(self._waiting):
                try:
                    found = self._read_one(str(leader))
                except RuntimeError as error:
                    with self._changed:
                        self._lost = str(error).splitlines()[0]
                        self._changed.notify()
                    return
                self._read_at = time.monotonic()
                if found:
                    with self._changed:
                        self._take(leader, found)
                        self._changed.notify()
            time.sleep(pause)
            pause = min(2 * pause, POLL_SECONDS)

    def _read_one(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _take(self, leader: int, found: dict[str, Any]) -> None:
        if found["end"] == "done":
            del self._waiting[leader]
        else:
            self._waiting[leader].take(found)


class _Beat:
    """The last heartbeat of a leader, and when this rank first saw it."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.at = time.monotonic()
        self.status = self.ended_by = ""

    def take(self, found: dict[str, Any]) -> None:
        """Take what was read from the store."""
        self.status, self.ended_by = cast(str, found["status"]), cast(str, found["end"])
        if found["beat"] != self.number:
            self.number, self.at = found["beat"], time.monotonic()
