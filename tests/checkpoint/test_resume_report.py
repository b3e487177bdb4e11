"""The resume report: its line for every kind of change, and when it promises bitwise equality."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.builders.resume_report import KEYS_SHOWN, InferredState, ResumeDetails, resume_report
from launcher.layout.mesh import Mesh
from launcher.train.state import TrainState

FACTS: dict[str, Any] = {
    "seed": 7,
    "global_batch_size": 8,
    "data": {"fingerprint": "ab12"},
    "schedule": "CosineWithWarmUpLR",
    "loss_scaling": None,
    "configuration": {"seed": 7, "lr_schedule.learning_rate": 0.01, "trackers": ["wandb"]},
    "versions": {"slipway": "0.1.0", "torch": "2.11.0", "device": "CPU (AVX2, 1 thread)"},
}
STATE = TrainState(
    global_step=10, updates=10, consumed_samples=80, data_position=80, consumed_tokens=2560
)
MESH = Mesh(pp=2, dp_shard=2, tp=2)
UNCHANGED = ResumeDetails(
    name="CKP-1_10", folder="output/checkpoint",
    saved={"consumed_samples": 80, "consumed_tokens": 2560, **FACTS},
    saved_ranks=8, saved_mesh=MESH.sizes(),
    state=STATE, metadata=FACTS, mesh=MESH, total_steps=20, data_position_is_set=False,
)  # fmt: skip


def with_facts(**changes: Any) -> ResumeDetails:
    return replace(UNCHANGED, metadata={**FACTS, **changes})


def with_configuration(**changes: Any) -> ResumeDetails:
    return with_facts(configuration={**FACTS["configuration"], **changes})


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in UNCHANGED.saved.items() if key not in keys}


def changes(resumption: ResumeDetails) -> list[str]:
    """The lines below `changed since:`, each with one space between label and text."""
    lines = resume_report(resumption)
    assert lines[3] == "changed since:"
    return [" ".join(line.split()) for line in lines[4:]]


def restored(resumption: ResumeDetails) -> set[str]:
    (line,) = (line for line in resume_report(resumption) if line.startswith("  restored"))
    return set(line.removeprefix("  restored").strip().split(", "))


def test_an_unchanged_run() -> None:
    assert resume_report(UNCHANGED) == [
        "resumed: CKP-1_10 of output/checkpoint, step 10 of 20",
        "  saved by       8 ranks (pp 2 x dp_shard 2 x tp 2) after 80 samples, 2560 tokens",
        "  restored       weights, optimizer state, schedule, data position, random numbers",
        "nothing changed: the run continues bit for bit",
    ]


ONE_CHANGE: dict[str, tuple[ResumeDetails, list[str]]] = {
    "ranks and axes": (
        replace(UNCHANGED, mesh=Mesh(tp=4)),
        ["layout 8 ranks (pp 2 x dp_shard 2 x tp 2) -> 4 ranks (tp 4)"],
    ),
    "axes of as many ranks": (
        replace(UNCHANGED, mesh=Mesh(dp_replicate=8)),
        ["layout 8 ranks (pp 2 x dp_shard 2 x tp 2) -> 8 ranks (dp_replicate 8)"],
    ),
    "ranks of a save that does not say its axes": (
        replace(UNCHANGED, saved_mesh={}, mesh=Mesh()),
        ["layout 8 ranks -> 1 rank (not cut)"],
    ),
    "a value": (
        with_configuration(seed=8),
        ["configuration seed: 7 -> 8"],
    ),
    "a key that is new": (
        with_configuration(stop_step=5),
        ["configuration stop_step: left out -> 5"],
    ),
    "a key that is gone": (
        with_facts(configuration={"seed": 7, "trackers": ["wandb"]}),
        ["configuration lr_schedule.learning_rate: 0.01 -> left out"],
    ),
    "an empty text": (
        with_configuration(load="", trackers=[]),
        ["configuration trackers: ['wandb'] -> []", "load: left out -> ''"],
    ),
    "long values that differ at the end": (
        with_configuration(trackers="/data/" + "deep/" * 20 + "b"),
        ["configuration trackers: ['wandb'] -> /data/deep/de...p/deep/deep/b"],
    ),
    "software": (
        with_facts(versions={**FACTS["versions"], "torch": "2.12.0", "slipway": "0.2.0"}),
        ["versions slipway: 0.1.0 -> 0.2.0, torch: 2.11.0 -> 2.12.0"],
    ),
    "the global batch": (
        replace(with_facts(global_batch_size=4), state=replace(STATE, global_step=20)),
        ["samples global batch was 8, is 4: resuming after 80 samples, as step 20"],
    ),
    "a place in the data that was asked for": (
        replace(UNCHANGED, state=replace(STATE, data_position=16), data_position_is_set=True),
        ["data beginning at sample 16, as configured"],
    ),
    "other data": (
        replace(
            with_facts(data={"fingerprint": "cd34"}),
            state=replace(STATE, data_position=0), data_position_is_set=True,
        ),
        ["data other data, beginning at sample 0, as configured"],
    ),
    "a save from before configurations were kept": (
        replace(UNCHANGED, saved=without("configuration", "versions")),
        ["configuration not compared: the save was written by an older version"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_CHANGE)
def test_a_change_is_named_with_what_it_was_and_is(case: str) -> None:
    resumption, expected = ONE_CHANGE[case]
    assert changes(resumption) == expected


@pytest.mark.parametrize("more", [0, 1, 30])
def test_it_fits_on_a_screen(more: int) -> None:
    keys = {f"model.model_config.key_{number}": number for number in range(KEYS_SHOWN + more)}
    resumption = replace(
        with_configuration(**keys),
        metadata={
            **with_configuration(**keys).metadata,
            "versions": dict.fromkeys(FACTS["versions"], "9"), "global_batch_size": 4,
        },
        mesh=Mesh(), data_position_is_set=True,
    )  # fmt: skip
    lines = resume_report(resumption)
    assert len(lines) <= 20
    assert sum("key_" in line for line in lines) == KEYS_SHOWN
    assert any(line.strip() == f"... and {more} more" for line in lines) == (more > 0)


@pytest.mark.parametrize(
    ("resumption", "missing"),
    [
        (with_facts(seed=8), "random numbers"),
        (with_facts(schedule="LinearWithWarmUpLR"), "schedule"),
        (replace(UNCHANGED, data_position_is_set=True), "data position"),
    ],
)
def test_what_starts_again_is_not_called_restored(resumption: ResumeDetails, missing: str) -> None:
    assert missing in restored(UNCHANGED)
    assert restored(resumption) == restored(UNCHANGED) - {missing}


@pytest.mark.parametrize(
    ("before", "now", "is_restored"),
    [("dynamic", "dynamic", True), ("dynamic", "fixed", False), ("fixed", "fixed", False)],
)
def test_a_loss_scale_is_restored_where_it_moves(before: str, now: str, is_restored: bool) -> None:
    resumption = replace(
        with_facts(loss_scaling=now),
        saved={**UNCHANGED.saved, "loss_scaling": before},
        state=replace(STATE, loss_scale=65536.0),
    )
    assert ("loss scale 65536" in restored(resumption)) == is_restored


def test_another_model_is_reported() -> None:
    before = {"rope_theta": 10000.0, "num_hidden_layers": 2, "rms_norm_eps": 1e-6}
    saved = {**UNCHANGED.saved, "model": before}
    same = replace(with_facts(model=dict(before)), saved=saved)
    assert resume_report(same)[-1] == "nothing changed: the run continues bit for bit"
    edited = replace(with_facts(model={**before, "rope_theta": 500000.0}), saved=saved)
    assert resume_report(edited)[-1] == "  model          rope_theta: 10000.0 -> 500000.0"
    key = "model.model_config.rms_norm_eps"
    written = replace(
        with_facts(
            model={**before, "rms_norm_eps": 1e-5},
            configuration={**FACTS["configuration"], key: 1e-5},
        ),
        saved=saved,
    )
    assert [line for line in resume_report(written) if "rms_norm_eps" in line] == [
        f"  configuration  {key}: left out -> 1e-05"
    ]


FOREIGN = InferredState(
    saved={"global_step": 10, "consumed_samples": 80, **FACTS},
    saved_by="8 ranks", steps_from="step_num in the files", has_batch=False, has_scale=False,
    unused=(),
)  # fmt: skip


def test_a_save_without_a_state_is_not_promised_bitwise() -> None:
    resumption = replace(UNCHANGED, saved=FOREIGN.saved, saved_mesh={}, derived=FOREIGN)
    assert resume_report(resumption) == [
        "resumed: CKP-1_10 of output/checkpoint, step 10 of 20",
        "  saved by       8 ranks after 10 steps (step_num in the files), without a state file",
        "  restored       weights, optimizer state, step",
        "  assumed        80 samples trained on, a global batch of 8 (that of this run), in the "
        "order of this run",
        "  not known      data, configuration and versions of the run that saved",
    ]


def test_a_save_without_a_state_lists_what_is_restored() -> None:
    derived = replace(
        FOREIGN, saved={**FOREIGN.saved, "global_batch_size": 4}, has_batch=True, has_scale=True,
        unused=("beta1_power", "learning_rate"),
    )  # fmt: skip
    state = replace(STATE, global_step=5, updates=9, loss_scale=512.0)
    resumption = replace(UNCHANGED, saved=derived.saved, saved_mesh={}, derived=derived,
                         state=state, saved_ranks=4)  # fmt: skip
    assert resume_report(resumption)[2:] == [
        "  restored       weights, optimizer state, step, 9 updates of the optimizer (global_step "
        "in the files), loss scale 512",
        "  assumed        80 samples trained on, a global batch of 4 (from the files), in the "
        "order of this run",
        "  not known      data, configuration and versions of the run that saved",
        "  not used       beta1_power, learning_rate",
        "changed since:",
        "  layout         4 ranks -> 8 ranks (pp 2 x dp_shard 2 x tp 2)",
        "  samples        global batch was 4, is 8: resuming after 80 samples, as step 5",
    ]
