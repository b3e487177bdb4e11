"""Worker processes that encode chunks.

Owns the processes and the order of their results. Invariants: results come in the order of the
chunks, and so do errors, so that several workers give what one process gives; a worker has one
chunk at a time, and not more than `AHEAD` chunks a worker are read ahead or wait to be taken, so
that memory is bounded; workers end when this process does, however it ends.

The processes are spawned, as a fork would copy the threads' locks of torch and of the tokenizer.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from launcher.data.chunks import Chunk, EncodedChunk, encode
from launcher.data.loaders.base import Recipe
from launcher.data.progress import ignore_progress
from launcher.errors import Problem, UserError

AHEAD = 2
STOP_SECONDS = 5.0
_READY = "ready"


class CannotStart(Exception):
    """The work cannot be handed to other processes; the text is the reason."""


@dataclass
class _Worker:
    process: Any
    connection: Connection
    busy_with: int | None = None
    """Index of its chunk; None while it has nothing to do."""


@dataclass(frozen=True)
class _Failed:
    problems: tuple[Problem, ...] = ()
    text: str = ""
    """Of a bug: its traceback."""


class Workers:
    """Worker processes for one recipe; to be closed. Raises CannotStart where they cannot load it,
    as with a tokenizer whose code is not importable."""

    def __init__(self, count: int, recipe: Recipe) -> None:
        self._workers: list[_Worker] = []
        quiet = replace(recipe, log=_log_nothing, on_progress=ignore_progress)
        try:
            pickled = pickle.dumps(quiet)
        except Exception as error:  # a tokenizer of the user's own code may fail in any way
            raise CannotStart(f"{type(error).__name__}: {error}") from error
        context = multiprocessing.get_context("spawn")
        try:
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there,), name="tokenize", daemon=True)
                process.start()
                there.close()
                self._workers.append(_Worker(process, here))
            for worker in self._workers:
                worker.connection.send_bytes(pickled)
            for worker in self._workers:
                self._check_start(worker)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError | EOFError):
                raise CannotStart(str(error) or "a process ended as it started") from error
            raise

    @staticmethod
    def _check_start(worker: _Worker) -> None:
        """Wait until a worker has loaded the recipe."""
        answer = worker.connection.recv()
        if isinstance(answer, _Failed):
            raise CannotStart(answer.text.strip().splitlines()[-1])

    def map(
        self, chunks: Iterator[Chunk], on_wait: Callable[[], None]
    ) -> Iterator[tuple[Chunk, EncodedChunk]]:
        """The chunks and their tokens, in order. `on_wait` is called now and then.

        Raises what reading or encoding a chunk raises, after the chunks before it; UserError when a
        worker dies.
        """
        state = _Order(chunks, AHEAD * len(self._workers))
        while state.is_open:
            for worker in self._workers:
                if worker.busy_with is None and (chunk := state.next_to_encode()) is not None:
                    worker.busy_with = chunk[0]
                    self._send(worker, chunk[1].samples)
            reads_on = state.may_read
            self._receive(state, 0.0 if reads_on else 0.5)
            on_wait()
            yield from state.take()
            if reads_on and state.is_open:
                state.read()

    def close(self) -> None:
        """End all workers now."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(STOP_SECONDS)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()

    def _send(self, worker: _Worker, samples: list[Any]) -> None:
        try:
            worker.connection.send(samples)
        except OSError as error:
            raise self._died(worker) from error

    def _receive(self, state: _Order, seconds: float) -> None:
        waiting = {w.connection: w for w in self._workers if w.busy_with is not None}
        for connection in wait(list(waiting), seconds):
            assert isinstance(connection, Connection)
            worker = waiting[connection]
            try:
                answer = connection.recv()
            except (EOFError, OSError) as error:
                raise self._died(worker) from error
            assert worker.busy_with is not None
            state.put(worker.busy_with, answer)
            worker.busy_with = None

    def _died(self, worker: _Worker) -> UserError:
        worker.process.join(STOP_SECONDS)
        code = worker.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"killed by {signal.Signals(-code).name}"
        return UserError(
            f"a process that tokenizes has died ({how})",
            rule=f"{len(self._workers)} processes tokenize together, and none may end before the "
            "others",
            advice="With SIGKILL the machine ran out of memory: set a smaller "
            "train_dataset.num_parallel_workers",
        )


class _Order:
    """Chunks that were read, and results until those before them are there."""

    def __init__(self, chunks: Iterator[Chunk], limit: int) -> None:
        self._chunks, self._limit = chunks, limit
        self._unread = True
        self._error: BaseException | None = None
        self._to_encode: deque[int] = deque()
        self._open: dict[int, Chunk] = {}
        self._results: dict[int, EncodedChunk | _Failed] = {}
        self._read = self._taken = 0

    @property
    def is_open(self) -> bool:
        """Whether results are still to come."""
        return self._unread or self._error is not None or self._taken < self._read

    @property
    def may_read(self) -> bool:
        """Whether there is room for another chunk."""
        return self._unread and len(self._open) < self._limit

    def read(self) -> None:
        """Read a chunk. An error waits until the chunks before it were taken."""
        try:
            self._open[self._read] = next(self._chunks)
        except StopIteration:
            self._unread = False
        except Exception as error:
            self._unread, self._error = False, error
        else:
            self._to_encode.append(self._read)
            self._read += 1

    def next_to_encode(self) -> tuple[int, Chunk] | None:
        """A chunk that no worker has, and its index."""
        if not self._to_encode:
            return None
        index = self._to_encode.popleft()
        return index, self._open[index]

    def put(self, index: int, result: EncodedChunk | _Failed) -> None:
        """Keep the result of a chunk."""
        self._results[index] = result

    def take(self) -> Iterator[tuple[Chunk, EncodedChunk]]:
        """The results that are next in order."""
        while self._taken in self._results:
            result, chunk = self._results.pop(self._taken), self._open.pop(self._taken)
            self._taken += 1
            if isinstance(result, _Failed):
                if result.problems:
                    raise UserError(result.problems)
                raise RuntimeError(f"in a process that tokenizes:\n{result.text}")
            yield chunk, result
        if self._error is not None and self._taken == self._read:
            raise self._error


def _work(connection: Connection) -> None:
    """The life of a worker: it ends when its connection does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it ends it
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    try:
        recipe: Recipe = pickle.loads(connection.recv_bytes())
        connection.send(_READY)
    except (EOFError, BrokenPipeError):
        return
    except Exception:
        connection.send(_Failed(text=traceback.format_exc()))
        return
    while True:
        try:
            samples = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send(_encoded(samples, recipe))
        except OSError:
            return


def _encoded(samples: list[Any], recipe: Recipe) -> EncodedChunk | _Failed:
    try:
        return encode(samples, recipe)
    except UserError as error:
        return _Failed(problems=error.problems)
    except Exception:
        return _Failed(text=traceback.format_exc())


def _log_nothing(line: str) -> None:
    pass
