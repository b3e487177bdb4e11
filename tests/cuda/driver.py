"""One process for all cases: importing torch and creating a CUDA context take longer than a case.

    python -m tests.cuda.driver cpu      a request a line on standard input, an answer a line

A request is {"case": name, "folder": path, "port": number}, an answer {"case", "ok", "error"}. With
WORLD_SIZE above 1 every rank is such a process and gets every request. What cases print goes to
standard error. A process that dies takes one case with it: the next one gets a new process.
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from tests.ranks import PATIENCE, free_port

ROOT = Path(__file__).parents[2]


class Driver:
    """The processes of one device and number of ranks, started at the first case."""

    def __init__(self, device: str, ranks: int = 1) -> None:
        self.device, self.ranks = device, ranks
        self._processes: list[subprocess.Popen[str]] = []
        self._logs: list[Any] = []
        self.starts = 0
        """How often processes were started."""

    def run(self, case: str, folder: Path) -> None:
        """Run a case in `folder`. Raises AssertionError with the traceback of a failed rank."""
        if any(process.poll() is not None for process in self._processes):
            self.close()
        if not self._processes:
            self._start()
        request = json.dumps({"case": case, "folder": str(folder), "port": free_port()})
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{request}\n")
            process.stdin.flush()
        problems = []
        for rank in range(self.ranks):
            answer = self._answer(rank)
            if not answer["ok"]:
                problems.append(f"rank {rank}: {answer['error']}")
                break  # the other ranks may wait for it
        if problems and (self.ranks > 1 or "died" in problems[0]):
            self.close()
        assert not problems, "\n".join(problems)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()
        for log in self._logs:
            log.close()
        self._processes, self._logs = [], []

    def _start(self) -> None:
        self.starts += 1
        for rank in range(self.ranks):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # fmt: skip
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
            self._logs.append(log)
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.cuda.driver", self.device],
                    cwd=ROOT, env=os.environ | of_rank, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )
            )  # fmt: skip

    def _answer(self, rank: int) -> dict[str, Any]:
        process = self._processes[rank]
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        time.sleep(0.1)
        code = process.poll()
        self._logs[rank].seek(0)
        tail = "\n".join(self._logs[rank].read().splitlines()[-30:])
        how = "does not answer" if code is None else f"died with exit code {code}"
        return {"ok": False, "error": f"the process {how} or died:\n{tail}"}


def serve(device: str, requests: TextIO, answers: TextIO) -> None:
    """Run the requested cases until the end of the input."""
    from tests.cuda.cases import CASES, Place

    for line in requests:
        request = json.loads(line)
        os.environ["MASTER_PORT"] = str(request["port"])
        os.chdir(request["folder"])
        error = None
        try:
            CASES[request["case"]].run(Place(Path(request["folder"]), device))
        except BaseException:
            error = traceback.format_exc()
        answer = {"case": request["case"], "ok": error is None, "error": error}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        _clean_up()


def _clean_up() -> None:
    """A case leaves no process group, compiled graphs or memory to the next one."""
    import torch

    from benchmarks.gpu.driver import default_kernels

    default_kernels()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what cases print is no answer
    serve(sys.argv[1], sys.stdin, answers)
