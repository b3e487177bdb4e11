"""The commands themselves: real processes, torchrun, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import free_port, run_job, start_job
from tests.workshop import Workshop

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]


def start(workshop: Workshop, *arguments: str, launcher: list[str] | None = None):
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [*(launcher or [sys.executable]), str(ROOT / "run.py"), *arguments],
        cwd=workshop.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(workshop: Workshop, steps: int, process: subprocess.Popen) -> None:
    """Wait until `steps` are in metrics.jsonl; the process that writes them must be alive."""
    path = workshop.folder / "output" / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


ENDLESS = {"epochs": 1000, "max_steps": 100000}


def test_a_signal_to_the_command_saves(workshop: Workshop) -> None:
    name = workshop.yaml(runner_config=ENDLESS)
    process = start(workshop, "--config", name, "--run_mode", "train")
    wait_for_steps(workshop, 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143, err
    assert f"saved step {workshop.rows()[-1]['step']} " in out
    assert (workshop.folder / "output/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "stopped by SIGTERM" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_from_there(
    workshop: Workshop, number: int, code: int
) -> None:
    name = workshop.yaml(runner_config=ENDLESS)
    job = start_job(["--config", name, "--run_mode", "train"], workshop.folder)
    metrics = workshop.folder / "output/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert job.process.is_alive(), job.end()
        time.sleep(0.02)
    os.kill(job.process.pid, number)
    ended, out = job.end()
    assert ended == code, out
    assert f"stopped by {signal.Signals(number).name}" in out
    assert "Traceback" not in out
    done = workshop.rows()[-1]["step"]
    assert f"saved step {done} " in out
    assert (workshop.folder / "output/loss.png").is_file()
    arguments = ["--run_mode", "resume", "--runner_config.stop_step", str(done + 1)]
    resumed = run_job(["--config", name, *arguments], workshop.folder)
    assert resumed.code == 0, resumed.stderr
    assert f"step {done} of" in resumed.stdout
    assert [row["step"] for row in workshop.rows()] == list(range(1, done + 2))


def test_under_torchrun_a_signal_to_the_job_saves_too(workshop: Workshop) -> None:
    name = workshop.yaml(
        runner_config={**ENDLESS, "batch_size": 2},
        parallel_config={"data_parallel": 2},
        parallel={"enable_parallel_optimizer": True},
    )
    process = start(workshop, "--config", name, "--run_mode", "train", launcher=TORCHRUN)
    wait_for_steps(workshop, 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert process.returncode != 0
    assert "stopped by SIGTERM" in out
    last = workshop.rows()[-1]["step"]
    manifests = list((workshop.folder / "output/checkpoint/manifest").glob("*.json"))
    assert any(f'"global_step": {last},' in path.read_text() for path in manifests)


def test_a_mistake_under_torchrun_is_printed_once(workshop: Workshop) -> None:
    name = workshop.yaml(parallel_config={"data_parallel": 2}, runner_config={"batch_size": 2})
    arguments = ["--config", name, "--run_mode", "train", "--max_steps", "1"]
    assert run_job(arguments, workshop.folder, 2).code == 0
    wrong = start(workshop, *arguments, "--resume_training", "CKP_9", launcher=TORCHRUN)
    _, err = wrong.communicate()
    assert wrong.returncode != 0
    assert err.count("there is no such checkpoint") == 1


DYING = """
import os
import signal
import time
from launcher.train.callbacks import Callback

class Dying(Callback):
    def on_steps_end(self, run, records):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and run.world.rank == 1 and records[-1].step == 8:
            while not (run.output_dir / "checkpoint/manifest/CKP-1_5.json").exists():
                time.sleep(0.01)  # it is written beside training
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_job_that_lost_a_process_goes_on_by_itself(workshop: Workshop) -> None:
    (workshop.folder / "dying.py").write_text(DYING)
    callbacks = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 5, "async_save": True}]
    changes = {"runner_config": {"batch_size": 4}, "parallel_config": {"data_parallel": 2},
               "resume_training": True}  # fmt: skip
    name = workshop.yaml(
        register_path="dying.py", callbacks=[*callbacks, {"type": "Dying"}], **changes
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                "--max-restarts", "1", "--master_port", str(free_port())]  # fmt: skip
    process = start(workshop, "--config", name, "--run_mode", "train", launcher=torchrun)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "training: steps 6 to 20" in out
    assert out.count("saved step 20 ") == 1
    assert len(workshop.losses()) == 20
    whole = workshop.yaml("whole.yaml", callbacks=callbacks, output_dir="whole", **changes)
    assert run_job(["--config", whole, "--run_mode", "train"], workshop.folder, 2).code == 0
    assert workshop.losses() == workshop.losses("whole")
    saves = (workshop.saved(output, "1_20", 2) for output in ("output", "whole"))
    ours, theirs = ({n: raw for n, raw in s.items() if n.endswith(".safetensors")} for s in saves)
    assert ours == theirs
