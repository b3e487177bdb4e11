"""The files beside exported weights of a job: config.json, tokenizer, chat template, and so on.

Owns what the configuration changes in them: `generation_config` of the YAML is written over
generation_config.json, and the chat template that the job uses becomes the one of the tokenizer. A
directory that is exported then renders and generates as the run did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.config.chat_template import trains_on_conversations
from launcher.config.derived import named_tokenizer_files, uses_named_tokenizer
from launcher.config.flat import flat
from launcher.data.chat_rendering import ChatRenderer, ChatSettings
from launcher.data.conversations import Conversation
from launcher.data.named_tokenizer import files_of_tokenizer
from launcher.weights.formats.tokenizer_files import TOKENIZER_FILES
from models.build import hf_directory_files

if TYPE_CHECKING:
    import torch

    from launcher.builders.job import Job

OTHER_FILES = ("config.json", "generation_config.json")
"""Files of a model beside its weights that are not of its tokenizer."""
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
_OF_SLIPWAY = ("seed", "cuda_graphs")
"""Keys of `generation_config` that transformers does not have."""


def model_files(job: Job, dtype: torch.dtype | str | None) -> dict[str, bytes]:
    """The files next to exported weights of `dtype`, by name."""
    found = _generation(job, _as_they_are(job, dtype))
    return _template(job, found) if any(name in found for name in TOKENIZER_FILES) else found


def _as_they_are(job: Job, dtype: torch.dtype | str | None) -> dict[str, bytes]:
    if not uses_named_tokenizer(job.config):
        folder = job.tokenizer_dir if Path(job.tokenizer_dir).is_dir() else ""
        return hf_directory_files(job.spec, folder or None, dtype=dtype)
    if not all(path.is_file() for path in named_tokenizer_files(job.config).values()):
        return hf_directory_files(job.spec, None, dtype=dtype)  # a training on tokens
    folder = job.config.pretrained_model_dir
    found = hf_directory_files(job.spec, folder or None, dtype=dtype)
    kept = {name: found[name] for name in OTHER_FILES if name in found}
    return kept | files_of_tokenizer(job.tokenizer)


def _generation(job: Job, found: dict[str, bytes]) -> dict[str, bytes]:
    """With the keys of `generation_config` that the configuration sets."""
    section = job.config.generation_config
    written = {
        key.name: value
        for key in fields(section)
        if key.name not in _OF_SLIPWAY
        and job.provenance.is_written(f"generation_config.{key.name}")
        and (value := getattr(section, key.name)) is not None
    }
    if not written:
        return found
    content = json.loads(found[GENERATION_FILE]) if GENERATION_FILE in found else {}
    return {**found, GENERATION_FILE: _json(content | written)}


def _template(job: Job, found: dict[str, bytes]) -> dict[str, bytes]:
    """With the chat template of the job, where it is not that of the tokenizer."""
    settings = job.chat
    if settings.is_raw or not (_sets_one(settings) or trains_on_conversations(flat(job.config))):
        return found
    renderer = ChatRenderer(job.tokenizer, settings)
    if not (_sets_one(settings) or renderer.templates.is_default):
        return found
    question = Conversation(where="", messages=[{"role": "user", "content": ""}])
    text = renderer.templates.of(question).text
    changed = {TEMPLATE_FILE: text.encode()}
    if TOKENIZER_CONFIG in found:
        config = json.loads(found[TOKENIZER_CONFIG])
        config.pop("chat_template", None)  # that of the file counts, but not every reader knows it
        changed[TOKENIZER_CONFIG] = _json(config)
    return {**found, **changed}


def _sets_one(settings: ChatSettings) -> bool:
    return settings.text is not None or settings.name is not None


def _json(content: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)}\n".encode()
