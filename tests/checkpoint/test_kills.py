"""The crash matrix: a run is killed at each file operation of its saves, and at any time.

Each time it is started again, with nothing done by hand, and must go on from the newest published
checkpoint and end as the run that was never killed: every byte of the rank files, the state, the
losses, and no file more. A sample covers every kind of fault point; `pytest -m crash` kills at all.
"""

from __future__ import annotations

import random
import re
import shutil

import pytest

from launcher.checkpoint.catalog import published
from tests.checkpoint.killing import Fault, Operation, operations, run_killed, run_killed_after
from tests.ranks import run_job
from tests.workshop import Workshop

ARGUMENTS = ["--config", "run.yaml", "--run_mode", "train"]
STEPS = 3
WORLDS = (1, 2, 4)
EACH_OTHER = 1
"""Faults of each run that is not rank 0 alone, waiting."""
SEED = 20


class Killed:
    """A run of `world` ranks, once without faults, and then killed many times."""

    def __init__(self, workshop: Workshop, world: int, beside: bool) -> None:
        self.workshop, self.world = workshop, world
        workshop.yaml(
            model={"model_config": {"num_hidden_layers": 1, "hidden_size": 16}},
            runner_config={"max_steps": STEPS, "batch_size": 8 // (2 if world > 1 else 1)},
            parallel_config={"data_parallel": min(world, 2), "model_parallel": max(world // 2, 1)},
            callbacks=[{
                "type": "CheckpointMonitor", "save_checkpoint_steps": 1, "keep_checkpoint_max": 1,
                "async_save": beside,
            }],
            resume_training=True,
        )  # fmt: skip
        self.output = workshop.folder / "output"
        self.operations = operations(workshop.folder, ARGUMENTS, world)
        self.expected = self.left()
        self.losses = workshop.losses()

    def left(self) -> dict[str, bytes]:
        """The content of the folder of checkpoints; of manifests, which have a time, the name."""
        root = self.output / "checkpoint"
        files = (path for path in root.rglob("*") if path.is_file())
        return {
            str(path.relative_to(root)): b"" if path.parent.name == "manifest"
            else path.read_bytes()
            for path in files
        }  # fmt: skip

    def die(self, fault: Fault) -> None:
        """Kill a new run there, and check that it resumes to the same result."""
        shutil.rmtree(self.output)
        run_killed(self.workshop.folder, ARGUMENTS, self.world, fault)
        self.go_on()

    def go_on(self) -> None:
        """Start again, and compare with the run that was never killed."""
        found = published(self.output / "checkpoint")
        newest = found[-1].manifest["global_step"] if found else 0
        result = run_job(ARGUMENTS, self.workshop.folder, self.world)
        assert result.code == 0, result.stderr
        if newest == STEPS:
            assert "nothing to do" in result.stdout
        elif newest:
            assert re.search(rf"training: steps {newest + 1} to {STEPS}", result.stdout)
        assert self.workshop.losses() == self.losses
        assert self.left() == self.expected


@pytest.fixture(scope="module")
def killed(materials: Workshop, tmp_path_factory) -> dict[tuple[int, bool], Killed]:
    """The runs, by ranks and whether they save asynchronously; created on demand."""
    return _Runs(materials, tmp_path_factory)


class _Runs(dict):
    def __init__(self, materials: Workshop, factory: pytest.TempPathFactory) -> None:
        self._make = lambda: materials.copy_to(factory.mktemp("killed"))

    def __missing__(self, key: tuple[int, bool]) -> Killed:
        self[key] = Killed(self._make(), *key)
        return self[key]


def faults_of(ranks: list[list[Operation]]) -> list[tuple[str, Fault]]:
    """Every fault of a run, each with its kind."""
    found = []
    for rank, done in enumerate(ranks):
        for index, operation in enumerate(done):
            moments = ["before", "after"] + ["half"] * (operation.name == "pwrite")
            found += [(f"{moment} {operation.kind}", Fault(rank, index, moment))
                      for moment in moments]  # fmt: skip
    return found


def test_killed_at_every_kind_of_fault_point(killed) -> None:
    """One of each kind, spread over runs of 1, 2 and 4 ranks, asynchronous and not."""
    chance = random.Random(SEED)
    alone = faults_of(killed[1, False].operations)
    by_kind: dict[str, list[Fault]] = {}
    for kind, fault in alone:
        by_kind.setdefault(kind.partition(" ")[2], []).append(fault)
    chosen = [((1, False), chance.choice(faults)) for faults in by_kind.values()]
    others = [(world, beside) for world in WORLDS for beside in (False, True)][1:]
    for run in others * EACH_OTHER:
        chosen.append((run, chance.choice(faults_of(killed[run].operations))[1]))
    for run, fault in chosen:
        try:
            killed[run].die(fault)
        except AssertionError as error:
            raise AssertionError(f"{run} {fault}: {error}") from error


@pytest.mark.crash
@pytest.mark.parametrize("beside", [False, True], ids=["waits", "beside"])
@pytest.mark.parametrize("world", WORLDS)
def test_killed_at_every_fault_point(killed, world: int, beside: bool) -> None:
    """Before each operation of a single rank that saves synchronously; a seeded sample of the
    others, before, after or in the middle of one; and at random times."""
    run = killed[world, beside]
    chance = random.Random(world)
    faults = [fault for _, fault in faults_of(run.operations)]
    if world == 1 and not beside:
        faults = [fault for fault in faults if fault.moment == "before"]
    else:
        faults = chance.sample(faults, 40)
    for fault in faults:
        try:
            run.die(fault)
        except AssertionError as error:
            raise AssertionError(f"{fault}: {error}") from error
    for _ in range(10):
        shutil.rmtree(run.output)
        run_killed_after(run.workshop.folder, ARGUMENTS, world, chance.uniform(0, 0.3))
        run.go_on()


def test_a_save_is_made_of_these_operations(killed) -> None:
    """A kind that the harness misses is not tested above."""
    kinds = {operation.kind for operation in killed[1, False].operations[0]}
    for kind in (
        "pwrite */.CKP_*.safetensors.tmp",
        "fsync */.CKP_*.safetensors.tmp",
        "replace */.CKP_*.safetensors.tmp",
        "fsync manifest",
        "fsync state",
        "replace manifest/.CKP*json.tmp",
        "replace manifest/CKP*json",
        "unlink manifest/.CKP*json.tmp",
        "unlink state/CKP*json",
        "unlink */CKP_*.safetensors",
        "mkdir manifest",
    ):
        assert any(same(kind, found) for found in kinds), (kind, sorted(kinds))


def same(pattern: str, kind: str) -> bool:
    """Whether a kind matches `pattern`, with * for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), kind) is not None
