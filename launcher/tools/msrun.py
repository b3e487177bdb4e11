"""`bash msrun.sh ...`: check the configuration once, then start the workers with torchrun.

Owns the order of these steps and the logs. Unlike MindFormers' msrun_launcher.sh it always waits
for the job and returns its exit code (JOIN is accepted); one worker is possible; the console shows
rank 0; logs of earlier runs are kept, as *.log.1, *.log.2 and so on.

    LOG_DIR/worker_{rank}.log   the output of a worker
    LOG_DIR/scheduler.log       the output of torchrun (scheduler_{node}.log on other nodes)
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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.environment import OF_A_PROCESS, PLANNED_WORLD_SIZE
from launcher.errors import (
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_SIGINT,
    EXIT_USER,
    UserError,
)
from launcher.project_files import run_script
from launcher.tools.follow import Follower, last_lines
from launcher.tools.launch import USAGE, Launch, read

if TYPE_CHECKING:
    from launcher.parallel.failure import Failure
    from launcher.tools.node_watch import NodeWatch

WORKER = Path(__file__).with_name("worker.py")
_SHOWN_LINES = 20


def run_once(launch: Launch, arguments: Sequence[str]) -> int:
    """Run `run.py` in this process, with the planned world size. Returns the exit code."""
    from launcher import cli

    for name in OF_A_PROCESS:
        os.environ.pop(name, None)
    os.environ[PLANNED_WORLD_SIZE] = str(launch.workers)
    try:
        return cli.main(arguments)
    finally:
        del os.environ[PLANNED_WORLD_SIZE]


def check(launch: Launch) -> int | None:
    """Check the configuration. None: it is valid; else the exit code, errors having been printed.

    --help, --check_config, --print_config, --prepare_data and --show_data are handled here, without
    workers.
    """
    from launcher.config.command_line import parse

    if launch.script.resolve() != run_script():
        return None
    line = parse(launch.arguments)
    if line.help or line.check_config or line.print_config or line.opens_data_alone:
        return run_once(launch, launch.arguments)
    errors = io.StringIO()  # rank 0 prints the warnings
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = run_once(launch, ["--check_config", *launch.arguments])
    if code == EXIT_OK:
        return None
    print(errors.getvalue(), end="", file=sys.stderr)
    return code


def prepare(launch: Launch) -> None:
    """Make the folder of the logs and rename those of an earlier run. Raises UserError."""
    if launch.master_port and launch.node_rank == 0:
        _check_port(launch.master_port)
    try:
        launch.log_dir.mkdir(parents=True, exist_ok=True)
        logs = [launch.scheduler_log, *map(launch.worker_log, launch.ranks)]
        number = 1
        while any(Path(f"{path}.{number}").exists() for path in logs):
            number += 1
        for path in logs:
            if path.exists():
                path.replace(f"{path}.{number}")
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
    """The command line of torchrun for this node; `launch.master_port` is set."""
    return [
        *("--nnodes", str(launch.nodes), "--nproc-per-node", str(launch.local_workers)),
        *("--node-rank", str(launch.node_rank), "--max-restarts", "0"),
        *("--master-addr", launch.master_addr),
        *("--master-port", str(launch.master_port)),
        *("--rdzv-conf", f"timeout={launch.timeout_seconds}"),
        *(str(WORKER), str(launch.log_dir.absolute()), str(launch.script), *launch.arguments),
    ]


def start(launch: Launch) -> int:
    """Start this node's workers and wait for them. Returns the exit code of the job."""
    from launcher.tools.node_watch import NodeWatch

    if launch.local_workers > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch = replace(launch, master_port=launch.master_port or _free_port())
    shown = launch.worker_log(0) if launch.has_console else None
    print(f"msrun: {_plural(launch.workers, 'worker')}, logs in {launch.log_dir}", file=sys.stderr)
    if launch.nodes > 1:
        print(
            f"msrun: node {launch.node_rank} of {launch.nodes}, rendezvous at "
            f"{launch.master_addr}:{launch.master_port} within {launch.timeout_seconds} s",
            file=sys.stderr,
        )
    with (
        _standard_error_to(launch.scheduler_log) as console,
        Follower(shown),
        NodeWatch(launch, console.write) as watch,
    ):
        return _torchrun(launch, watch, console.report)


