"""Rules about how predict continues a prompt: the section, and the file beside the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from launcher.config.checks.check import Check
from launcher.config.derived import read_json_object, tokenizer_dir
from launcher.config.generation_file import (
    FILE_NAME,
    GenerationFile,
    check_generation,
    generation_path,
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
    if check.mode not in ("predict", "predict_with_train_model"):
        return
    try:
        found = read_generation_file(check)
    except UserError as error:
        yield from map(_about_the_file, error.problems)
        return
    yield from map(_about_the_file, found.problems)


def bad_words(check: Check) -> Iterator[KeyProblem]:
    """Tokens of bad_words_ids are tokens of the model, as `transformers` requires."""
    key, section = "bad_words_ids", check.config.generation_config
    if check.mode not in ("predict", "predict_with_train_model") or check.spec is None:
        return
    written, size = section.bad_words_ids, check.spec.hf_config.get("vocab_size")
    try:
        words = written or read_generation_file(check).values.get(key) or []
    except UserError:
        return  # reported by `generation_file`
    token = max((token for word in words for token in word), default=0)
    if isinstance(size, int) and token >= size:
        yield check.wrong(
            f"generation_config.{key}",
            f"vocab_size of the model is {size}",
            what=f"{key} contains token {token}",
            advice="" if written else f"Correct {FILE_NAME}, or set generation_config.{key}",
        )


def warnings(check: Check) -> list[str]:
    """Keys of the file that have no effect."""
    if check.mode not in ("predict", "predict_with_train_model"):
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
