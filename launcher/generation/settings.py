"""The settings of a generation: how prompts are continued, and how long texts may get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import Problem, UserError

_DEFAULTS: dict[str, Any] = {
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None,
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "top_h": None, "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0, "sequence_bias": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "stop_strings": None,
    "max_time": None, "num_return_sequences": 1,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip

_SMALLEST_DIVISOR = 1e-30
"""Of logits: a smaller one makes them infinite in float32. Such a temperature draws the most likely
token either way."""
_MOST_PROBLEMS = 10
"""Prompts that are reported together."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How to continue prompts; the names are those of transformers."""

    max_length: int = 20
    """Longest text in tokens, with the prompt; no effect when `max_new_tokens` is given."""
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    top_h: float | None = None
    encoder_repetition_penalty: float = 1.0
    encoder_no_repeat_ngram_size: int = 0
    sequence_bias: list[list[Any]] | None = None
    """Pairs of token ids and a number."""
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    stop_strings: tuple[str, ...] = ()
    max_time: float | None = None
    """Seconds."""
    num_return_sequences: int = 1
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int = 0


def generation_settings(
    *sources: Mapping[str, Any], tokenizer: Any = None, hf_config: Mapping[str, Any] | None = None
) -> GenerationSettings:
    """Settings from `sources`, highest priority first: keys written in `generation_config`, those
    in `model_config`, the directory's generation_config.json.

    Keys that none of them has take the defaults; special tokens then come from `hf_config` (the
    model's config.json) and from the tokenizer. Other keys of the sources are ignored.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        # max_length in one source is not undone by max_new_tokens in one of lower priority.
        limited = {"min_new_tokens"} if "min_length" in merged else set()
        limited |= {"max_new_tokens"} if "max_length" in merged else set()
        given = {key for key in source if key in _DEFAULTS and source[key] is not None}
        merged = {key: source[key] for key in given - limited} | merged
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        in_config = (hf_config or {}).get(key)
        value = in_config if in_config is not None else getattr(tokenizer, key, None)
        merged.setdefault(key, value)
    settings = _DEFAULTS | merged
    for key in ("temperature", "repetition_penalty", "encoder_repetition_penalty"):
        settings[key] = max(settings[key], _SMALLEST_DIVISOR)
    end, padding = settings.pop("eos_token_id"), settings.pop("pad_token_id")
    ends = () if end is None else (end,) if isinstance(end, int) else tuple(end)
    stops, decay = settings["stop_strings"], settings["exponential_decay_length_penalty"]
    settings["stop_strings"] = (stops,) if isinstance(stops, str) else tuple(stops or ())
    settings["exponential_decay_length_penalty"] = tuple(decay) if decay else None
    vocabulary = (hf_config or {}).get("vocab_size")
    if padding is None:
        padding = ends[0] if ends else 0
    if isinstance(vocabulary, int) and not 0 <= padding < vocabulary:
        padding = 0  # padding is masked, but it has to be in the embedding
    return GenerationSettings(**settings, eos_token_ids=ends, pad_token_id=padding)


def token_limits(
    lengths: Sequence[int], settings: GenerationSettings, positions: int | None,
    places: Sequence[str] = (),
) -> list[int]:  # fmt: skip
    """The longest length of each text, in tokens. Raises UserError with the first prompts that are
    too long.

    `positions`: how many the model has; None: no limit. `places`: where each prompt was read, for
    the errors; empty where nobody knows.
    """
    limits, problems = list[int](), list[Problem]()
    for index, length in enumerate(lengths):
        new = settings.max_new_tokens
        limits.append(settings.max_length if new is None else length + new)
        problem = _problem_of_length(length, limits[-1], settings, positions)
        if problem is not None:
            place = places[index] if index < len(places) else ""
            problems.append(replace(problem, where=place or f"prompt {index + 1}"))
        if len(problems) == _MOST_PROBLEMS:
            break
    if problems:
        raise UserError(problems)
    return limits


def _problem_of_length(
    length: int, limit: int, settings: GenerationSettings, positions: int | None
) -> Problem | None:
    """Why a prompt of `length` tokens has no text of at most `limit`; None where it has one."""
    if length == 0:
        return Problem(what="is empty", rule="generation needs a first token",
                       advice="Write a prompt, or set generation_config.bos_token_id")  # fmt: skip
    what, new = f"has {length} tokens", settings.max_new_tokens
    if positions is not None and length >= positions:
        return Problem(what=what, rule=f"the model has {positions} positions",
                       advice="Shorten the prompt")  # fmt: skip
    if length >= limit:
        return Problem(what=what, rule=f"max_length = {limit} counts the prompt",
                       nearest=f"Nearest: generation_config.max_length: {length + 1}",
                       advice="Or set generation_config.max_new_tokens")  # fmt: skip
    if positions is not None and limit > positions:
        key = "max_length" if new is None else "max_new_tokens"
        nearest = positions if new is None else positions - length
        return Problem(
            what=f"{what}, generation_config.{key} = {limit if new is None else new}",
            rule=f"the model has {positions} positions", nearest=f"Nearest: {nearest}",
        )  # fmt: skip
    return None
