"""Machines that read their own files: what must be the same on all ranks is compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.config.schema import Config
from launcher.config.shared import shared_settings
from launcher.errors import UserError
from launcher.parallel.consistency import check_same
from launcher.parallel.world import World
from launcher.weights.content import content_of
from launcher.weights.source import open_complete


class Together(World):
    """Ranks whose values are known beforehand."""

    def gather(self, value: Any) -> list[Any]:
        return [value, *THE_OTHERS]


THE_OTHERS: list[dict[str, Any]] = []


def problems(mine: dict[str, Any], *others: dict[str, Any]) -> list[str]:
    THE_OTHERS[:] = others
    world = Together(0, len(others) + 1, torch.device("cpu"))
    with pytest.raises(UserError) as caught:
        check_same(world, mine, rule="alike", advice="Copy")
    return [problem.what for problem in caught.value.problems]


def test_every_difference_is_named_with_its_rank() -> None:
    rank_0 = {"seed": 1, "lr": 0.1, "epochs": 3}
    assert problems(rank_0, dict(rank_0), {"seed": 1, "lr": 0.2, "more": True}) == [
        "lr: 0.2 on rank 2, 0.1 on rank 0",
        "epochs: None on rank 2, 3 on rank 0",
        "more: True on rank 2, None on rank 0",
    ]


def test_long_values_are_shortened() -> None:
    (what,) = problems({"prompts": ["x" * 1000]}, {"prompts": []})
    assert len(what) < 120


def test_paths_may_differ_between_machines_but_not_whether_there_is_one() -> None:
    here = Config(output_dir="/here", load_checkpoint="/a/weights", seed=1)
    there = replace(here, output_dir="/there", load_checkpoint="/b/weights")
    assert shared_settings(here) == shared_settings(there)
    without = shared_settings(replace(here, load_checkpoint=""))
    assert {k for k, v in shared_settings(here).items() if without[k] != v} == {
        "load_checkpoint is given"
    }
    assert shared_settings(replace(here, seed=2)) != shared_settings(here)


def test_content_of_weights_does_not_depend_on_files_but_on_values(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(40, 50), "b": torch.arange(7.0), "c": torch.tensor(1.0)}
    contents = []
    for name, change in (("one", 0.0), ("same", 0.0), ("other", 1e-3)):
        folder = tmp_path / name
        folder.mkdir()
        changed = {key: value + change for key, value in tensors.items()}
        order = list(changed) if name == "one" else list(reversed(changed))
        save_file({key: changed[key] for key in order}, folder / "model.safetensors")
        contents.append(content_of(open_complete(folder)))
    assert contents[0] == contents[1] != contents[2]
    assert contents[0].startswith("3 tensors, ")
