"""A run goes on from saves of MindFormers: bit for bit where the layout, the data and the
configuration are those of the run that saved, which nothing but the user knows.

The saves are our own, turned into what MindFormers leaves: rank files without notes, counters
beside the tensors, a meta.json a rank, strategy files; no manifest and no state.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.mindspore.rank_weights import open_mindspore_ranks
from launcher.mindspore.strategy_files import read_strategy
from launcher.weights.offline.export import write_complete
from tests.end_to_end.test_resume_choices import resume, stamps, start
from tests.workshop import Workshop, merged

CUT: dict[str, Any] = {"parallel_config": {"model_parallel": 2}}
SAVES = (5, 10, 15, 20)
BATCH = 8


def monitor(**more: Any) -> dict[str, Any]:
    return {"callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 5, **more}]}


def counters(step: int) -> dict[str, torch.Tensor]:
    """What MindFormers writes beside the tensors."""
    return {
        "epoch_num": torch.tensor(1), "step_num": torch.tensor(step),
        "global_step": torch.tensor([step], dtype=torch.int32),
        "loss_scale": torch.tensor([1.0]), "learning_rate": torch.tensor(0.5),
        "beta1_power": torch.tensor(0.9**step),
    }  # fmt: skip


def as_mindformers(output: Path, target: Path, *, has_counters: bool = True) -> Path:
    """The saves of `output` as MindFormers would leave them in `target`; its folder of them."""
    shutil.copytree(output / "strategy", target / "strategy")
    for file in sorted(output.glob("checkpoint/rank_*/*.safetensors")):
        folder = target / "checkpoint" / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        epoch, step = map(int, file.stem.rpartition("-")[2].split("_"))
        assert epoch == 1
        tensors = {**load_file(file), **(counters(step) if has_counters else {})}
        save_file(tensors, folder / file.name, {"format": "ms", "remove_redundancy": "False"})
        point_to(folder, SAVES[-1])
    return target / "checkpoint"


def point_to(folder: Path, step: int) -> None:
    """Let the meta.json of a rank folder name this step."""
    content = {"last_epoch": 1, "last_step": step,
               "last_ckpt_file": f"CKP_{folder.name}-1_{step}.safetensors"}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def saved(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A run of twenty steps on two ranks, and its saves in `mf/`; do not write here."""
    workshop = materials.copy_to(tmp_path_factory.mktemp("foreign") / "work")
    name = workshop.yaml(**merged(CUT, monitor()))
    assert start(workshop, name, "whole", world=2).code == 0
    as_mindformers(workshop.folder / "whole", workshop.folder / "mf")
    return workshop


def text(result: Any) -> str:
    return " ".join(result.stdout.split())


def test_the_smallest_meta_json_bitwise_and_only_read(saved: Workshop, tmp_path: Path) -> None:
    workshop = saved.copy_to(tmp_path / "work")
    folder = workshop.folder / "mf/checkpoint"
    point_to(folder / "rank_0", 15)
    point_to(folder / "rank_1", 10)
    name = workshop.yaml(**merged(CUT, monitor(keep_checkpoint_max=1)))
    before = stamps(workshop.folder / "mf")
    result = resume(workshop, name, "output", "--load_checkpoint", "mf/checkpoint", world=2)
    assert workshop.losses("output") == workshop.losses("whole")[10:]
    assert stamps(workshop.folder / "mf") == before
    begin = result.stdout.index("resumed:")
    assert result.stdout[begin:].splitlines()[:6] == [
        "resumed: CKP-1_10 of mf/checkpoint, step 10 of 20",
        "  saved by       2 ranks after 10 steps (step_num in the files), without a state file",
        "  restored       weights, optimizer state, step",
        "  assumed        80 samples trained on, a global batch of 8 (that of this run), in the "
        "order of this run",
        "  not known      data, configuration and versions of the run that saved",
        "  not used       beta1_power, learning_rate",
    ]
    assert "bit for bit" not in result.stdout
    again = resume(workshop, name, "output", "--max_steps", "21", world=2)
    assert "resumed: CKP-1_20 of output/checkpoint" in again.stdout


def test_in_its_own_folder_under_another_name(saved: Workshop, tmp_path: Path) -> None:
    """Retention leaves the saves that it did not make, and nobody writes over their strategy."""
    workshop = saved.copy_to(tmp_path / "work")
    folder = workshop.folder / "mf/checkpoint"
    (folder / "rank_1/CKP_rank_1-1_20.safetensors").unlink()
    (folder / "rank_0/CKP_rank_0-1_15.safetensors").write_bytes(b"?")
    before = {n: s for n, s in stamps(workshop.folder / "mf").items() if "meta.json" not in n}
    name = workshop.yaml(**merged(CUT, monitor(keep_checkpoint_max=1)))
    result = resume(workshop, name, "mf", world=2)
    assert "skipped CKP-1_20: " in result.stdout
    assert "skipped CKP-1_15: mf/checkpoint/rank_0/CKP_rank_0-1_15.safeten" in result.stdout
    assert "resumed: CKP-1_10 of mf/checkpoint, step 10 of 20" in result.stdout
    assert "strategy: not written, mf/strategy is needed by rank files beside it" in result.stdout
    assert workshop.losses("mf") == workshop.losses("whole")[10:]
    after = stamps(workshop.folder / "mf")
    assert {name: after.get(name) for name in before} == before
    assert [path.name for path in (folder / "manifest").iterdir()] == ["CKP_1-1_20.json"]
    again = resume(workshop, name, "mf", "--max_steps", "21", world=2)
    assert "resumed: CKP_1-1_20 of mf/checkpoint, step 20 of 21" in again.stdout
    assert stamps(workshop.folder / "mf/strategy") == {
        Path(name).name: stamp for name, stamp in before.items() if name.startswith("strategy")
    }


