"""Each shard saved once: less on disk, the same weights, whatever layout reads them."""

from __future__ import annotations

import json
import re

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from launcher.tools.unified_safetensors import main
from tests.ranks import run_job
from tests.workshop import Workshop

LAYOUT = {"data_parallel": 2, "model_parallel": 2}


def trained(workshop: Workshop, output: str, *, once: bool) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "remove_redundancy": once}
    name = workshop.yaml(
        runner_config={"batch_size": 4, "max_steps": 2}, parallel_config=LAYOUT, callbacks=[monitor]
    )
    result = run_job(
        ["--config", name, "--run_mode", "train", "--output_dir", output], workshop.folder, 4
    )
    assert result.code == 0, result.stderr


def merged(workshop: Workshop, output: str) -> dict[str, bytes]:
    folder = workshop.folder / output
    (manifest,) = (folder / "checkpoint/manifest").glob("*.json")
    suffix = manifest.stem.rpartition("-")[2]
    arguments = ["--mindspore_ckpt_dir", str(folder / "checkpoint"), "--file_suffix", suffix,
                 "--output_dir", str(folder / "merged")]  # fmt: skip
    assert main(arguments) == 0
    return {
        name: tensor.numpy().tobytes()
        for file in (folder / "merged").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_copies_are_left_out_and_nothing_is_lost(workshop: Workshop) -> None:
    trained(workshop, "twice", once=False)
    trained(workshop, "once", once=True)
    sizes = {}
    for output in ("twice", "once"):
        files = sorted((workshop.folder / output / "checkpoint").glob("rank_*/*.safetensors"))
        sizes[output] = [file.stat().st_size for file in files]
    assert len(sizes["once"]) == 4
    assert sum(sizes["once"]) < 0.6 * sum(sizes["twice"])
    assert max(sizes["once"]) < 0.7 * max(sizes["twice"]), "the ranks share the writing"
    with safe_open(files[0], "pt") as file:
        assert file.metadata()["remove_redundancy"] == "True"
    assert merged(workshop, "once") == merged(workshop, "twice")


@pytest.mark.parametrize(
    ("balanced", "degrees"),
    [
        ("False", {"data_parallel": 4}),
        ("True", {"data_parallel": 4}),
        ("True", {"data_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2}),
    ],
)
def test_they_are_loaded_in_another_layout_and_with_balanced_load_read_once(
    workshop: Workshop, balanced: str, degrees: dict[str, int]
) -> None:
    trained(workshop, "once", once=True)
    name = workshop.yaml(runner_config={"batch_size": 2, "max_steps": 2}, parallel_config=degrees)
    result = run_job(
        ["--config", name, "--run_mode", "finetune", "--load_checkpoint", "once/checkpoint",
         "--balanced_load", balanced, "--output_dir", balanced],
        workshop.folder, 4,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    read = re.search(r"loaded: \d+ tensors, ([\d.]+) MB", result.stdout)
    assert read is not None, result.stdout
    weights = merged_weight_bytes(workshop) / 1e6
    times = 1 if balanced == "True" else 4
    assert float(read[1]) == pytest.approx(times * weights, abs=0.06 * times)
    losses = workshop.losses(balanced)
    plain = run_job(
        ["--config", name, "--run_mode", "finetune", "--load_checkpoint", "once/checkpoint",
         "--output_dir", "alone", "--parallel_config.data_parallel", "1", "--batch_size", "8",
         "--parallel_config.pipeline_stage", "1"],
        workshop.folder,
    )  # fmt: skip
    assert plain.code == 0, plain.stderr
    assert losses == pytest.approx(workshop.losses("alone"), rel=1e-5)


def merged_weight_bytes(workshop: Workshop) -> int:
    total = 0
    for file in (workshop.folder / "once" / "checkpoint").glob("rank_*/*.safetensors"):
        header = json.loads(
            file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]
        )
        total += sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in header.items()
            if name != "__metadata__" and not name.startswith("adam_")
        )
    return total
