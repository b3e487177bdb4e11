"""generation_config.json of a model directory, checked as strictly as the YAML section.

Owns what its keys may be. The keys are those of `GenerationConfig` of transformers; what they mean
here is in `GenerationSection`. A key that would change the tokens and is not supported is an error;
keys that only configure how transformers computes are accepted. Without torch; one small file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.config.schema import FieldInfo, GenerationSection, info_of
from launcher.config.typing_rules import WrongType, convert, describe, hints, out_of_bounds
from launcher.errors import Problem

FILE_NAME = "generation_config.json"
SAMPLING = frozenset(
    {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
)
"""Keys that change nothing without `do_sample`."""
_NO_EFFECT = frozenset({
    "_commit_hash", "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "cache_config", "cache_implementation",
    "compile_config", "continuous_batching_config", "decoder_start_token_id", "disable_compile",
    "diversity_penalty", "early_stopping", "is_assistant", "length_penalty", "low_memory",
    "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states",
    "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values", "speculation_type",
    "target_lookbehind", "transformers_version", "use_cache", "use_mtp",
})  # fmt: skip
"""Keys that change no token where there is one beam and no draft model."""
_FIELDS = {f.name: f for f in dataclasses.fields(GenerationSection) if f.name != "seed"}
"""The keys of the section that are keys of transformers too."""


@dataclass
class GenerationFile:
    """The content of a file of generation settings."""

    values: dict[str, Any] = field(default_factory=dict)
    """Key to value of the right type, of those that act here."""
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Keys that are accepted and have no effect, one line each."""


def check_generation(
    content: Mapping[str, Any], where: str, *, overridden: Collection[str] = (),
    do_sample: bool | None = None, prefix: str = "",
) -> GenerationFile:  # fmt: skip
    """Check the settings in `content`, which is from `where`.

    `overridden`: keys that the user set elsewhere, which take precedence. `do_sample`: the value
    that the user set, None where the file decides. `prefix`: of keys in messages.
    """
    found = GenerationFile()
    samples = content.get("do_sample") is True if do_sample is None else do_sample
    unknown, idle = [], []
    for key, value in content.items():
        if key in overridden or value is None or key in _NO_EFFECT:
            continue
        if key not in _FIELDS:
            unknown.append(str(key))
            continue
        info = info_of(_FIELDS[key])
        problem = _problem(key, value, info)
        if problem and key in SAMPLING and not samples and problem.rule not in _TYPE_RULES:
            idle.append(key)
        elif problem:
            shown = dataclasses.replace(problem, what=prefix + problem.what, where=where)
            found.problems.append(shown)
        elif info.status == "effective":
            found.values[key] = _resolved_values(key, value)
    if unknown:
        found.notes.append(f"{where}: not used: {', '.join(sorted(unknown))}")
    if idle:
        found.notes.append(f"{where}: no effect without do_sample: {', '.join(sorted(idle))}")
    return found


_NOT_BUILT = "not built yet, and it would change the output"
_TEXTS = hints(GenerationSection)["stop_strings"]
_TYPE_RULES = {f"must be {describe(hints(GenerationSection)[name])}" for name in _FIELDS}


def _problem(key: str, value: Any, info: FieldInfo) -> Problem | None:
    what = f"{key} = {value!r}"
    what = what if len(what) <= 80 else what[:77] + "..."
    default = _FIELDS[key].default
    if info.status == "no effect":
        return None
    if info.status == "not built yet":
        if any(value == harmless for harmless in info.harmless) or value == []:
            return None
        shown = "null" if default is None else default
        advice = f"Set generation_config.{key}: {shown} in the YAML file to continue without it"
        return Problem(what=what, rule=_NOT_BUILT, advice=advice)
    annotation = hints(GenerationSection)[key]
    try:
        if _is_of_another_type(value, annotation):
            raise WrongType
        converted = convert(annotation, value)
    except WrongType:
        return Problem(what=what, rule=f"must be {describe(annotation)}", advice=_advice(key))
    rule = out_of_bounds(converted, info) or list_problem(key, converted)
    return Problem(what=what, rule=rule, advice=_advice(key)) if rule else None


def _is_of_another_type(value: Any, annotation: Any) -> bool:
    """Stricter than YAML: in JSON a string is never a number, and a boolean never an integer."""
    if annotation == _TEXTS:
        items = value if isinstance(value, list) else [value]
        return not all(isinstance(item, str) for item in items)
    if isinstance(value, list):
        return any(isinstance(item, str | bool) for item in value)
    if isinstance(value, str):
        return True
    if isinstance(value, bool):
        return annotation is not bool
    return annotation is bool or (isinstance(value, float) and not math.isfinite(value))


def _advice(key: str) -> str:
    return (
        f"Correct the file, or set generation_config.{key} in the YAML file, which takes precedence"
    )


def _token_lists(value: Any) -> str:
    """The problem of lists of tokens; empty where there is none."""
    right = all(
        isinstance(word, list) and word and all(type(t) is int and t >= 0 for t in word)
        for word in value
    )
    return "" if right and value else "must be a list of lists of token ids"


def _tokens(value: Any) -> str:
    values = value if isinstance(value, list) else [value]
    right = all(type(token) is int for token in values)
    return "" if right else "must be token ids"


def _suppressed(value: Any) -> str:
    return "" if all(token >= 0 for token in value) else "must be token ids"


def _biases(value: Any) -> str:
    right = all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list)
        and not _token_lists([pair[0]]) and type(pair[1]) in (int, float)
        and math.isfinite(pair[1]) for pair in value
    )  # fmt: skip
    return "" if right and value else "must be pairs of token ids and a number: [[[5, 9], -2.0]]"


def _decay(value: Any) -> str:
    right = (
        len(value) == 2 and type(value[0]) is int and value[0] >= 0
        and type(value[1]) in (int, float) and math.isfinite(value[1]) and value[1] > 0
    )  # fmt: skip
    return "" if right else "must be a number of new tokens and a factor above 0, such as [20, 1.1]"


def _stops(value: Any) -> str:
    values = [value] if isinstance(value, str) else value
    return "" if values and all(values) else "must be texts that are not empty"


_LISTS: dict[str, Callable[[Any], str]] = {
    "bad_words_ids": _token_lists, "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed, "eos_token_id": _tokens,
    "forced_eos_token_id": _tokens, "sequence_bias": _biases,
    "exponential_decay_length_penalty": _decay, "stop_strings": _stops,
}  # fmt: skip


def list_problem(key: str, value: Any) -> str:
    """The rule that the content of a list breaks; empty where it is right, or `key` has no list."""
    return "" if value is None or key not in _LISTS else _LISTS[key](value)


def _resolved_values(key: str, value: Any) -> Any:
    """The value in the type of the schema; a negative token id, which some files have for none, is
    None."""
    value = convert(hints(GenerationSection)[key], value)
    if key.endswith("_token_id"):
        kept = [token for token in (value if isinstance(value, list) else [value]) if token >= 0]
        return (kept or None) if isinstance(value, list) else next(iter(kept), None)
    return value


def generation_path(pretrained_model_dir: str, tokenizer_dir: str) -> Path | None:
    """The file that is used: that of the model, else that of the tokenizer, else None."""
    for folder in (pretrained_model_dir, tokenizer_dir):
        path = Path(folder) / FILE_NAME
        if folder and path.is_file():
            return path
    return None