def test_a_name_on_one_rank_with_twice_the_batch(saved: Workshop, tmp_path: Path) -> None:
    workshop = saved.copy_to(tmp_path / "work")
    folder = workshop.folder / "mf/checkpoint"
    for file in folder.glob("rank_*/*-1_10.safetensors"):
        tensors = {**load_file(file), "global_batch_size": torch.tensor(BATCH)}
        save_file(tensors, file, {"format": "ms"})
    name = workshop.yaml(runner_config={"batch_size": 2 * BATCH})
    result = resume(
        workshop, name, "output", "--load_checkpoint", "mf/checkpoint", "--resume_training",
        "CKP_rank_0-1_10", "--max_steps", "6", "--data_skip_steps", "2",
    )  # fmt: skip
    assert "resumed: CKP-1_10 of mf/checkpoint, step 5 of 6" in result.stdout
    printed = text(result)
    assert "assumed 80 samples trained on, a global batch of 8 (from the files)" in printed
    assert "layout 2 ranks -> 1 rank" in printed
    assert "global batch was 8, is 16: resuming after 80 samples, as step 5" in printed
    assert "data beginning at sample 32, as configured" in printed
    assert [row["step"] for row in workshop.rows("output")] == [6]


@pytest.mark.parametrize("kind", ["mindspore", "ours"])
def test_steps_by_the_name_alone(saved: Workshop, tmp_path: Path, kind: str) -> None:
    workshop = saved.copy_to(tmp_path / "work")
    if kind == "ours":
        shutil.rmtree(workshop.folder / "whole/checkpoint/manifest")
        shutil.rmtree(workshop.folder / "whole/checkpoint/state")
        folder = "whole/checkpoint"
    else:
        as_mindformers(workshop.folder / "whole", workshop.folder / "bare", has_counters=False)
        folder = "bare/checkpoint"
    result = resume(
        workshop, "run.yaml", "output", "--load_checkpoint", folder, "--resume_training",
        "CKP_rank_0-1_15", world=2,
    )  # fmt: skip
    assert "after 15 steps (step 15 of epoch 1 in the name; an epoch has " in result.stdout
    assert workshop.losses("output") == workshop.losses("whole")[15:]


def test_complete_weights_with_counters_beside_them(saved: Workshop, tmp_path: Path) -> None:
    """E02: what MindSpore's merge leaves, with the optimizer's state in it."""
    workshop = saved.copy_to(tmp_path / "work")
    folder, target = workshop.folder / "mf/checkpoint", workshop.folder / "unified"
    target.mkdir()
    files = sorted(folder.glob("rank_*/*-1_15.safetensors"))
    strategy = read_strategy(workshop.folder / "mf/strategy")
    write_complete(open_mindspore_ranks(folder, files, strategy), target, form="mindspore")
    result = resume(workshop, "run.yaml", "output", "--load_checkpoint", "unified", world=2)
    assert "resumed: unified of unified, step 15 of 20" in result.stdout
    assert "complete weights after 15 steps (step_num in the files)" in result.stdout
    assert workshop.losses("output") == workshop.losses("whole")[15:]


def test_weights_alone_and_invalid_numbers(saved: Workshop, tmp_path: Path) -> None:
    workshop = saved.copy_to(tmp_path / "work")
    folder = workshop.folder / "mf/checkpoint"
    for file in folder.glob("rank_*/*.safetensors"):
        kept = {n: t for n, t in load_file(file).items() if not n.startswith("adam_")}
        if file.stem.endswith("1_15"):
            kept["step_num"] = torch.tensor(-1)
        save_file(kept, file, {"format": "ms"})
    name = workshop.yaml()
    options = ("--load_checkpoint", "mf/checkpoint", "--resume_training")
    refused = start(workshop, name, "output", *options, "True")
    assert refused.code == 2
    assert "mf/checkpoint: CKP_rank_0-1_20.safetensors holds weights without" in refused.stderr
    assert "a resumed run needs both. Use run_mode finetune" in refused.stderr
    refused = start(workshop, name, "output", *options, "CKP_rank_0-1_15")
    assert refused.code == 2
    assert "step_num = -1" in refused.stderr
    assert "it must be an integer, 0 or more" in refused.stderr
