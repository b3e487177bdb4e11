"""EarlyStopping as a function of the values it sees, and its state in a state file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest

from launcher.config.schema import EarlyStoppingSection
from launcher.errors import UserError
from launcher.train.state import TrainState, from_json, to_json
from launcher.train.stopping import StoppingState

LOWER = EarlyStoppingSection(patience=2)
HIGHER = EarlyStoppingSection(patience=2, metric="eval_rewards/accuracies")
BY_A_TENTH = EarlyStoppingSection(patience=2, min_delta=0.1)


@pytest.mark.parametrize(
    ("section", "values", "ends_after", "best"),
    [
        (LOWER, [3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.0], 6, 1.9),
        (LOWER, [3.0, 2.0, 1.0], None, 1.0),
        (LOWER, [3.0, 3.0, 3.0], 3, 3.0),
        (HIGHER, [0.1, 0.5, 0.4, 0.3], 4, 0.5),
        (BY_A_TENTH, [3.0, 2.95, 2.91, 1.0], 3, 3.0),
        (BY_A_TENTH, [3.0, 2.95, 2.89, 2.88, 2.87], 5, 2.89),
        (LOWER, [math.nan, math.inf], 2, None),
        (LOWER, [None, 2.0, math.nan, 1.0], None, 1.0),
    ],
)
def test_a_run_ends_after_patience_evaluations_without_improvement(
    section: EarlyStoppingSection, values: list[float | None], ends_after: int | None, best: float
) -> None:
    state, ended = StoppingState(), None
    for step, value in enumerate(values, 1):
        state = state.after(section, step, value)
        if state.is_due(section):
            ended = step
            break
    assert ended == ends_after
    assert state.best == best


def test_the_state_survives_a_state_file_and_patience_may_change() -> None:
    state = StoppingState("eval_loss", 2.0, 10, 2)
    content = json.loads(json.dumps(to_json(TrainState(stopping=state), {})))
    assert from_json(content, "here").stopping == state
    assert state.is_due(LOWER)
    assert not state.is_due(EarlyStoppingSection(patience=3))
    assert not state.is_due(EarlyStoppingSection(patience=2, metric="eval_perplexity"))


def test_another_metric_begins_anew() -> None:
    section = EarlyStoppingSection(metric="eval_loss/code")
    after = StoppingState("eval_loss", 1.0, 10, 2).after(section, 12, 5.0)
    assert after == StoppingState("eval_loss/code", 5.0, 12, 0)


def test_a_run_without_it_writes_no_state_and_older_files_have_none() -> None:
    content = to_json(TrainState(global_step=3), {})
    assert "stopping" not in content
    assert from_json(content, "here") == TrainState(global_step=3)


@pytest.mark.parametrize(
    "wrong", [[], {"metric": "x"}, {**asdict(StoppingState("x")), "without": "2"},
              {**asdict(StoppingState("x")), "best": True}]
)  # fmt: skip
def test_a_damaged_state_is_named(wrong: object) -> None:
    content = {**to_json(TrainState(), {}), "stopping": wrong}
    with pytest.raises(UserError, match=r"state\.json: stopping = "):
        from_json(content, "state.json")
