"""Configurations in MindFormers' style, and what they resolve to."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from launcher.config.derived import read_config_json
from launcher.config.nodes import from_plain
from launcher.config.resolve import Resolved, read_tree
from models.families import ModelSpec, model_spec

GOLDEN = Path(__file__).parent / "fixtures" / "golden_configs.json"


@cache
def golden(name: str) -> dict[str, Any]:
    """config.json of a golden directory of MindFormers' weights."""
    found: dict[str, Any] = json.loads(GOLDEN.read_text())[name]
    return found


def resolved(text: str | dict[str, Any]) -> Resolved:
    """The configuration of a YAML text."""
    content = yaml.safe_load(text) if isinstance(text, str) else text
    return read_tree(from_plain(content, "x.yaml:1"))


def legacy(
    keys: str, *, arch: str = "LlamaForCausalLM", moe: str = "", mode: str = "predict"
) -> str:
    """A configuration of the older style: model_config with `keys`, arch, and moe_config."""
    section = f"moe_config: {{{moe}}}\n" if moe else ""
    return (
        f"run_mode: {mode}\n{section}model: {{model_config: {{{keys}}}, arch: {{type: {arch}}}}}\n"
    )


def core(keys: str, *, mode: str = "train", more: str = "") -> str:
    """A configuration of the newer style."""
    return f"run_mode: {mode}\nuse_legacy: False\n{more}model: {{model_config: {{{keys}}}}}\n"


def spec_of(text: str) -> ModelSpec:
    """The model of a YAML text without problems of its keys."""
    found = resolved(text)
    assert [str(problem) for problem in found.problems] == []
    return model_spec(found.config.model.model_config, read_config_json(found.config))


def problems_of(text: str) -> list[str]:
    """The problems of single keys."""
    return [str(problem) for problem in resolved(text).problems]


def written(text: str) -> dict[str, Any]:
    """model_config after the translation."""
    return resolved(text).config.model.model_config
