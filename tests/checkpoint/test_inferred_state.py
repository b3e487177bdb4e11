"""The state inferred from files of MindFormers: where each number comes from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.builders.resume_report import InferredState
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.resume import Chosen, choose
from launcher.errors import UserError
from launcher.mindspore.inferred_state import infer_state
from launcher.train.state import TrainState, from_json
from launcher.weights.reading.scalars import scalars_of
from launcher.weights.source import open_complete
from tests.checkpoint import crew
from tests.mindspore.golden import ALL, needs_all

RUN: dict[str, Any] = {
    "metadata": {"loss_scaling": "dynamic", "global_batch_size": 8, "seed": 7},
    "loader": SimpleNamespace(global_batch=8), "steps_per_epoch": 100, "sink_size": 1,
    "state": TrainState(loss_scale=65536.0),
}  # fmt: skip
NAME = SaveName("mf", 0, 2, 3)


def chosen(folder: Path, name: SaveName | None = NAME, **scalars: float) -> Chosen:
    """A save with these scalars beside its one weight."""
    file = folder / "x.safetensors"
    beside = {key: torch.tensor([value]) for key, value in scalars.items()}
    save_file({"w": torch.ones(2), **beside}, file)
    source = open_complete(file)
    extras = {key: (source.tensors | source.extras)[key] for key in beside}
    source = replace(source, kind="distributed", tensors={"w": source.tensors["w"]}, extras=extras)
    return Chosen(folder, "mf-2_3", name, [file], source, {}, False)


def derived(found: Chosen, **run: Any) -> tuple[InferredState, TrainState]:
    result = infer_state(SimpleNamespace(**{**RUN, **run}), found)  # type: ignore[arg-type]
    return result, from_json(result.saved, "here")


def test_everything_the_files_say(tmp_path: Path) -> None:
    found = chosen(tmp_path, step_num=50, global_step=48, global_batch_size=16, loss_scale=512.0,
                   learning_rate=0.1, epoch_num=1)  # fmt: skip
    result, state = derived(found)
    assert state == TrainState(
        global_step=50, updates=48, consumed_samples=800, data_position=800, loss_scale=512.0
    )
    assert result.saved["global_batch_size"] == 16
    assert (result.steps_from, result.saved_by) == ("step_num in the files", "1 rank (not cut)")
    assert (result.has_batch, result.has_scale, result.unused) == (True, True, ("learning_rate",))


@pytest.mark.parametrize(
    ("sink_size", "name", "steps"),
    [(1, (2, 3), 103), (3, (2, 3), 6), (2, (2, 3), 103), (1, (1, 0), 0), (1, (0, 0), 0)],
)
def test_steps_by_the_name_and_samples_by_the_batch_of_this_run(
    tmp_path: Path, sink_size: int, name: tuple[int, int], steps: int
) -> None:
    result, state = derived(chosen(tmp_path, SaveName("mf", 0, *name)), sink_size=sink_size)
    assert (state.global_step, state.updates, state.consumed_samples) == (steps, steps, 8 * steps)
    assert state.loss_scale == 65536.0
    by_epoch = f"step {name[1]} of epoch {name[0]} in the name; an epoch has 100 in this run"
    assert result.steps_from == ("2 sinks of 3, from the name" if sink_size == 3 else by_epoch)
    assert not result.has_batch


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_loss_scale_that_is_none_is_not_taken(tmp_path: Path, scale: float) -> None:
    result, state = derived(chosen(tmp_path, loss_scale=scale))
    assert (state.loss_scale, result.has_scale) == (65536.0, False)


def test_a_loss_scale_is_taken_where_this_run_moves_its_own(tmp_path: Path) -> None:
    result, state = derived(chosen(tmp_path, loss_scale=2.0), metadata={"loss_scaling": None})
    assert (state.loss_scale, result.has_scale) == (65536.0, False)


@pytest.mark.parametrize("value", [-1.0, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("counter", ["step_num", "global_step", "global_batch_size"])
def test_a_counter_that_is_none_is_refused(tmp_path: Path, counter: str, value: float) -> None:
    with pytest.raises(UserError) as caught:
        derived(chosen(tmp_path, **{counter: value}))
    assert str(caught.value) == (
        f"{tmp_path}/x.safetensors: {counter} = {value}: it must be an integer, 0 or more. "
        "Resume from another checkpoint."
    )


def test_without_counter_or_name_nobody_knows_the_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not give the number of steps done"):
        derived(chosen(tmp_path, None))
    assert derived(chosen(tmp_path, None, global_step=4))[1].global_step == 4


@needs_all
@pytest.mark.parametrize("tree", ["moe_dp4mp2_opt_dedup", "dp2mp2pp2", "pp4"])
def test_genuine_rank_files(tree: str) -> None:
    strategy = ALL / "strategies" / tree.removesuffix("_dedup")
    logged: list[str] = []
    found = choose(ALL / "dist/ranks" / tree, True, crew.ALONE, logged.append, str(strategy))
    assert found is not None
    assert (found.label, logged) == ("toy-1_2", [])
    assert scalars_of(found.source) == {
        "epoch_num": 2, "step_num": 4, "global_step": 2, "loss_scale": 4096.0,
        "learning_rate": pytest.approx(1e-3),
    }  # fmt: skip
    state = derived(found)[1]
    assert (state.global_step, state.updates, state.loss_scale) == (4, 2, 4096.0)
