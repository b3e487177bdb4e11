"""Rules about the JSON files of a tokenizer, which its library reads without checks.

Owns which keys have which JSON type. Keys that only one class of tokenizer knows are left to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.derived import read_json_object, tokenizer_dir
from launcher.config.provenance import KeyProblem
from launcher.errors import UserError
from launcher.weights.formats.placeholders import placeholder

_LARGEST_BYTES = 4 * 2**20
"""A larger file is not read here, so that checks stay fast."""
_SIDES = ("left", "right")


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, dict) and isinstance(value.get("content"), str)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TOKEN = (_is_token, "a string, or an object with `content`")
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokenizer_class": (lambda value: isinstance(value, str), "a string"),
    "model_max_length": (_is_number, "a number"),
    "chat_template": (lambda value: isinstance(value, str | list | dict), "a template or several"),
    "padding_side": (lambda value: value in _SIDES, "left or right"),
    "truncation_side": (lambda value: value in _SIDES, "left or right"),
    "added_tokens_decoder": (lambda value: isinstance(value, dict), "an object"),
    "extra_special_tokens": (lambda value: isinstance(value, dict | list), "an object or a list"),
    "additional_special_tokens": (
        lambda value: isinstance(value, list) and all(map(_is_token, value)), "a list of tokens",
    ),
    **{f"{name}_token": _TOKEN for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")},
    **{
        name: (lambda value: isinstance(value, bool), "true or false")
        for name in ("add_bos_token", "add_eos_token", "add_prefix_space",
                     "clean_up_tokenization_spaces")
    },
}  # fmt: skip
"""Key of tokenizer_config.json or special_tokens_map.json to its test, and the expected type. Null
means that a key is not set."""
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def tokenizer_files(check: Check) -> Iterator[KeyProblem]:
    """The values in the JSON files of the tokenizer have the types that its library expects."""
    folder = tokenizer_dir(check.config)
    if not check.mode or check.config.only_save_strategy or not folder:
        return
    for name in (*_FILES, "tokenizer.json"):
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
            continue
        if placeholder(path, is_text=True):
            continue  # reported by another rule
        try:
            content = read_json_object(path)
        except UserError as error:
            if name == "tokenizer.json":
                continue  # reported by the rule that compares it with the vocabulary of the model
            for problem in error.problems:
                yield _of(path, problem.what, problem.rule, where=problem.where)
            continue
        yield from _wrong_types(path, content)


def _wrong_types(path: Path, content: dict[str, Any]) -> Iterator[KeyProblem]:
    if path.name == "tokenizer.json":
        if not isinstance(content.get("model"), dict):
            yield _of(path, "`model` is missing", "must be an object with the vocabulary")
        elif not isinstance(content.get("added_tokens"), list):
            yield _of(path, "`added_tokens` is missing", "must be a list, which may be empty")
    elif path.name == "added_tokens.json":
        for token, index in content.items():
            if type(index) is not int:
                yield _of(path, f"{token!r} = {index!r}", "the id of a token must be an integer")
    else:
        for key, (is_right, words) in _TYPES.items():
            value = content.get(key)
            if value is not None and not is_right(value):
                yield _of(path, f"{key} = {value!r}", f"must be {words}")


def _of(path: Path, what: str, rule: str, *, where: str = "") -> KeyProblem:
    return KeyProblem(
        what=what if len(what) <= 80 else what[:77] + "...", where=where or str(path), rule=rule,
        advice="Correct the file, or copy it again from the model it belongs to",
        key="processor.tokenizer.pretrained_model_dir", also=("pretrained_model_dir",),
    )  # fmt: skip
