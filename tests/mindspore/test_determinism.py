"""MindFormers' switches of deterministic kernels, as the key `deterministic`."""

from __future__ import annotations

import pytest

from tests.mindspore.test_sections import read

ON: dict[str, str] = {
    "context": 'run_mode: train\ncontext: {deterministic: "ON"}\n',
    "context, as a boolean": "run_mode: train\ncontext: {deterministic: True, mode: 0}\n",
    "training": "run_mode: finetune\ntrain_precision_sync: True\n",
    "prediction": "run_mode: predict\ninfer_precision_sync: True\n",
    "evaluation": "run_mode: eval\ninfer_precision_sync: True\n",
    "eager style": "training: {deterministic: True, steps: 3}\n",
    "two that agree": "run_mode: train\ncontext: {deterministic: on}\ntrain_precision_sync: True\n",
}
AUTO: dict[str, str] = {
    "off": 'run_mode: train\ncontext: {deterministic: "OFF"}\ntrain_precision_sync: False\n',
    "null": "run_mode: train\ntrain_precision_sync: null\n",
    "of another mode": "run_mode: predict\ntrain_precision_sync: True\n",
    "of another mode too": "run_mode: train\ninfer_precision_sync: True\n",
    "eager style": "training: {deterministic: False, steps: 3}\n",
    "nothing": "run_mode: train\n",
}


@pytest.mark.parametrize("name", ON)
def test_on_is_deterministic(name: str) -> None:
    resolved = read(ON[name])
    assert not resolved.problems
    assert resolved.config.deterministic is True
    assert not any("deterministic" in key or "precision" in key for key in resolved.no_effect)


@pytest.mark.parametrize("name", AUTO)
def test_off_asks_for_nothing(name: str) -> None:
    resolved = read(AUTO[name])
    assert not resolved.problems
    assert resolved.config.deterministic == "auto"


@pytest.mark.parametrize("key", ["context: {deterministic: 3}", "train_precision_sync: maybe"])
def test_another_value_is_refused(key: str) -> None:
    [problem] = read(f"run_mode: train\n{key}\n").problems
    assert problem.what.split()[0] in ("context.deterministic", "train_precision_sync")
    assert problem.nearest == "Nearest: True"


def test_a_switch_and_the_key_that_contradict_are_a_problem() -> None:
    [problem] = read('deterministic: False\ncontext: {deterministic: "ON"}\n').problems
    assert problem.key == "deterministic"
