"""The loss scale: what it changes (only roundings), when a step is skipped, on any layout."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from launcher.train.callbacks import loss_line
from launcher.train.health import FiniteCheck
from launcher.train.run import TrainRun
from launcher.train.scaling import LossScaling, loss_scaling
from launcher.train.state import TrainState, from_json, to_json
from launcher.train.step import StepRecord
from tests.parallel.parity import Case
from tests.ranks import run_job
from tests.train.traces import Plan, traces
from tests.workshop import Workshop

DYNAMIC = "DynamicLossScaleUpdateCell"
HALF = {"compute_dtype": "float16"}


def scaled(value: Any = None, factor: float = 2, window: int = 1000) -> dict[str, Any]:
    """A dynamic loss scale, as the YAML has it."""
    sense = {"type": DYNAMIC, "loss_scale_value": value, "scale_factor": factor,
             "scale_window": window}  # fmt: skip
    return {"runner_wrapper": {"scale_sense": sense}}


def fixed(value: float) -> dict[str, Any]:
    """A fixed loss scale."""
    return {"runner_wrapper": {"scale_sense": value}}


# The policy.


@pytest.mark.parametrize(
    ("written", "dtype", "expected"),
    [
        (None, torch.float32, None),
        (None, torch.bfloat16, None),
        (None, torch.float16, LossScaling(first=65536.0, factor=2.0, window=1000)),
        (1.0, torch.float32, LossScaling(first=1.0)),
        (128, torch.float16, LossScaling(first=128.0)),
        ({"type": DYNAMIC}, torch.bfloat16, LossScaling(first=65536.0, factor=2.0, window=1000)),
        ({"type": DYNAMIC, "loss_scale_value": 8, "scale_factor": 4, "scale_window": 3},
         torch.float16, LossScaling(first=8.0, factor=4.0, window=3)),
        ({"type": "FixedLossScaleUpdateCell", "loss_scale_value": 8}, torch.float16,
         LossScaling(first=8.0)),
    ],
)  # fmt: skip
def test_configured_scales_are_used(written: Any, dtype: torch.dtype, expected: Any) -> None:
    assert loss_scaling(written, dtype) == expected


def test_the_scale_moves_down_at_once_and_up_after_a_window() -> None:
    scaling, state = LossScaling(first=8.0, factor=2.0, window=3), TrainState(loss_scale=8.0)
    seen = []
    for overflow in (False, False, True, False, False, False, False, True, True, True, True, True):
        scaling.move(state, overflow)
        seen.append((state.loss_scale, state.good_steps))
    assert seen == [(8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (4, 0), (2, 0), (1, 0),
                    (1, 0), (1, 0)]  # fmt: skip
    state.loss_scale = 2.0**64
    for _ in range(3):
        scaling.move(state, False)
    assert state.loss_scale == 2.0**64, "it does not leave float32"


def test_a_fixed_scale_stays() -> None:
    scaling, state = LossScaling(first=8.0), TrainState(loss_scale=8.0)
    for overflow in (True, False, True):
        scaling.move(state, overflow)
    assert (state.loss_scale, state.good_steps) == (8.0, 0)


def test_a_state_file_from_before_the_counter_still_resumes() -> None:
    content = to_json(TrainState(loss_scale=4.0, good_steps=7), {})
    assert from_json(content, "x.json").good_steps == 7
    del content["good_steps"]
    assert from_json(content, "x.json") == TrainState(loss_scale=4.0)


# Real runs.


def test_a_skipped_step_changes_nothing_but_the_scale(workshop: Workshop) -> None:
    plan = Plan(Case(more=scaled(1024, 2, 2)), poisoned=(0, 1, 4), looks=True)
    ((trace,),) = traces(workshop, plan)
    everything = {"weight", "moment", "counter"}
    assert trace.overflows == [True, True, False, False, True, False]
    assert trace.changed == [set(), set(), everything, everything, set(), everything]
    assert trace.scales == [1024, 512, 256, 256, 512, 256]
    assert trace.updates == [0, 0, 1, 2, 2, 3]
    assert trace.state is not None
    assert (trace.state.global_step, trace.state.data_position) == (6, 48), "data goes on"
    assert (trace.state.loss_scale, trace.state.good_steps) == (256, 1)


def test_a_power_of_two_changes_no_bit_in_fp32(workshop: Workshop) -> None:
    unscaled, one, large, moving = traces(
        workshop,
        *(Plan(Case(micro=2, more=more), steps=4) for more in
          ({}, fixed(1.0), fixed(2.0**15), scaled(2.0**10, 4, 1))),
    )  # fmt: skip
    assert unscaled[0].scales == [None] * 4
    assert moving[0].scales == [2.0**10, 2.0**12, 2.0**14, 2.0**16]
    for trace in (one[0], large[0], moving[0]):
        assert trace.overflows == [False] * 4
        assert (trace.losses, trace.norms) == (unscaled[0].losses, unscaled[0].norms)
        for name, expected in unscaled[0].parameters.items():
            np.testing.assert_array_equal(trace.parameters[name], expected, err_msg=name)


def test_without_a_scale_nothing_is_skipped(workshop: Workshop) -> None:
    ((trace,),) = traces(workshop, Plan(Case(), steps=3, poisoned=(1,)))
    assert trace.updates == [1, 2, 3]
    assert trace.overflows == [None] * 3
    assert math.isnan(trace.losses[2])


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2},
    "dp2 sharded": {"dp": 2, "sharded": True},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
}


def test_one_rank_overflowing_is_an_overflow_on_every_rank_of_any_layout(
    workshop: Workshop,
) -> None:
    more, poisoned = scaled(2.0**12, 4, 2), (1, 2)
    plans = [
        Plan(Case(**layout, more=more), poisoned=poisoned) for layout in ({}, *LAYOUTS.values())
    ]
    ((reference,), *others) = traces(workshop, *plans)
    assert reference.overflows == [False, True, True, False, False, False]
    for name, ranks in zip(LAYOUTS, others, strict=True):
        for trace in ranks:
            assert trace.overflows == reference.overflows, name
            assert trace.scales == reference.scales, name
            assert trace.updates == reference.updates, name
            assert trace.losses == pytest.approx(reference.losses, rel=1e-5), name


def test_fp16_finds_its_scale_on_any_layout(workshop: Workshop) -> None:
    # By factors of 256: far from the one scale at which roundings of a layout decide.
    more = scaled(2.0**32, 256, 3)
    plans = [
        Plan(Case(**layout, model=HALF, more=more), steps=7) for layout in ({}, *LAYOUTS.values())
    ]
    whole, ((reference,), *others) = traces(workshop, Plan(Case(), steps=1)), traces(
        workshop, *plans)  # fmt: skip
    assert reference.scales == [2.0**e for e in (32, 24, 16, 16, 16, 24, 16)]
    assert reference.overflows == [True, True, False, False, False, True, False]
    assert reference.losses[0] == pytest.approx(whole[0][0].losses[0], rel=1e-4)
    assert reference.losses[6] < reference.losses[1] < math.inf
    for name, ranks in zip(LAYOUTS, others, strict=True):
        for trace in ranks:
            assert trace.scales == reference.scales, name
            assert trace.overflows == reference.overflows, name
            assert trace.losses == pytest.approx(reference.losses, rel=2e-3), name


@pytest.mark.parametrize("family", ["llama", "qwen3 moe", "deepseek"])
def test_fp16_trains_like_fp32(workshop: Workshop, family: str) -> None:
    half, whole = traces(
        workshop, *(Plan(Case(family=family, model=model), steps=4) for model in (HALF, {}))
    )
    assert half[0].scales == [65536.0] * 4, "the default of float16 is a dynamic scale"
    assert half[0].losses == pytest.approx(whole[0].losses, rel=3e-3)


# Whole jobs.

JOB: dict[str, Any] = {
    "model": {"model_config": HALF},
    "callbacks": [
        {"type": "MFLossMonitor"},
        {"type": "CheckpointMonitor", "save_checkpoint_steps": 10},
    ],
    "check_for_nan_in_loss_and_grad": True,
}


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_has_bitwise_the_same_scales(workshop: Workshop, world: int) -> None:
    name = workshop.yaml(
        **JOB, **scaled(2.0**32, 256, 4), runner_config={"batch_size": 8 // world},
        parallel_config={"data_parallel": world},
        parallel={"enable_parallel_optimizer": world > 1},
    )  # fmt: skip
    for output, *more in (
        ("whole",), ("parts", "--runner_config.stop_step", "10"),
        ("parts", "--resume_training", "True"),
    ):  # fmt: skip
        arguments = ["--config", name, "--run_mode", "train", "--output_dir", output, *more]
        result = run_job(arguments, workshop.folder, world)
        assert result.code == 0, result.stderr
    whole, parts = (workshop.saved(output, "1_20", world) for output in ("whole", "parts"))
    assert whole == parts
    measured = ("loss", "grad_norm", "loss_scale", "overflow")
    rows = [[tuple(row[key] for key in measured) for row in workshop.rows(output)]
            for output in ("whole", "parts")]  # fmt: skip
    assert rows[0] == rows[1]
    (state,) = (workshop.folder / "parts/checkpoint/state").glob("*-1_10.json")
    assert json.loads(state.read_text())["good_steps"] == 3, "in the midst of a window"
    assert {row[2:] for row in rows[0]} >= {(2.0**24, True), (2.0**16, False)}


def test_a_resumed_run_takes_a_scale_that_is_configured_anew(workshop: Workshop) -> None:
    name = workshop.yaml(**JOB, **scaled(2.0**16, 2, 4))
    arguments = ["--config", name, "--run_mode", "train"]
    assert run_job([*arguments, "--runner_config.stop_step", "10"], workshop.folder).code == 0
    for sense, stop, expected in (("128.0", "12", 128.0), ("null", "14", 2.0**16)):
        more = ["--resume_training", "True", "--runner_config.stop_step", stop,
                "--runner_wrapper.scale_sense", sense]  # fmt: skip
        result = run_job([*arguments, *more], workshop.folder)
        assert result.code == 0, result.stderr
        assert [row["loss_scale"] for row in workshop.rows()][-2:] == [expected] * 2
        assert "warning: loss_scaling was " in result.stdout + result.stderr


def test_the_loss_line_and_the_finite_check_show_overflows(workshop: Workshop) -> None:
    arguments = ["--config", workshop.yaml(**JOB, **scaled(2.0**32, 256)), "--run_mode", "train",
                 "--max_steps", "4"]  # fmt: skip
    moving = run_job(arguments, workshop.folder)
    assert moving.code == 0, moving.stderr
    assert "overflow cond: True, loss_scale: 4294967296.0, global_norm: [" in moving.stdout
    assert "overflow cond: False, loss_scale: 65536.0, global_norm: [" in moving.stdout
    arguments[1] = workshop.yaml(**JOB, **fixed(2.0**32))
    stopped = run_job([*arguments, "--output_dir", "other"], workshop.folder)
    assert stopped.code == 2
    assert "step 1: loss" in stopped.stderr, "a fixed scale never fits again"


def record(scale: float | None, overflow: bool | None, norm: float = math.inf) -> StepRecord:
    return StepRecord(step=3, epoch=1, step_in_epoch=3, loss=2.0, lr=0.1, grad_norm=norm, tokens=9,
                      tokens_per_second=9.0, consumed_samples=24, seconds=1.0, loss_scale=scale,
                      overflow=overflow)  # fmt: skip


@pytest.mark.parametrize(
    ("scaling", "row", "warns"),
    [
        (LossScaling(first=8.0, factor=2.0, window=9), record(8.0, True), False),
        (LossScaling(first=8.0, factor=2.0, window=9), record(1.0, True), True),
        (LossScaling(first=8.0), record(8.0, True), True),
        (None, record(None, None), True),
        (None, record(None, None, norm=1.0), False),
    ],
)
def test_steps_that_search_for_a_scale_are_not_reported(
    scaling: LossScaling | None, row: StepRecord, warns: bool
) -> None:
    logged: list[str] = []
    loader = SimpleNamespace(global_batch=8)
    state = TrainState(global_step=3, data_position=24)
    run = cast("TrainRun", SimpleNamespace(
        settings=SimpleNamespace(scaling=scaling), log=logged.append, loader=loader,
        state=state))  # fmt: skip
    FiniteCheck(stop=False).on_steps_end(run, [row])
    assert bool(logged) is warns


def test_a_run_without_a_scale_logs_one() -> None:
    run = cast("TrainRun", SimpleNamespace(
        total_steps=9, steps_per_epoch=9, loader=SimpleNamespace(global_batch=8),
        world=SimpleNamespace(size=1)))  # fmt: skip
    row = record(None, None, norm=1.0)
    assert "overflow cond: False, loss_scale: 1.0, global_norm: [1.000000]" in loss_line(run, row)
    assert not {"loss_scale", "overflow"} & row.as_row().keys()
