"""Rules about training in FP8."""

from __future__ import annotations

import re
from collections.abc import Iterator

from launcher.config.checks.check import Check
from launcher.config.provenance import KeyProblem

RECIPE = "fp8_config.recipe"


def exactness(check: Check) -> Iterator[KeyProblem]:
    """A run in FP8 gives up exactness in words."""
    config = check.config
    if check.trains and config.fp8_config.recipe is not None and config.deterministic is not False:
        yield check.wrong(
            RECIPE,
            "not supported with exact determinism: operands of products are rounded to 8 bits",
            nearest="Nearest: deterministic: False",
            advice="Or leave fp8_config out",
            also=("deterministic",),
        )


def patterns(check: Check) -> Iterator[KeyProblem]:
    """Names of excluded layers are regular expressions."""
    for pattern in check.config.fp8_config.exclude:
        try:
            re.compile(pattern)
        except re.error as error:
            yield check.wrong(
                "fp8_config.exclude",
                f"not a valid regular expression: {error}",
                what=f"fp8_config.exclude: {pattern!r}",
            )


def warnings(check: Check) -> Iterator[str]:
    """Keys of FP8 without a recipe."""
    section = check.config.fp8_config
    for key in ("exclude", "emulate"):
        if getattr(section, key) and section.recipe is None and check.trains:
            where = check.provenance.where(f"fp8_config.{key}")
            yield f"{where}: fp8_config.{key}: no effect without fp8_config.recipe"
