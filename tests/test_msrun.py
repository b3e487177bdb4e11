"""msrun.sh: positional arguments, quoting, the check before the launch, logs and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.tools.follow import Follower, last_lines
from launcher.tools.launch import USAGE, read
from launcher.tools.msrun import torchrun_arguments
from tests.config.workspace import RIGHT, build
from tests.ranks import free_port
from tests.workshop import Workshop

ROOT = Path(__file__).parents[1]
RUN = "run.py --config run.yaml --run_mode train"

WORKER = """\
import os, signal, sys, time

rank = int(os.environ["RANK"])


def stop(number, frame):
    print("stopped by", number, flush=True)
    sys.exit(128 + number)


signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("rank", rank, "of", os.environ["WORLD_SIZE"], sys.argv[1:], flush=True)
if rank == 0:
    open("printed", "w").close()
while sys.argv[1] in ("fail", "die") and not os.path.exists("printed"):
    time.sleep(0.01)
if sys.argv[1] == "fail" and rank == 1:
    print("the reason", file=sys.stderr)
    sys.exit(3)
if sys.argv[1] == "die" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] != "done":
    time.sleep(600)
"""


def environment(**changes: str) -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "PYTHONPATH", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PYTHON": sys.executable, **changes}


def start(folder: Path, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(ROOT / "msrun.sh"), *arguments],
        cwd=folder,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str, **changes: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    process = start(folder, *arguments, **changes)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    return process.returncode, out, err


# --- positional arguments -------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(WORKER)
    return tmp_path


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ([], {"workers": 8, "local_workers": 8, "nodes": 1, "master_port": None}),
        (["2"], {"workers": 2, "local_workers": 2, "nodes": 1, "timeout_seconds": 7200}),
        (["1"], {"workers": 1, "log_dir": Path("output/msrun_log")}),
        (["4", "8118", "logs", "True", "300"],
         {"workers": 4, "local_workers": 4, "master_port": 8118, "log_dir": Path("logs"),
          "timeout_seconds": 300, "master_addr": "127.0.0.1"}),
        (["16", "8", "10.0.0.1", "8118", "1", "output/msrun_log", "False", "300"],
         {"workers": 16, "local_workers": 8, "nodes": 2, "node_rank": 1, "master_port": 8118,
          "master_addr": "10.0.0.1", "ranks": range(8, 16),
          "scheduler_log": Path("output/msrun_log/scheduler_1.log")}),
        (["8", "8", "10.0.0.1", "8118", "0", "logs", "false", "300"],
         {"nodes": 1, "master_addr": "127.0.0.1", "ranks": range(8)}),
    ],
)  # fmt: skip
def test_the_positional_arguments_of_the_original(
    folder: Path, rest: list[str], expected: dict[str, Any]
) -> None:
    launch = read([RUN, *rest])
    assert {name: getattr(launch, name) for name in expected} == expected
    assert launch.script == ROOT / "run.py"
    assert launch.arguments == tuple(RUN.split()[1:])


@pytest.mark.parametrize("interpreter", ["python", "python3", "python3.11", "/usr/bin/python"])
def test_a_leading_interpreter_is_dropped(folder: Path, interpreter: str) -> None:
    assert read([f"{interpreter} {RUN}"]).arguments == tuple(RUN.split()[1:])


def test_words_are_those_of_a_shell_and_nothing_is_executed(folder: Path) -> None:
    text = (
        'job.py \\\n --predict_data \'I love Beijing, because\' "it\'s \\"here\\"" a\\ b \\\n'
        "  $HOME $(touch made) `touch made` ; touch made && *.py ~"
    )
    assert read([text]).arguments == (
        *("--predict_data", "I love Beijing, because", 'it\'s "here"', "a b"),
        *("$HOME", "$(touch", "made)", "`touch", "made`", ";", "touch", "made", "&&", "*.py", "~"),
    )
    assert not Path("made").exists()


def test_the_script_of_the_current_directory_comes_first(folder: Path) -> None:
    assert read(["job.py done"]).script == folder / "job.py"
    (folder / "run.py").write_text("")
    assert read([RUN]).script == folder / "run.py"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["msrun.sh: 0 arguments: it takes 1, 2, 6 or 9.", "usage: bash msrun.sh"]),
        ([RUN, "2", "3"], ["msrun.sh: 3 arguments"]),
        ([RUN, "two"], ["WORKER_NUM = 'two': it must be an integer of at least 1."]),
        ([RUN, "0"], ["WORKER_NUM = '0': it must be an integer of at least 1. Nearest: 1."]),
        ([RUN, "6", "4", "h", "8118", "0", "logs", "False", "9"],
         ["WORKER_NUM = '6': every node has LOCAL_WORKER (4) workers. Nearest: 4 or 8."]),
        ([RUN, "2", "4", "h", "8118", "0", "logs", "False", "9"], ["Nearest: 4."]),
        ([RUN, "4", "2", "h", "8118", "2", "logs", "False", "9"],
         ["NODE_RANK = '2': it must be an integer from 0 to 1. Nearest: 1."]),
        ([RUN, "4", "70000", "logs", "no", "0"],
         ["MASTER_PORT = '70000': it must be an integer from 1 to 65535. Nearest: 65535.",
          "JOIN = 'no': it must be True or False.", "CLUSTER_TIME_OUT = '0'"]),
        (["run.py --predict_data 'a"], ["No closing quotation. Close every quote: "]),
        (["run_mindformer.py --config x"],
         ["script 'run_mindformer.py' not found", "Nearest: run.py."]),
        (["python"], ["script '' not found"]),
        ([""], ["script '' not found"]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_reported_together(
    folder: Path, words: list[str], parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        read(words)
    for text in parts:
        assert text in str(error.value)


def test_torchrun_gets_the_rendezvous_address(folder: Path) -> None:
    words = ["16", "8", "10.0.0.1", "8118", "1", "logs", "False", "300"]
    arguments = torchrun_arguments(read([RUN, *words]))
    assert arguments == [
        *("--nnodes", "2", "--nproc-per-node", "8", "--node-rank", "1", "--max-restarts", "0"),
        *("--master-addr", "10.0.0.1", "--master-port", "8118", "--rdzv-conf", "timeout=300"),
        *(str(ROOT / "launcher/tools/worker.py"), str(folder / "logs"), str(ROOT / "run.py")),
        *RUN.split()[1:],
    ]


# --- before anything starts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([RUN.replace("run.yaml", "right.yaml"), "2"],
         "Nearest: data_parallel 2. Or pass 1 to msrun.sh as the number of workers."),
        (["python run.py --config wrong.yaml --run_mode train"],
         "did you mean `optimizer.weight_decay`?"),
        ([RUN, "2"], "run.yaml does not exist"),
        ([RUN, "2", "3"], "usage: bash msrun.sh"),
    ],
)  # fmt: skip
def test_a_mistake_ends_before_anything_starts(folder: Path, words: list[str], parts: str) -> None:
    build(folder)
    (folder / "wrong.yaml").write_text(RIGHT.replace("weight_decay", "weigth_decay"))
    code, out, err = run(folder, *words)
    assert (code, out) == (2, "")
    assert parts in err
    assert "Traceback" not in err
    assert not (folder / "output").exists()
    probe = (
        "import sys; from launcher.tools.msrun import main; code = main(sys.argv[1:]); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *words],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "2 False"


def test_questions_are_answered_without_a_launch(folder: Path) -> None:
    build(folder)
    assert run(folder, "--help")[:2] == (0, f"{USAGE}\n")
    code, out, _ = run(folder, "run.py --help", "4")
    assert (code, out.startswith("usage: python run.py")) == (0, True)
    command = "run.py --config right.yaml --run_mode train"
    two = "--parallel_config.data_parallel 2"
    code, out, _ = run(folder, f"{command} {two} --check_config", "2")
    assert (code, out) == (0, "right.yaml: the configuration is valid\n")
    assert run(folder, f"{command} --check_config", "2")[0] == 2
    assert "data_parallel: 2" in run(folder, f"{command} {two} --print_config", "2")[1]
    assert not (folder / "output").exists()


def test_a_port_in_use_and_a_folder_that_is_a_file(folder: Path) -> None:
    (folder / "taken").write_text("")
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, _, err = run(folder, "job.py done", "2", port, "logs", "False", "5")
    assert code == 2
    assert f"MASTER_PORT = {port}: the port cannot be used: Address already in use. Near" in err
    code, _, err = run(folder, "job.py done", "2", str(free_port()), "taken", "False", "5")
    assert code == 2
    assert "LOG_DIR = 'taken': taken cannot be written" in err


# --- real jobs ------------------------------------------------------------------------------------


def test_two_workers_train(workshop: Workshop) -> None:
    workshop.yaml(
        parallel_config={"data_parallel": 2},
        runner_config={"batch_size": 2, "max_steps": 3},
        callbacks=[],
    )
    logs = workshop.folder / "output/msrun_log"
    logs.mkdir(parents=True)
    (logs / "worker_0.log").write_text("an earlier run\n")
    code, out, err = run(workshop.folder, f"python3 {RUN}", "2")
    assert code == 0, err + out
    assert len(workshop.losses()) == 3
    assert out.count("training: steps 1 to 3") == 1
    assert out == (logs / "worker_0.log").read_text()
    assert (logs / "worker_0.log.1").read_text() == "an earlier run\n"
    assert (logs / "worker_1.log").is_file()
    assert (logs / "scheduler.log").is_file()
    assert err == "msrun: 2 workers, logs in output/msrun_log\n"


def test_one_worker_predicts_and_quotes_arrive(workshop: Workshop) -> None:
    workshop.yaml(generation_config={"max_new_tokens": 2})
    prompts = ["I love Beijing, because", 'a "quoted" word, it\'s', "$HOME and `date`"]
    command = (
        "python run.py --config run.yaml --run_mode predict "
        '--predict_data \'I love Beijing, because\' "a \\"quoted\\" word, it\'s" \\\n'
        " '$HOME and `date`'"
    )
    code, out, err = run(workshop.folder, command, "1")
    assert code == 0, err + out
    lines = (workshop.folder / "output/text_generation_result.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts


def test_a_job_that_fails_has_a_failed_exit_code(folder: Path) -> None:
    code, out, err = run(folder, "job.py fail 'a b'", "2")
    assert code == 3
    assert out == "rank 0 of 2 ['fail', 'a b']\nstopped by 15\n"
    log = "output/msrun_log/worker_1.log"
    assert f"msrun: rank 1 failed first, with exit code 3: see {log}\n" in err
    assert "[rank 1] the reason\n" in err
    assert "Traceback" not in err


def test_a_worker_that_is_killed(folder: Path) -> None:
    code, _, err = run(folder, "python job.py die", "2", str(free_port()), "logs", "False", "60")
    assert code == 128 + signal.SIGKILL
    assert "msrun: rank 1 failed first, by SIGKILL: see logs/worker_1.log" in err


def test_a_mistake_of_one_rank_is_printed_by_that_rank(workshop: Workshop) -> None:
    """Its peers lose their connection to it, which is not what went wrong."""
    workshop.yaml(
        parallel_config={"data_parallel": 2}, runner_config={"batch_size": 4}, callbacks=[]
    )
    (workshop.folder / "output/log").mkdir(parents=True)
    (workshop.folder / "output/log/rank_1").touch()
    code, out, err = run(workshop.folder, RUN, "2")
    assert code == 2
    assert "msrun: rank 1 failed first, with exit code 2" in err
    assert "[rank 1] error: output_dir = 'output': output/log/rank_1 cannot be written" in err
    assert "Traceback" not in out + err
    assert "gloo" not in out + err


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells children of their parent's death")
def test_workers_end_with_their_launcher(folder: Path) -> None:
    process = start(folder, "job.py wait", "2")
    logs = [folder / f"output/msrun_log/worker_{rank}.log" for rank in range(2)]
    wait_for(lambda: all(log.is_file() and "rank" in log.read_text() for log in logs))
    process.kill()
    process.communicate()
    wait_for(lambda: all("stopped by 15" in log.read_text() for log in logs))


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_workers(folder: Path, number: signal.Signals) -> None:
    process = start(folder, "job.py wait", "2")
    logs = [folder / f"output/msrun_log/worker_{rank}.log" for rank in range(2)]
    wait_for(lambda: all(f"rank {rank} of 2" in log.read_text() if log.is_file() else False
                         for rank, log in enumerate(logs)))  # fmt: skip
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert out.endswith(f"stopped by {number:d}\n")
    assert f"stopped by {number:d}" in logs[1].read_text()


def test_two_nodes_meet(folder: Path) -> None:
    port = str(free_port())
    words = [
        ("job.py done", "4", "2", "127.0.0.1", port, str(node), "logs", "False", "600")
        for node in (0, 1)
    ]
    nodes = [start(folder, *line) for line in words]
    (out, err), (other, other_err) = [node.communicate() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], err + other_err
    assert (out, other) == ("rank 0 of 4 ['done']\n", "")
    texts = [(folder / f"logs/worker_{rank}.log").read_text() for rank in range(4)]
    assert texts == [f"rank {rank} of 4 ['done']\n" for rank in range(4)]
    assert {path.name for path in (folder / "logs").iterdir()} == {
        *(f"worker_{rank}.log" for rank in range(4)), "scheduler.log", "scheduler_1.log"
    }  # fmt: skip


def test_a_node_that_stays_alone(folder: Path) -> None:
    words = ("4", "2", "127.0.0.1", str(free_port()), "0", "logs", "False", "1")
    code, out, err = run(folder, "job.py done", *words)
    assert (code, out) == (1, "")
    assert "msrun: rendezvous failed: " in err
    assert "start all 2 nodes within 1 s, with the same MASTER_ADDR and MASTER_PORT" in err
    assert "Traceback" in (folder / "logs/scheduler.log").read_text()


# --- the console ----------------------------------------------------------------------------------


def test_a_growing_file_is_shown_to_its_end(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "log"
    with Follower(path):
        time.sleep(0.15)
        with path.open("wb", buffering=0) as file:
            file.write("half a ré".encode()[:-1])
            time.sleep(0.25)
            file.write("é\n".encode()[1:] + b"x" * 200_000)
    out, _ = capfdbinary.readouterr()
    assert out == path.read_bytes()
    with Follower(None), Follower(tmp_path / "never"):
        pass


def test_last_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a\nb\xff\nc\n")
    assert last_lines(tmp_path / "log", 2) == ["b�", "c"]
    assert last_lines(tmp_path / "none", 2) == []


def test_the_interpreter_is_found(folder: Path) -> None:
    """$PYTHON first, then the active virtual environment."""
    scripts = {name: folder / name / "bin/python" for name in ("given", "active")}
    for name, script in scripts.items():
        script.parent.mkdir(parents=True)
        script.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        script.chmod(0o755)
    active = {"VIRTUAL_ENV": str(folder / "active")}
    expected = "-P -m launcher.tools.msrun job.py a b 2\n"
    assert run(folder, "job.py a b", "2", **active, PYTHON="")[1] == f"active {expected}"
    chosen = str(scripts["given"])
    assert run(folder, "job.py a b", "2", **active, PYTHON=chosen)[1] == f"given {expected}"


def test_a_folder_named_launcher_is_not_imported(folder: Path) -> None:
    (folder / "launcher").mkdir()
    (folder / "launcher/__init__.py").write_text("raise SystemExit(7)\n")
    assert run(folder, "--help")[0] == 0
