"""Training on two machines without a shared file system for checkpoints, two ranks on each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.catalog import in_progress_marker, published
from tests.ranks import JobResult, _job, run_ranks
from tests.workshop import Workshop

NODES = ("a", "b")
CUT = {"data_parallel": 2, "model_parallel": 2}


def _on_node(folder: str, nodes: list[str], arguments: list[str]) -> tuple[int, str, str]:
    from launcher import cli

    cli.ECHO_DELAY_SECONDS = 0.0
    return _job(arguments, str(Path(folder, nodes[int(os.environ["RANK"])])))


class Machines:
    """The machines; a relative folder of checkpoints means another one on each."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop, self.folder = workshop, workshop.folder
        for node in NODES:
            (self.folder / node).mkdir()

    def train(
        self, output: str, *overrides: str, nodes: str = "aabb", cut: dict[str, int] = CUT,
        monitor: dict[str, Any] | None = None, steps: int = 4,
    ) -> JobResult:  # fmt: skip
        workshop = self.workshop
        name = workshop.yaml(
            output_dir=str(self.folder / output),
            processor={"tokenizer": {"pretrained_model_dir": str(self.folder / "tokenizer")}},
            train_dataset={"data_loader": {"dataset_dir": str(self.folder / "corpus")}},
            model={"model_config": {"num_hidden_layers": 1, "hidden_size": 16}},
            runner_config={"max_steps": 6, "stop_step": steps, "batch_size": 4},
            parallel_config=cut,
            callbacks=[{
                "type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_checkpoint_max": 2,
                "directory": output, **(monitor or {}),
            }],
            resume_training=True,
        )  # fmt: skip
        arguments = ["--config", str(self.folder / name), "--run_mode", "train", *overrides]
        found = run_ranks(len(nodes), _on_node, str(self.folder), list(nodes), arguments)
        return JobResult([code for code, _, _ in found], found[0][1],
                         "".join(error for _, _, error in found))  # fmt: skip

    def root(self, node: str, output: str) -> Path:
        return self.folder / node / output / "checkpoint"

    def saved(self, output: str) -> list[list[str]]:
        return [[str(c.name) for c in published(self.root(node, output))] for node in NODES]

    def losses(self, output: str) -> dict[int, float]:
        """The newest of each step."""
        return {row["step"]: row["loss"] for row in self.workshop.rows(output) if "loss" in row}


@pytest.fixture
def machines(workshop: Workshop) -> Machines:
    return Machines(workshop)


def test_a_run_goes_on_from_what_both_disks_have(machines: Machines) -> None:
    whole = machines.train("whole", steps=6, monitor={"async_save": True})
    assert whole.codes == [0] * 4, whole.stderr
    assert machines.saved("whole") == [["CKP-1_4", "CKP-1_6"]] * 2
    assert machines.train("parts").codes == [0] * 4
    for node in NODES:  # a crash in the middle of a save, of which one disk has the manifest
        root = machines.root(node, "parts")
        newest = published(root)[-1]
        if node == "b":
            newest.manifest_path.rename(in_progress_marker(root, newest.name))
    result = machines.train("parts", steps=6, monitor={"keep_checkpoint_max": 1})
    assert result.codes == [0] * 4, result.stderr
    assert "skipped CKP-1_4: the file system of rank 2 has no valid manifest" in result.stdout
    assert "removed 8 files of a save that was never finished" in result.stdout
    assert "training: steps 3 to 6" in result.stdout
    assert machines.losses("parts") == machines.losses("whole")
    assert machines.saved("parts") == [["CKP-1_6"]] * 2
    for node, ranks in (("a", (0, 1)), ("b", (2, 3))):
        files = machines.root(node, "parts").glob("rank_*/*.safetensors")
        assert sorted(f.name for f in files) == [f"CKP_rank_{r}-1_6.safetensors" for r in ranks]
        same = [machines.root(node, o) / "rank_{0}/CKP_rank_{0}-1_6.safetensors".format(ranks[1])
                for o in ("whole", "parts")]  # fmt: skip
        assert same[0].read_bytes() == same[1].read_bytes()


def test_what_lies_on_another_disk_is_an_error_of_all_ranks(machines: Machines) -> None:
    assert machines.train("run", cut={"model_parallel": 4}).codes == [0] * 4
    published(machines.root("a", "run"))[-1].files[1].unlink()
    result = machines.train("run", steps=6)
    assert result.codes == [2] * 4, result.stderr
    assert "skipped CKP-1_4: " in result.stdout
    assert "rank_1/CKP_rank_1-1_4.safetensors is missing" in result.stdout
    reported = {line.removeprefix(f"[rank {rank}] ") for rank, line in zip(
        range(4), result.stderr.splitlines(), strict=True)}  # fmt: skip
    assert len(reported) == 1, reported
    assert "rank 1 needs rank_2/CKP_rank_2-1_2.safetensors, rank_3/CKP_rank_3-1_2" in reported.pop()
    assert machines.saved("run") == [["CKP-1_2", "CKP-1_4"]] * 2


def test_complete_weights_need_a_disk_that_all_see(machines: Machines) -> None:
    result = machines.train("run", monitor={"integrated_save": True})
    assert result.codes == [2] * 4
    assert result.stderr.count("True: rank 2 and rank 0 do not share a file system") == 4
