"""The crash matrix without a shared file system: two machines with two ranks each, killed anywhere.

As `test_kills`: the run is started again, with nothing done by hand, goes on from the newest save
that both disks have, and leaves on each what the run that was never killed left there.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path

import pytest

from launcher.checkpoint.catalog import published
from launcher.parallel.filesystems import TOKEN
from tests.checkpoint.killing import Fault, Operation, operations, place, run_killed
from tests.checkpoint.test_kills import faults_of
from tests.ranks import JobResult, _job, run_ranks
from tests.workshop import Workshop

WORLD, DISKS, STEPS = 4, 2, 3
SAMPLE, PARTS = 40, 6


def _go_on(arguments: list[str], folder: str) -> tuple[int, str, str]:
    return _job(arguments, str(place(Path(folder), int(os.environ["RANK"]), WORLD, DISKS)))


class Killed:
    """A run on two file systems, once without faults, and then killed many times."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop, self.folder = workshop, workshop.folder
        self.filesystems = [place(self.folder, rank, WORLD, DISKS) for rank in (0, 2)]
        for disk in self.filesystems:
            disk.mkdir()
        name = workshop.yaml(
            output_dir=str(self.folder / "output"),
            processor={"tokenizer": {"pretrained_model_dir": str(self.folder / "tokenizer")}},
            train_dataset={"data_loader": {"dataset_dir": str(self.folder / "corpus")}},
            model={"model_config": {"num_hidden_layers": 1, "hidden_size": 16}},
            runner_config={"max_steps": STEPS, "batch_size": 4},
            parallel_config={"data_parallel": 2, "model_parallel": 2},
            callbacks=[{
                "type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 1,
                "directory": "output",
            }],
            resume_training=True,
        )  # fmt: skip
        self.arguments = ["--config", str(self.folder / name), "--run_mode", "train"]
        self.operations = operations(self.folder, self.arguments, WORLD, DISKS)
        self.expected, self.losses = self.left(), workshop.losses()

    def roots(self) -> list[Path]:
        return [disk / "output" / "checkpoint" for disk in self.filesystems]

    def left(self) -> dict[str, bytes]:
        """The content of the file systems; of manifests, which have a time, the name."""
        return {
            str(path.relative_to(self.folder)): b"" if path.parent.name == "manifest"
            else path.read_bytes()
            for root in self.roots() for path in root.rglob("*") if path.is_file()
        }  # fmt: skip

    def start_again(self) -> JobResult:
        found = run_ranks(WORLD, _go_on, self.arguments, str(self.folder))
        return JobResult([code for code, _, _ in found], found[0][1], found[0][2])

    def die(self, fault: Fault) -> None:
        """Kill a new run there, and check that it resumes to the same result."""
        for folder in (self.folder, *self.filesystems):
            shutil.rmtree(folder / "output", ignore_errors=True)
        run_killed(self.folder, self.arguments, WORLD, fault, DISKS)
        on_disks = [{c.manifest["global_step"] for c in published(root)} for root in self.roots()]
        newest = max(set.intersection(*on_disks), default=0)
        result = self.start_again()
        assert result.code == 0, result.stderr
        if newest == STEPS:
            assert "nothing to do" in result.stdout
        else:
            assert re.search(rf"training: steps {newest + 1} to {STEPS}", result.stdout)
        assert self.workshop.losses() == self.losses
        assert self.left() == self.expected


@pytest.fixture(scope="module")
def killed(materials: Workshop, tmp_path_factory) -> Killed:
    return Killed(materials.copy_to(tmp_path_factory.mktemp("killed")))


def kind_of(operation: Operation) -> str:
    return re.sub(rf"{re.escape(TOKEN)}\w+", TOKEN, operation.kind)


def faults(killed: Killed) -> list[Fault]:
    """One of every kind of operation of each leader, and some of all ranks."""
    chance = random.Random(DISKS)
    kinds: dict[tuple[int, str], list[Fault]] = {}
    for rank in (0, 2):  # the leaders
        for index, operation in enumerate(killed.operations[rank]):
            kinds.setdefault((rank, kind_of(operation)), []).append(Fault(rank, index))
    chosen = [chance.choice(faults) for faults in kinds.values()]
    every = [fault for _, fault in faults_of(killed.operations)]
    return [*chosen, *chance.sample(every, SAMPLE)]


@pytest.mark.crash
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_every_kind_of_operation_and_at_many_more(killed: Killed, part: int) -> None:
    for fault in faults(killed)[part::PARTS]:
        try:
            killed.die(fault)
        except AssertionError as error:
            operation = killed.operations[fault.rank][fault.index]
            raise AssertionError(f"{fault} {operation}: {error}") from error
