"""Rules about the model: its own configuration, and how it fits data and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.checks.found import files_of
from launcher.config.derived import (
    read_config_json,
    read_json_object,
    tokenizer_dir,
    written_datasets,
)
from launcher.config.provenance import KeyProblem
from launcher.errors import UserError
from launcher.weights.formats.placeholders import placeholder
from models.families import ModelSpec, model_spec, needs_weights, supports_packing
from models.positions import PositionLimit, position_limit

_LARGEST_TOKENIZER_BYTES = 4 * 2**20
"""A larger tokenizer.json is not read here: the configuration is checked in a blink."""


def model(check: Check) -> Iterator[KeyProblem]:
    """The model can be built, and the rows of the data fit it."""
    if not check.mode:
        return
    config = check.config
    section = config.model.model_config
    try:
        config_json = read_config_json(config)
        if config_json is None and not {"type", "model_type"} & set(section):
            yield _undescribed(check)
            return
        spec = model_spec(section, config_json)
    except UserError as error:
        for problem in error.problems:
            yield _placed(check, problem)
        return
    yield from _row_length(check, spec)
    yield from _packing(check, spec)
    yield from _first_values(check, spec)
    yield from _vocabulary(check, spec)


def _undescribed(check: Check) -> KeyProblem:
    folder = check.config.pretrained_model_dir
    if check.config.model.model_config:
        key, what = "model.model_config", "model.model_config has no `type`"
    elif folder:
        key, what = "pretrained_model_dir", f"{folder} contains no config.json"
    else:
        key, what = "model.model_config", "no model is given"
    return check.wrong(
        key,
        "a model needs config.json in pretrained_model_dir, or model.model_config.type",
        what=what,
        advice="Set pretrained_model_dir, or model.model_config.type (for example Qwen3Config)",
        also=(
            *("pretrained_model_dir", "model", "model.model_config"),
            "model.model_config.architectures",
        ),
    )


def _placed(check: Check, problem: Any) -> KeyProblem:
    """A problem of the model room, with the line of the key it is about."""
    name = getattr(problem, "key", "")
    key = f"model.model_config.{name}" if name else "pretrained_model_dir"
    where = problem.where or check.provenance.nearest(key)
    if not name and not problem.where and check.config.pretrained_model_dir:
        where = str(Path(check.config.pretrained_model_dir) / "config.json")
    return KeyProblem(
        what=problem.what,
        where=where,
        rule=problem.rule,
        nearest=problem.nearest,
        advice=problem.advice,
        key=key,
        also=("model", "model.model_config"),
    )


def _row_length(check: Check, spec: ModelSpec) -> Iterator[KeyProblem]:
    written = check.config.model.model_config.get("seq_length")
    limit = position_limit(spec.family, spec.hf_config)
    longest = limit.longest_row if limit is not None else None
    for name, section in written_datasets(check.config).items():
        key, length = f"{name}.seq_length", section.seq_length
        if length is None:
            continue
        if written is not None and length != written:
            yield check.wrong(
                key,
                f"differs from model.model_config.seq_length = {written} "
                f"({check.provenance.nearest('model.model_config.seq_length')})",
                advice="Remove one of the two",
                also=("model.model_config.seq_length",),
            )
        elif limit is not None and longest is not None and length > longest:
            yield _too_long(check, key, limit)
    if limit is not None and longest is not None and isinstance(written, int) and written > longest:
        yield _too_long(check, "model.model_config.seq_length", limit)


def _too_long(check: Check, key: str, limit: PositionLimit) -> KeyProblem:
    return check.wrong(
        key,
        f"the model supports at most {limit.longest_row} positions ({limit})",
        nearest=f"Nearest: {limit.longest_row}",
        also=(f"model.model_config.{limit.key}",),
    )


def _packing(check: Check, spec: ModelSpec) -> Iterator[KeyProblem]:
    if supports_packing(spec):
        return
    for name, section in written_datasets(check.config).items():
        rule = f"packing for {spec.family} models is not built yet"
        if section.packing:
            yield check.wrong(f"{name}.packing", rule, advice="Set it to False")
        for key, loader in section.loaders.items():
            if loader.eod_token_id is not None:
                yield check.wrong(f"{name}.{key}.eod_token_id", rule, advice="Remove it")


def _first_values(check: Check, spec: ModelSpec) -> Iterator[KeyProblem]:
    """A model that cannot begin with random values has weights."""
    if check.config.only_save_strategy or not needs_weights(spec):
        return
    has_weights = bool(check.config.load_checkpoint) or files_of(check) is not None
    if has_weights and check.config.strict_load:
        return
    key = "strict_load" if has_weights else "pretrained_model_dir"
    advice = "Remove it" if has_weights else "Set it or load_checkpoint to weights"
    yield check.wrong(
        key,
        f"random initialization of {spec.family} models is not built yet",
        what="" if has_weights else f"a {spec.family} model without weights",
        advice=advice,
        also=("load_checkpoint", "model", "model.model_config"),
    )


def _vocabulary(check: Check, spec: ModelSpec) -> Iterator[KeyProblem]:
    """Every token of the tokenizer has a row in the embedding."""
    folder, rows = tokenizer_dir(check.config), spec.hf_config.get("vocab_size")
    path = Path(folder) / "tokenizer.json"
    if not folder or not isinstance(rows, int) or not path.is_file():
        return
    if path.stat().st_size > _LARGEST_TOKENIZER_BYTES or placeholder(path, is_text=True):
        return  # what is there in place of a tokenizer has a rule of its own
    try:
        tokens = _token_count(read_json_object(path))
    except UserError as error:
        yield _placed(check, error.problems[0])
        return
    if tokens > rows:
        key = "model.model_config.vocab_size"
        yield check.wrong(
            key,
            f"the tokenizer in {folder} has {tokens} tokens",
            what=f"{key} = {rows}",
            nearest=f"Nearest: {tokens}",
            advice="Use the tokenizer that belongs to the model, or a larger vocab_size",
        )


def _token_count(tokenizer: dict[str, Any]) -> int:
    body = tokenizer.get("model")
    vocabulary = body.get("vocab", {}) if isinstance(body, dict) else {}
    if isinstance(vocabulary, dict):
        ids = [index for index in vocabulary.values() if isinstance(index, int)]
    else:
        ids = list(range(len(vocabulary)))
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            ids.append(token["id"])
    return max(ids, default=-1) + 1
