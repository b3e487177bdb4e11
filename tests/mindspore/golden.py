"""Files MindSpore 2.10.0 wrote: a few beside this module, all of them where a checkout has them.

`layouts.json` is their content as MindSpore's own protobuf classes read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.mindspore.strategy import Operator, Strategy
from launcher.mindspore.tensor_layout import TensorLayout

HERE = Path(__file__).parent / "fixtures"
ALL = Path(__file__).parents[3] / "shared" / "fixtures" / "mindspore"
needs_all = pytest.mark.skipif(not ALL.is_dir(), reason="MindSpore's golden tree is not here")


def strategy_files() -> list[Path]:
    """Every strategy file of one stage."""
    folder = ALL / "strategies" if ALL.is_dir() else HERE
    return sorted(folder.glob("*/*.ckpt"))


def expected(file: Path) -> Strategy:
    """What MindSpore reads in `file`, by name instead of in file order."""
    known: dict[str, Any] = json.loads((file.parents[1] / "layouts.json").read_text())
    content = known[f"{file.parent.name}/{file.name}"]
    content = known[content] if isinstance(content, str) else content
    operators = [
        Operator(name, item["stage"], tuple(map(tuple, item["strategy"])))
        for name, item in sorted(content["operators"].items())
    ]
    layouts = [(name, _layout(item)) for name, item in sorted(content["params"].items())]
    return Strategy(tuple(operators), tuple(layouts), content["current_stage"])


def _layout(item: dict[str, Any]) -> TensorLayout:
    (grid,) = item["dev_matrix"]
    return TensorLayout(
        tuple(grid),
        tuple(map(tuple, item["tensor_map"])),
        item["opt_weight_shard_step"],
        item["opt_weight_shard_size"],
    )


def by_name(strategy: Strategy) -> Strategy:
    """`strategy` with its items sorted: their order in a file is arbitrary."""
    return Strategy(
        tuple(sorted(strategy.operators, key=lambda operator: operator.name)),
        tuple(sorted(strategy.layouts, key=lambda item: item[0])),
        strategy.current_stage,
    )