def _torchrun(launch: Launch, watch: NodeWatch, report: Callable[[str], None]) -> int:
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from launcher.parallel.failure import Failure

    try:
        torchrun.run(torchrun.parse_args(torchrun_arguments(launch)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        first = watch.record(_failure_of(rank, failure.exitcode))
        return _failed(launch, rank, failure.exitcode, first, report)
    except SignalException as error:
        return 128 + error.sigval
    except Exception as error:
        traceback.print_exc()
        reason = f"rendezvous failed: {str(error).splitlines()[0]}"
        watch.record(Failure.of_this_host(-1, EXIT_INTERNAL, reason))
        report(f"msrun: {reason}")
        if launch.nodes > 1:
            report(
                f"msrun: start all {launch.nodes} nodes within {launch.timeout_seconds} s, with "
                "the same MASTER_ADDR and MASTER_PORT"
            )
        report(f"msrun: see {launch.scheduler_log}")
        return EXIT_INTERNAL
    if watch.failure is not None:  # on another node, while the ranks of this one succeeded
        report(f"msrun: {watch.failure}")
        return watch.failure.exit_code
    return EXIT_OK


def _failure_of(rank: int, code: int) -> Failure:
    """The failure of a rank that may not have reported it."""
    from launcher.parallel.failure import Failure

    return Failure.of_this_host(rank, _exit_code(code), f"it ended {_how(code)}")


def _how(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"


def _exit_code(code: int) -> int:
    return code if code > 0 else 128 - code


def _failed(
    launch: Launch, rank: int, code: int, first: Failure, report: Callable[[str], None]
) -> int:
    """Print which rank failed first, and the end of its log unless the console has shown it.

    `rank`: the first of this node that ended, with `code`; `first`: the first failure of the job.
    """
    if first.rank not in launch.ranks:
        report(f"msrun: {first}")
        return first.exit_code
    if first.rank != rank:  # it ended the others before itself
        rank, code = first.rank, first.exit_code
    log = launch.worker_log(rank)
    report(f"msrun: rank {rank} failed first, {_how(code)}: see {log}")
    if rank:
        mark = f"[rank {rank}] "
        on_console = (
            set(last_lines(launch.worker_log(0), _SHOWN_LINES)) if launch.has_console else {}
        )
        for line in last_lines(log, _SHOWN_LINES):
            text = line.removeprefix(mark)
            if text not in on_console:
                report(mark + text)
    return _exit_code(code)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


class _Console:
    """Standard error as it was before it was redirected to a file."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.lines: list[str] = []

    def report(self, line: str) -> None:
        """Print a line at the end, after the output of rank 0."""
        self.lines.append(line)

    def write(self, line: str) -> None:
        """Print a line now."""
        os.write(self.descriptor, f"{line}\n".encode())


@contextlib.contextmanager
def _standard_error_to(path: Path) -> Iterator[_Console]:
    """Redirect the standard error of this process and its children to a file."""
    sys.stderr.flush()
    console = _Console(os.dup(2))
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 2)
    os.close(log)
    try:
        yield console
    finally:
        sys.stderr.flush()
        os.dup2(console.descriptor, 2)
        os.close(console.descriptor)
        for line in console.lines:
            print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line of msrun.sh. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["-h"], ["--help"]):
        print(USAGE)
        return EXIT_OK
    try:
        launch = read(words)
    except UserError as error:
        return _refused(error)
    try:
        code = check(launch)
        if code == EXIT_OK:
            return code
        if code is not None:
            report_refusal(launch, code)
            return code
        prepare(launch)
    except UserError as error:
        code = _refused(error)
        report_refusal(launch, code)
        return code
    try:
        return start(launch)
    except KeyboardInterrupt:  # before workers have started: later torchrun forwards it
        return EXIT_SIGINT


def _refused(error: UserError) -> int:
    for problem in error.problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_USER


def report_refusal(launch: Launch, code: int) -> None:
    """Report to the other nodes, which may be waiting for this one, that it does not start."""
    if launch.nodes == 1 or not launch.master_port:
        return
    from launcher.parallel.failure import Failure
    from launcher.tools.node_watch import report

    sys.stderr.flush()
    reason = f"node {launch.node_rank} did not start, see its console"
    report(launch, Failure.of_this_host(-1, code, reason))


if __name__ == "__main__":
    sys.exit(main())
