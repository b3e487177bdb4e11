"""docs/models.md, written from the tables of model types: `python -m launcher.tools.model_docs`.

Owns the form of that page. Its content comes from `models.families` and
`models.module_table`, which tests compare with transformers.
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

from models.families.table import DECODERS
from models.module_table import (
    CAUSAL_WHEN,
    LEARNED_POSITIONS,
    NO_PACKING,
    NOT_CAUSAL_WHEN,
    TRANSFORMERS_MODULES,
    UNSUPPORTED,
    WEIGHTS_NEEDED,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"

_INTRODUCTION = """\
# Models

Written by `python -m launcher.tools.model_docs` from the tables in `models/families/` and
`models/module_table.py`; do not edit it by hand.

A model is named by `model_type` in the config.json of `pretrained_model_dir`, or by
`model.model_config.type`: that model type or the name of its configuration class (`Qwen3Config`).
Every causal model type of `transformers` is in one of the tables below. A test makes a tiny model
of each, and compares logits, loss, gradients and generated tokens with those of `transformers`.

Keys of `model.model_config` are those of the family's configuration class, by any of its names for
them, and the spellings of MindFormers. A key that the class does not have is refused there; in
config.json it is ignored, as by `transformers`, and listed once for a family with a decoder of
Slipway.
"""

_DECODERS = """\
## With a decoder of Slipway

These run in one decoder, which supports every axis of [layouts.md](layouts.md).

| Model type | Configuration class |
|---|---|
"""

_MODULES = """\
## Through their transformers module

These support `data_parallel`, replicated or sharded.

- **Packing**: whether documents packed into one row are kept apart; otherwise `packing: False`.
- **Random start**: whether training may begin without weights. Elsewhere the initialization of
  some parameters in transformers is not built yet, so weights are needed.
- **Rows**: *learned* means a table of positions, which a row cannot be longer than. Other rows end
  at the number of positions in config.json, times the factor of its rope scaling.
- **Needs**: what config.json or `model.model_config` must set for the model to be causal.

| Model type | Packing | Random start | Rows | Needs |
|---|---|---|---|---|
"""

_REFUSED = """\
## Refused

| Needs, and not built yet | Model types |
|---|---|
"""

_NOT_CAUSAL = """\
Refused for any model type, as a token would attend to those that it is trained to predict:

"""

_OTHERS = """\
## Model types that are in no table

A causal model type that a newer `transformers` adds runs through its module too, from weights and
without packing. Mixtures of experts and multimodal models among them are refused. The first forward
pass checks whether the model is causal, and ends the run where it is not.
"""


def render() -> str:
    """The text of the page."""
    decoders = [f"| `{name}` | {own.config_class} |" for name, own in DECODERS.items()]
    modules = [_module_row(name) for name in sorted(TRANSFORMERS_MODULES)]
    not_causal = [
        f"- `{key}: {value}`" for key, values in NOT_CAUSAL_WHEN.items() for value in values
    ]
    parts = (
        _INTRODUCTION,
        _DECODERS + "\n".join(decoders) + "\n",
        _MODULES + "\n".join(modules) + "\n",
        _REFUSED + "\n".join(_refused_rows()) + "\n",
        _NOT_CAUSAL + "\n".join(not_causal) + "\n",
        _OTHERS,
    )
    return "\n".join(parts)


def _module_row(name: str) -> str:
    cells = (
        f"`{name}`",
        "no" if name in NO_PACKING else "yes",
        "no" if name in WEIGHTS_NEEDED else "yes",
        "learned" if name in LEARNED_POSITIONS else "",
        "`{}: {}`".format(*CAUSAL_WHEN[name]) if name in CAUSAL_WHEN else "",
    )
    return f"| {' | '.join(cells)} |"


def _refused_rows() -> list[str]:
    by_reason = sorted(UNSUPPORTED, key=lambda name: (UNSUPPORTED[name], name))
    return [
        f"| {reason} | {', '.join(f'`{name}`' for name in names)} |"
        for reason, names in groupby(by_reason, key=UNSUPPORTED.__getitem__)
    ]


def main() -> int:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(PAGE.read_text(encoding='utf-8').splitlines())} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
