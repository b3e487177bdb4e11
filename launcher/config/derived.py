"""Facts that follow from a configuration: sizes, directories, where config.json is.

Owns the few formulas that the rules and the program must agree on. Pure but for reading the
environment and one JSON file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from launcher.config.schema import Config
from launcher.errors import UserError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    "spiece.model",
)


def world_size() -> int:
    """Processes of this run: torchrun's WORLD_SIZE, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def degrees(config: Config) -> dict[str, int]:
    """The degree of every axis whose product is the number of processes."""
    parallel = config.parallel_config
    return {
        "data_parallel": parallel.data_parallel,
        "model_parallel": parallel.model_parallel,
        "pipeline_stage": parallel.pipeline_stage,
        "context_parallel": parallel.context_parallel,
    }


def global_batch_size(config: Config) -> int:
    """Samples of one optimizer step over all ranks."""
    runner, parallel = config.runner_config, config.parallel_config
    micro_steps = (
        parallel.micro_batch_num
        if parallel.pipeline_stage > 1
        else runner.gradient_accumulation_steps
    )
    interleave = config.micro_batch_interleave_num
    return runner.batch_size * parallel.data_parallel * micro_steps * interleave


def tokenizer_dir(config: Config) -> str:
    """The tokenizer's directory; empty when none is named."""
    return config.processor.tokenizer.pretrained_model_dir or config.pretrained_model_dir


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a directory holds a tokenizer, from its file names."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def has_safetensors(folder: str | Path) -> bool:
    """Whether a directory holds complete weights, from its file names."""
    return any(Path(folder).glob("*.safetensors"))


def read_config_json(config: Config) -> dict[str, Any] | None:
    """The content of pretrained_model_dir/config.json, None when there is none.

    Raises UserError when it is not a JSON object.
    """
    if not config.pretrained_model_dir:
        return None
    path = Path(config.pretrained_model_dir) / "config.json"
    if not path.is_file():
        return None
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises UserError when it is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"this is not valid JSON: {error.msg}",
            where=f"{path}:{error.lineno}",
            advice="Mend the file or copy it again",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("this is not a JSON object", where=str(path))
    return content
