"""Variables of a launcher, left over or wrong: each is named, and nothing is started."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from launcher import cli, environment
from launcher.environment import ProcessEnvironment, check_rendezvous, process_environment
from launcher.errors import UserError
from tests import messages

LAUNCHED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node0", "MASTER_PORT": "29501"}  # fmt: skip
NAMES = (*LAUNCHED, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE",
         environment.PLANNED_WORLD_SIZE)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_what_torchrun_sets_and_what_a_process_alone_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_environment() == ProcessEnvironment()
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    found = process_environment()
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)
    assert (found.master_addr, found.master_port) == ("node0", 29501)
    assert found.has_several_machines


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "3"}, ["RANK = '3'"]),
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE = ''"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE = 'two'"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE = '0'"]),
        ({"WORLD_SIZE": "\u0663"}, ["WORLD_SIZE = '\u0663'"]),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE = '999"]),
        ({"LOCAL_RANK": "1"}, ["LOCAL_RANK = '1'"]),
        ({"RANK": "-1", "LOCAL_RANK": "1.5"}, ["RANK = '-1'", "LOCAL_RANK = '1.5'"]),
        ({**LAUNCHED, "RANK": "4"}, ["RANK = '4'"]),
        ({**LAUNCHED, "MASTER_PORT": "tcp://10.0.0.1:80"}, ["MASTER_PORT = 'tcp://10.0.0.1:80'"]),
        ({**LAUNCHED, "MASTER_PORT": "70000"}, ["MASTER_PORT = '70000'"]),
        ({**LAUNCHED, "TORCHELASTIC_RESTART_COUNT": "x"}, ["TORCHELASTIC_RESTART_COUNT = 'x'"]),
    ],
)
def test_what_does_not_fit_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: list[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        process_environment()
    for text in named:
        assert text in str(caught.value)
    assert len(caught.value.problems) == len(named)
    assert all(problem.where == "environment variable" for problem in caught.value.problems)
    if len(str(caught.value)) < 1000:
        case = ", ".join(f"{name}={value}" for name, value in variables.items())
        messages.check("environment", case, str(caught.value))


def test_a_process_alone_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError) as caught:
        check_rendezvous()
    for problem, name in zip(
        caught.value.problems, ("RANK", "MASTER_ADDR", "MASTER_PORT"), strict=True
    ):
        assert problem.what == "WORLD_SIZE = '2'"
        assert problem.rule.endswith(f" {name}")
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    check_rendezvous()


def test_a_number_of_processes_left_over_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "x.yaml").write_text("seed: 1\n")
    assert cli.main(["--config", str(tmp_path / "x.yaml"), "--run_mode", "train"]) == 2
    assert "unset WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_an_address_where_no_store_can_be_is_a_mistake_of_the_user(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 finds its port taken; rank 1 finds nobody."""
    from launcher.parallel import world

    monkeypatch.setattr(world, "GROUP_TIMEOUT", timedelta(seconds=0.1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1" if rank else "", 0))
        if not rank:
            taken.listen()
        port = taken.getsockname()[1]
        environment = ProcessEnvironment(rank=rank, world_size=2, master_port=port)
        with pytest.raises(UserError, match=f"MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}"):
            world._store(environment)


def test_what_harms_nobody_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod of Kubernetes has MASTER_PORT=tcp://... for a service of that name."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "tcp://1:2"}.items():
        monkeypatch.setenv(name, value)
    assert process_environment().world_size == 1


@pytest.mark.parametrize("command", [["-m", "launcher.cli"], ["-m", "launcher"], ["run.py"]])
def test_every_way_to_start_answers(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is printed as a traceback, and a mistake is never exit code 0."""
    monkeypatch.setenv("WORLD_SIZE", "two")
    done = subprocess.run(
        [sys.executable, *command, "--config", "nope.yaml"], capture_output=True, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_runs_as_a_module() -> None:
    """A file with a `main` that nobody calls would print nothing and end with exit code 0."""
    launcher = Path(__file__).parents[2] / "launcher"
    files = [path for path in launcher.rglob("*.py") if "\ndef main(" in path.read_text()]
    assert len(files) > 10
    assert [p.name for p in files if 'if __name__ == "__main__":' not in p.read_text()] == []
