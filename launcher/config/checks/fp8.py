"""Rules about training in FP8."""

from __future__ import annotations

import importlib.util
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
            f"not supported with deterministic: {config.deterministic}, as operands of products "
            "are rounded to 8 bits",
            nearest="Nearest: None",
            advice="Or set deterministic: False",
            also=("deterministic",),
        )


def installed(check: Check) -> Iterator[KeyProblem]:
    """torchao can be imported, in a run that is right otherwise."""
    is_on = check.trains and check.config.fp8_config.recipe is not None
    if not is_on or any(exactness(check)) or any(patterns(check)):
        return
    if importlib.util.find_spec("torchao") is None:
        yield check.wrong(
            RECIPE, "FP8 is computed by torchao, which is not installed",
            advice="Install it: pip install 'slipway[fp8]'",
        )  # fmt: skip


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
