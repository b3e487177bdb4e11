"""Two machines that share no folder: they train, resume and fine-tune, and end together."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.machines import NODES, Ended, Job
from tests.workshop import Workshop

SABOTAGE = """\
import os
import signal

from launcher.checkpoint.commit import Commit
from launcher.checkpoint.store import Store
from launcher.train.callbacks import Callback


class Sabotage(Callback):
    \"\"\"One rank fails, or is killed, at a place of the run.\"\"\"

    def __init__(self, rank: int, place: str, kill: bool) -> None:
        self.rank, self.place, self.kill = rank, place, kill

    def strike(self, *arguments, **named):
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("sabotage")

    def on_train_begin(self, run):
        if run.world.rank != self.rank:
            return
        if self.place == "begin":
            self.strike()
        if self.place == "save":
            Commit._write = self.strike
            if not self.kill:
                Store.save = self.strike

    def on_steps_end(self, run, records):
        if run.world.rank == self.rank and self.place == "step" and run.global_step == 2:
            self.strike()
"""


MONITOR = {"type": "CheckpointMonitor", "save_checkpoint_steps": 2}


class Machines:
    """The folders of the two machines, with the same materials in each."""

    def __init__(self, workshop: Workshop) -> None:
        self.folder = workshop.folder
        for node in NODES:
            (self.folder / node).mkdir()
            for name in ("corpus", "tokenizer"):
                shutil.copytree(self.folder / name, self.folder / node / name)
        self.workshops = {node: Workshop(self.folder / node) for node in NODES}

    def start(self, *overrides: str, **changes: Any) -> Job:
        for workshop in self.workshops.values():
            (workshop.folder / "sabotage.py").write_text(SABOTAGE)
            changes.setdefault("runner_config", {"max_steps": 4, "batch_size": 2})
            name = workshop.yaml(
                parallel_config={"data_parallel": 2, "model_parallel": 2},
                model={"model_config": {"num_hidden_layers": 1, "hidden_size": 16}},
                **({"callbacks": [MONITOR]} | changes),
            )  # fmt: skip
        return Job(self.folder, ["--config", name, "--run_mode", "train", *overrides])

    def run(self, *overrides: str, **changes: Any) -> Ended:
        ended = self.start(*overrides, **changes).end()
        assert ended.codes == [0] * 4, ended.output
        return ended

    def losses(self, output: str) -> list[float]:
        return self.workshops["a"].losses(output)


@pytest.fixture
def machines(workshop: Workshop) -> Machines:
    return Machines(workshop)


def assert_ended(ended: Ended, code: int, reason: str, *, printed_on: tuple[int, ...]) -> None:
    """All ranks have ended with a failure, and the reason is on the console of both machines."""
    assert None not in ended.codes, ("a rank waits for ever", ended)
    assert 0 not in ended.codes, ended
    assert code in ended.codes, ended
    for rank in printed_on:
        assert reason in ended.output[rank], ended


def test_training_resuming_and_fine_tuning_need_no_shared_folder(machines: Machines) -> None:
    whole = machines.run("--output_dir", "whole")
    assert "data: 5 documents" in whole.output[0]
    machines.run("--output_dir", "parts", "--runner_config.stop_step", "2")
    resumed = machines.run("--output_dir", "parts", "--resume_training", "True")
    assert "training: steps 3 to 4" in resumed.output[0]
    assert machines.losses("parts") == machines.losses("whole")
    for node, ranks in (("a", (0, 1)), ("b", (2, 3))):
        root = machines.folder / node / "parts"
        assert len(list((root / "dataset_cache").glob("*/tokens.bin"))) == 1
        files = sorted(path.name for path in root.glob("checkpoint/rank_*/*-1_4.safetensors"))
        assert files == [f"CKP_rank_{rank}-1_4.safetensors" for rank in ranks]
    alone = machines.workshops["a"]
    from tests.ranks import run_job

    name = alone.yaml("alone.yaml", output_dir="alone", model={"model_config": {
        "num_hidden_layers": 1, "hidden_size": 16}}, runner_config={"max_steps": 1},
        callbacks=[{"type": "CheckpointMonitor", "integrated_save": True}])  # fmt: skip
    assert run_job(["--config", name, "--run_mode", "train"], alone.folder).code == 0
    for node in NODES:  # complete weights, copied to each
        weights = machines.folder / "a/alone/checkpoint_integrated/CKP-1_1"
        shutil.copytree(weights, machines.folder / node / "weights")
    tuned = machines.run("--output_dir", "tuned", "--run_mode", "finetune",
                         "--load_checkpoint", "weights")  # fmt: skip
    assert "read from weights (complete)" in tuned.output[0]


@pytest.mark.parametrize("kill", [False, True], ids=["error", "kill"])
@pytest.mark.parametrize(
    ("rank", "place"),
    [
        (2, "step"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (
            (0, "step"), (3, "begin"), (0, "begin"), (3, "save"), (0, "save"))),
    ],
)  # fmt: skip
def test_a_rank_that_fails_or_is_killed_ends_all(
    machines: Machines, rank: int, place: str, kill: bool
) -> None:
    entry = {"type": "Sabotage", "rank": rank, "place": place, "kill": kill}
    ended = machines.start(
        register_path="sabotage.py", callbacks=[MONITOR, entry],
        runner_config={"max_steps": 100000, "batch_size": 2},
    ).end()  # fmt: skip
    others = tuple(other for other in range(4) if other != rank)
    if kill:
        reason = f"rank {rank} on "
        assert_ended(ended, -signal.SIGKILL, reason, printed_on=others)
        assert "it ended without a message" in ended.output[others[0]]
    else:
        assert_ended(ended, 1, "sabotage", printed_on=(0, 2))


def spoil_data(folder: Path) -> str:
    (folder / "corpus/more.py").symlink_to("nowhere")
    return "cannot be read"


def spoil_tokenizer(folder: Path) -> str:
    (folder / "tokenizer/tokenizer.json").write_text("{")
    return "tokenizer.json"


def change_data(folder: Path) -> str:
    (folder / "corpus/more.py").write_text("print('only here')\n")
    return "the data on the machine of rank 2 differs from that of rank 0"


def drop_data(folder: Path) -> str:
    shutil.rmtree(folder / "corpus")
    return "'corpus': no such file or directory"


@pytest.mark.parametrize(
    "spoil",
    [
        drop_data,
        *(pytest.param(f, marks=pytest.mark.long) for f in (
            spoil_data, spoil_tokenizer, change_data)),
    ],
)  # fmt: skip
def test_what_is_wrong_on_one_machine_ends_both(machines: Machines, spoil: Any) -> None:
    reason = spoil(machines.folder / "b")
    ended = machines.start().end()
    assert_ended(ended, 2, reason, printed_on=(0, 2))


@pytest.mark.long
def test_a_machine_without_the_weights_ends_both(machines: Machines) -> None:
    machines.run("--output_dir", "first")
    shutil.copytree(machines.folder / "a/first/checkpoint", machines.folder / "a/weights")
    ended = machines.start("--run_mode", "finetune", "--load_checkpoint", "weights").end()
    assert_ended(ended, 2, "weights", printed_on=(0, 2))


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_killed_while_data_is_prepared_ends_all(machines: Machines, rank: int) -> None:
    text = "".join(f"word{number} " for number in range(4_000_000))
    for node in NODES:
        (machines.folder / node / "corpus/large.py").write_text(text)
    job = machines.start()
    path = machines.folder / NODES[rank // 2] / "output/dataset_cache"
    while not list(path.glob(".*.tmp")):
        assert job.processes[rank].is_alive(), job.output(rank)
    os.kill(job.processes[rank].pid or 0, signal.SIGKILL)
    others = tuple(other for other in range(4) if other != rank)
    assert_ended(job.end(), -signal.SIGKILL, f"rank {rank} on ", printed_on=others)
