"""Nodes of a job tell each other what their ranks cannot see: real launchers, own folders."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.tools.launch import Launch
from tests.config.workspace import RIGHT, build
from tests.ranks import free_port
from tests.test_msrun import start

WAITING = """\
import os, signal, sys, time

print("rank", os.environ["RANK"], flush=True)
if os.environ["RANK"] == sys.argv[1]:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


class Nodes:
    """Two nodes of two workers, each started in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / "a", folder / "b"]
        self.port = str(free_port())
        self.processes: dict[int, subprocess.Popen[str]] = {}
        for own in self.folders:
            own.mkdir()
            (own / "job.py").write_text(WAITING)

    def start(self, node: int, command: str) -> None:
        words = ("4", "2", "127.0.0.1", self.port, str(node), "logs", "False", "300")
        self.processes[node] = start(self.folders[node], command, *words)

    def end(self) -> list[tuple[int, str]]:
        """Exit code and standard error of each node."""
        errors = {node: p.communicate()[1] for node, p in self.processes.items()}
        return [(self.processes[node].returncode, errors[node]) for node in sorted(errors)]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for process in made.processes.values():
        process.kill()


def test_a_rank_that_is_killed_ends_the_other_node(nodes: Nodes) -> None:
    for node in (0, 1):
        nodes.start(node, "job.py 2")
    (code, err), (other_code, other_err) = nodes.end()
    assert (code, other_code) == (137, 137), err + other_err
    assert "msrun: rank 2 on " in err
    assert "failed: it ended by SIGKILL" in err
    assert "msrun: rank 2 failed first, by SIGKILL: see logs/worker_2.log" in other_err


@pytest.mark.parametrize("refused", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_node_whose_configuration_is_refused_ends_the_other(nodes: Nodes, refused: int) -> None:
    for folder in nodes.folders:
        build(folder)
        (folder / "run.yaml").write_text(RIGHT)
    nodes.start(1 - refused, "job.py none")
    nodes.start(refused, "run.py --config run.yaml --run_mode trane")
    ends = nodes.end()
    assert [code for code, _ in ends] == [2, 2], ends
    assert "'trane'" in ends[refused][1]
    assert f"node {refused} did not start, see its console" in ends[1 - refused][1]


def test_logs_of_every_earlier_run_are_kept(tmp_path: Path) -> None:
    from launcher.tools.msrun import prepare

    launch = Launch(
        script=Path("run.py"), arguments=(), workers=2, local_workers=2, master_addr="127.0.0.1",
        master_port=None, node_rank=0, log_dir=tmp_path, timeout_seconds=1,
    )  # fmt: skip
    for run in range(3):
        prepare(launch)
        for rank in launch.ranks:
            launch.worker_log(rank).write_text(f"run {run}")
    found = {path.name: path.read_text() for path in tmp_path.glob("worker_1.log*")}
    assert found == {"worker_1.log.1": "run 0", "worker_1.log.2": "run 1", "worker_1.log": "run 2"}
