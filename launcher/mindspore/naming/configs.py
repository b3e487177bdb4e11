"""The model that a YAML file describes, for tools that map names by its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.config.derived import read_config_json
from launcher.config.resolve import resolve
from launcher.errors import Problem, UserError
from launcher.weights.foreign_names import KEYS
from models.families import model_spec


def config_of_yaml(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(content of the config.json of the model, keys about orders of rows) of a YAML file.

    Raises `UserError` for a file that cannot be read or whose model is not known.
    """
    resolved = resolve(str(path))
    if problems := [problem for problem in resolved.problems if _is_of_model(problem)]:
        raise UserError(problems)
    config = resolved.config
    spec = model_spec(config.model.model_config, read_config_json(config))
    return dict(spec.hf_config), {key: getattr(config, key) for key in KEYS}


def _is_of_model(problem: Problem) -> bool:
    key: str = getattr(problem, "key", "")
    return not key or key.startswith(("model", "mindformers", "pretrained"))
