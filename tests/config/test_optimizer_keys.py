"""Keys of `optimizer`: each type takes its own, with numbers that it can use."""

from __future__ import annotations

import pytest

from launcher.config.schema import OPTIMIZER_ARGUMENTS
from tests.config.test_rules import found

VALUES = {"betas": "[0.9,0.96]", "adamw_betas": "[0.9,0.96]", "ns_coefficients": "[3,-4,2]",
          "nesterov": "True", "dampening": 0, "ns_steps": 3}  # fmt: skip
NAMES = sorted({name for names in OPTIMIZER_ARGUMENTS.values() for name in names})


def words(kind: str, *names: str) -> list[str]:
    keys = [f"{name}={VALUES.get(name, 0.5)}" for name in names]
    return [f"optimizer.{word}" for word in (f"type={kind}", "weight_decay=0.1", *keys)]


@pytest.mark.parametrize("kind", OPTIMIZER_ARGUMENTS)
def test_every_optimizer_takes_its_arguments_and_no_others(workspace, kind: str) -> None:
    taken = OPTIMIZER_ARGUMENTS[kind]
    assert found("", "~optimizer.betas", *words(kind, *taken)) == []
    for name in NAMES:
        if name not in taken:
            value = 0.4 if name == "dampening" else VALUES.get(name, 0.5)
            given = [*words(kind), f"optimizer.{name}={value}"]
            (text,) = found("", "~optimizer.betas", *given)
            assert f"optimizer.{name} = " in text
            assert f": not an argument of {kind}. It belongs to " in text
            assert text.endswith(
                f"{kind} takes weight_decay, learning_rate, state_dtype, {', '.join(taken)}."
            )


WRONG = {
    "one beta": ([*words("Adam", "eps"), "optimizer.betas=[0.9]"], "optimizer.betas = [0.9]"),
    "a beta of 1": ([*words("Muon"), "optimizer.adamw_betas=[0.9,1]"], "optimizer.adamw_betas"),
    "a momentum of 1": ([*words("SGD"), "optimizer.momentum=1"], "optimizer.momentum = 1.0"),
    "no momentum to look ahead": (words("SGD", "nesterov"), "optimizer.nesterov = True"),
    "damped": ([*words("SGD", "nesterov", "momentum"), "optimizer.dampening=0.5"],
               "Nearest: momentum: 0.9, dampening: 0"),
    "two coefficients": ([*words("Muon"), "optimizer.ns_coefficients=[3,2]"], "three numbers"),
    "a type of another name": (words("adamw"), "`AdamW`"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_no_optimizer_can_use(workspace, name: str) -> None:
    given, part = WRONG[name]
    (text,) = found("", "~optimizer.betas", *given)
    assert part in text
