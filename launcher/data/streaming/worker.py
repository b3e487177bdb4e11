"""The process of a producer, and its handle in the leading rank of a machine.

    leading rank                     this module as a process
      stdin    production (pickled), then nothing until the rank ends
      stdout   lines of JSON to log

The process ends when its standard input does, however the rank ended. It needs no device and joins
no process group. What cannot be sent to another process (a tokenizer with code of its own) and what
only exists in this one (`memory://`) is produced in a thread instead.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from typing import IO, Any

from launcher.data.cache_key import settings_of
from launcher.data.loaders.base import Log
from launcher.data.streaming.producer import Production, produce
from launcher.data.streaming.ring import Ring
from launcher.errors import Problem, UserError

_LENGTH_BYTES = 8
_END_SECONDS = 10.0


class ThreadProducer:
    """A producer in a thread of this process."""

    def __init__(self, production: Production, log: Log, **seams: Any) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=produce, args=(production, self._stopped, log), kwargs=seams, daemon=True,
            name="stream",
        )  # fmt: skip
        self._thread.start()

    def error(self) -> Exception | None:
        """An error that is not in the ring."""
        return None if self._thread.is_alive() else RuntimeError("the producer has ended")

    def close(self) -> None:
        """End the thread after the block it makes."""
        self._stopped.set()
        self._thread.join()


class ProcessProducer:
    """A producer in a process of its own."""

    def __init__(self, production: Production, payload: bytes, log: Log) -> None:
        self._ring = Ring(production.ring)
        self._closed = False
        self._error: Exception | None = None
        paths = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # signals of a terminal are those of the ranks
        )
        self._watch = threading.Thread(target=self._follow, args=(payload, log), daemon=True)
        self._watch.start()

    def _follow(self, payload: bytes, log: Log) -> None:
        """Send the work, log what the process writes, and see how it ends."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload)
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, which is reported below
        for line in self.process.stdout:
            log(_logged(line))
        code = self.process.wait()
        if not self._closed and self._ring.error() is None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            hint = "; signal 9 often means that the machine ran out of memory" if code == -9 else ""
            what = f"the producer of the stream (process {self.process.pid}) ended with {how}{hint}"
            advice = "Give it more memory, or set a smaller shuffle_buffer, and resume the run"
            problem = Problem(what=what, advice=advice)
            self._error = UserError(problem)
            with suppress(OSError):  # a full disk
                self._ring.fail([problem], is_user_error=True)

    def error(self) -> Exception | None:
        """An error that may not be in the ring."""
        return self._error

    def close(self) -> None:
        """End the process."""
        self._closed = True
        assert self.process.stdin is not None
        self.process.terminate()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._watch.join()
        self.process.stdin.close()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _logged(line: bytes) -> str:
    try:
        return str(json.loads(line))
    except ValueError:  # printed by a library
        return line.decode(errors="replace").rstrip()


def start_producer(production: Production, log: Log) -> ThreadProducer | ProcessProducer:
    """Start a producer, in a process where it can be."""
    if any(index.shard.location.startswith("memory://") for index in production.source):
        return ThreadProducer(production, log)
    payload = _sendable(production)
    if payload is None:
        log("streaming in a thread: this tokenizer cannot be sent to a process of its own")
        return ThreadProducer(production, log)
    return ProcessProducer(production, payload, log)


def _sendable(production: Production) -> bytes | None:
    """The production for another process; None where it would not be the same there."""
    if type(production.tokenizer).__module__.partition(".")[0] not in ("transformers", "launcher"):
        return None  # code that was loaded into this process alone
    try:
        payload = pickle.dumps(production)
        arrived = pickle.loads(payload)  # what this process has written
    except Exception:
        return None
    return payload if _settings(arrived) == _settings(production) else None


def _settings(production: Production) -> dict[str, Any]:
    return settings_of(production.recipe(lambda line: None))


def main(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Produce what the leading rank asks for, until it ends."""
    length = int.from_bytes(stdin.read(_LENGTH_BYTES), "little")
    production = pickle.loads(stdin.read(length))

    def log(line: str) -> None:
        stdout.write(json.dumps(line).encode() + b"\n")
        stdout.flush()

    def end_with_the_rank() -> None:
        stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_the_rank, daemon=True).start()
    produce(production, threading.Event(), log)


if __name__ == "__main__":
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # what libraries print is none of the lines
    main(sys.stdin.buffer, output)
