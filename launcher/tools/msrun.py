"""`bash msrun.sh ...`: the configuration is checked once, then the workers are started by torchrun.

Owns the order of things and the logs. Differences from MindFormers' msrun_launcher.sh: a job that
fails is a failed exit code, so this always waits for the end (JOIN is accepted); one worker runs;
the console shows rank 0; the log of an earlier run is kept as *.log.1.

    LOG_DIR/worker_{rank}.log   what a worker prints
    LOG_DIR/scheduler.log       what torchrun says (scheduler_{node}.log on further nodes)
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launcher.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_SIGINT,
    EXIT_USER,
    UserError,
)
from launcher.tools.follow import Follower, last_lines
from launcher.tools.launch import ROOT, USAGE, Launch, read

WORKER = Path(__file__).with_name("worker.py")
_SHOWN_LINES = 20


def run_once(launch: Launch, arguments: Sequence[str]) -> int:
    """`run.py` in this process, told how many workers there would be. Returns the exit code."""
    from launcher import cli

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ["SLIPWAY_WORLD_SIZE"] = str(launch.workers)
    try:
        return cli.main(arguments)
    finally:
        del os.environ["SLIPWAY_WORLD_SIZE"]


def check(launch: Launch) -> int | None:
    """Check the configuration. None: all is right; else the exit code, after it has been shown.

    A command line that only asks for something (--help, --print_config) is answered here.
    """
    from launcher.config.command_line import parse

    if launch.script.resolve() != ROOT / "run.py":
        return None
    line = parse(launch.arguments)
    if line.help or line.check_config or line.print_config:
        return run_once(launch, launch.arguments)
    said = io.StringIO()  # warnings and the like are told by rank 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = run_once(launch, ["--check_config", *launch.arguments])
    if code == EXIT_OK:
        return None
    print(said.getvalue(), end="", file=sys.stderr)
    return code


def prepare(launch: Launch) -> None:
    """The folder of the logs, without those of this node's earlier run. Raises UserError."""
    if launch.master_port and launch.node_rank == 0:
        _check_port(launch.master_port)
    try:
        launch.log_dir.mkdir(parents=True, exist_ok=True)
        for path in (launch.scheduler_log, *map(launch.worker_log, launch.ranks)):
            if path.exists():
                path.replace(f"{path}.1")
        launch.scheduler_log.touch()
    except OSError as error:
        raise UserError(
            f"LOG_DIR = {str(launch.log_dir)!r}",
            where="msrun.sh",
            rule=f"{error.filename} cannot be written: {error.strerror}",
        ) from error


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"MASTER_PORT = {port}",
                where="msrun.sh",
                rule=f"the port cannot be used: {error.strerror}",
                nearest=f"Nearest: {_free_port()}",
            ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def torchrun_arguments(launch: Launch) -> list[str]:
    """The command line of torchrun for this node."""
    return [
        *("--nnodes", str(launch.nodes), "--nproc-per-node", str(launch.local_workers)),
        *("--node-rank", str(launch.node_rank), "--max-restarts", "0"),
        *("--master-addr", launch.master_addr),
        *("--master-port", str(launch.master_port or _free_port())),
        *("--rdzv-conf", f"timeout={launch.timeout_seconds}"),
        *(str(WORKER), str(launch.log_dir.absolute()), str(launch.script), *launch.arguments),
    ]


def start(launch: Launch) -> int:
    """Start this node's workers and wait for them. Returns the exit code of the job."""
    if launch.local_workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    shown = launch.worker_log(0) if 0 in launch.ranks else None
    print(f"msrun: {_plural(launch.workers, 'worker')}, logs in {launch.log_dir}", file=sys.stderr)
    with _standard_error_to(launch.scheduler_log) as tell, Follower(shown):
        return _torchrun(launch, tell)


def _torchrun(launch: Launch, tell: Callable[[str], None]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        torchrun.run(torchrun.parse_args(torchrun_arguments(launch)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _failed(launch, rank, failure.exitcode, tell)
    except SignalException as error:
        return 128 + error.sigval
    except Exception as error:
        traceback.print_exc()
        tell(f"msrun: the job did not form: {str(error).splitlines()[0]}")
        if launch.nodes > 1:
            tell(
                f"msrun: start all {launch.nodes} nodes within {launch.timeout_seconds} s, with "
                "the same MASTER_ADDR and MASTER_PORT"
            )
        tell(f"msrun: see {launch.scheduler_log}")
        return EXIT_INTERNAL
    return EXIT_OK


def _failed(launch: Launch, rank: int, code: int, tell: Callable[[str], None]) -> int:
    """Say which rank failed first, and its last words where the console has not shown them."""
    how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
    log = launch.worker_log(rank)
    tell(f"msrun: rank {rank} ended first, {how}: see {log}")
    if rank:
        for line in last_lines(log, _SHOWN_LINES):
            mark = f"[rank {rank}] "
            tell(mark + line.removeprefix(mark))
    return code if code > 0 else 128 - code


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


@contextlib.contextmanager
def _standard_error_to(path: Path) -> Iterator[Callable[[str], None]]:
    """Standard error of this process and of what it starts goes to a file; the function it yields
    still speaks to the user, when all is over."""
    lines: list[str] = []
    sys.stderr.flush()
    before = os.dup(2)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield lines.append
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)
        for line in lines:
            print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line of msrun.sh. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["-h"], ["--help"]):
        print(USAGE)
        return EXIT_OK
    try:
        launch = read(words)
        code = check(launch)
        if code is not None:
            return code
        prepare(launch)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return EXIT_USER
    try:
        return start(launch)
    except KeyboardInterrupt:  # before there were workers: afterwards torchrun passes it on
        return EXIT_SIGINT


if __name__ == "__main__":
    sys.exit(main())
