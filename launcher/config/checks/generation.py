"""Rules about how predict continues a prompt: the section, and the file beside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.derived import read_json_object, tokenizer_dir
from launcher.config.generation_file import (
    FILE_NAME,
    GenerationFile,
    check_generation,
    generation_path,
    list_problem,
)
from launcher.config.provenance import KeyProblem
from launcher.errors import Problem, UserError


def numbers(check: Check) -> Iterator[KeyProblem]:
    """Minimum lengths are at most the maximum lengths."""
    generation = check.config.generation_config
    if generation.max_new_tokens is None and generation.min_length > generation.max_length:
        yield check.wrong(
            "generation_config.min_length",
            f"must be at most max_length ({generation.max_length})",
            nearest=f"Nearest: {generation.max_length}",
            also=("generation_config.max_length",),
        )
    most, fewest = generation.max_new_tokens, generation.min_new_tokens
    if most is not None and fewest is not None and fewest > most:
        yield check.wrong(
            "generation_config.min_new_tokens",
            f"must be at most max_new_tokens ({most})",
            nearest=f"Nearest: {most}",
            also=("generation_config.max_new_tokens",),
        )


def generation_file(check: Check) -> Iterator[KeyProblem]:
    """Every key of generation_config.json is right and used."""
    if not check.predicts:
        return
    try:
        found = read_generation_file(check)
    except UserError as error:
        yield from map(_about_the_file, error.problems)
        return
    yield from map(_about_the_file, found.problems)


def lists(check: Check) -> Iterator[KeyProblem]:
    """The lists of the section have the right content."""
    section = check.config.generation_config
    for key in (field.name for field in fields(section)):
        if rule := list_problem(key, getattr(section, key)):
            yield check.wrong(f"generation_config.{key}", rule)


def model_tokens(check: Check) -> Iterator[KeyProblem]:
    """Tokens that get a score of their own are tokens of the model, as `transformers` requires."""
    if not check.predicts or check.spec is None:
        return
    size = check.spec.hf_config.get("vocab_size")
    for key, tokens_of in _SCORED_TOKENS.items():
        written = getattr(check.config.generation_config, key)
        value = written if written is not None else _in_file(check, key)
        if not isinstance(size, int) or value is None or list_problem(key, value):
            continue
        wrong = [token for token in tokens_of(value) if not 0 <= token < size]
        if wrong:
            yield check.wrong(
                f"generation_config.{key}",
                f"vocab_size of the model is {size}",
                what=f"{key} contains token {max(wrong, key=abs)}",
                advice="" if written else f"Correct {FILE_NAME}, or set generation_config.{key}",
            )


_SCORED_TOKENS: dict[str, Callable[[Any], list[int]]] = {
    "bad_words_ids": lambda words: [token for word in words for token in word],
    "sequence_bias": lambda pairs: [token for tokens, _ in pairs for token in tokens],
    "forced_bos_token_id": lambda token: [token],
    "forced_eos_token_id": lambda value: value if isinstance(value, list) else [value],
}
"""Key -> its tokens."""


def several_texts(check: Check) -> Iterator[KeyProblem]:
    """Several texts of a prompt are drawn: greedy ones would all be the same."""
    key, number = "num_return_sequences", _value(check, "num_return_sequences")
    if check.predicts and number > 1 and not _value(check, "do_sample"):
        yield check.wrong(
            f"generation_config.{key}",
            "greedy decoding has one text a prompt",
            what=f"generation_config.{key} = {number}",
            nearest="Nearest: 1",
            advice="Or set generation_config.do_sample: True",
            also=("generation_config.do_sample",),
        )


def _value(check: Check, key: str) -> Any:
    """The value that acts: of the section if written, else of model_config, else of the file."""
    if not check.provenance.is_written(f"generation_config.{key}"):
        in_model = check.spec.generation.get(key) if check.spec is not None else None
        for value in (in_model, _in_file(check, key)):
            if value is not None:
                return value
    return getattr(check.config.generation_config, key)


def _in_file(check: Check, key: str) -> Any:
    try:
        return read_generation_file(check).values.get(key)
    except UserError:
        return None  # reported by `generation_file`


def warnings(check: Check) -> list[str]:
    """Keys of the file that have no effect."""
    if not check.predicts:
        return []
    return read_generation_file(check).notes


def read_generation_file(check: Check) -> GenerationFile:
    """The file beside the model or the tokenizer, without the keys that the user set. Raises
    `UserError` when it cannot be read."""
    config = check.config
    path = generation_path(config.pretrained_model_dir, tokenizer_dir(config))
    if path is None:
        return GenerationFile()
    section, prefix = config.generation_config, "generation_config"
    names = [field.name for field in fields(section)]
    written = {name for name in names if check.provenance.is_written(f"{prefix}.{name}")}
    return check_generation(
        read_json_object(path), str(path), overridden=written,
        do_sample=section.do_sample if "do_sample" in written else None,
    )  # fmt: skip


def _about_the_file(problem: Problem) -> KeyProblem:
    return KeyProblem(
        what=problem.what, where=problem.where, rule=problem.rule, nearest=problem.nearest,
        advice=problem.advice, key="pretrained_model_dir",
    )  # fmt: skip
