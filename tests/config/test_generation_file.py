"""generation_config.json and the files of a tokenizer: right types, bounds, nothing ignored."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from launcher.config import generation_file, rules
from launcher.config.generation_file import check_generation, generation_path
from launcher.config.resolve import resolve
from tests import messages
from tests.config.workspace import RIGHT, build

ORDINARY = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
    "eos_token_id": [2, 3], "bos_token_id": 1, "pad_token_id": 0, "max_new_tokens": 8,
    "transformers_version": "5.17.0", "_from_model_config": True, "use_cache": True,
}  # fmt: skip


def problems(content: dict[str, Any], **more: Any) -> list[str]:
    return [str(p) for p in check_generation(content, "m/generation_config.json", **more).problems]


def test_an_ordinary_file_is_right_and_ints_become_floats() -> None:
    found = check_generation(ORDINARY, "f")
    assert (found.problems, found.notes) == ([], [])
    assert found.values == {
        key: value for key, value in ORDINARY.items()
        if key not in ("transformers_version", "_from_model_config", "use_cache")
    }  # fmt: skip
    numbers = {"do_sample": True, "temperature": 2, "top_p": 1, "top_k": 5.0, "typical_p": 1}
    values = check_generation(numbers, "f").values
    assert {key: type(value) for key, value in values.items()} == {
        "do_sample": bool, "temperature": float, "top_p": float, "top_k": int, "typical_p": float
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": True, "temperature": 0.0},
        {"do_sample": True, "top_p": 1.5},
        {"max_new_tokens": "20"},
        {"max_new_tokens": True},
        {"max_new_tokens": 2.5},
        {"max_length": [20]},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"temperature": "0.7"},
        {"do_sample": "true"},
        {"do_sample": 1},
        {"eos_token_id": ["2"]},
        {"eos_token_id": {"a": 1}},
        {"suppress_tokens": [-1]},
        {"bad_words_ids": [3]},
        {"bad_words_ids": [[]]},
        {"num_beams": 4},
        {"guidance_scale": 1.5},
        {"stop_strings": [2]},
        {"stop_strings": []},
        {"stop_strings": ["a", ""]},
        {"forced_eos_token_id": "2"},
        {"sequence_bias": [[5, 1.0]]},
        {"sequence_bias": [[[5], "1"]]},
        {"exponential_decay_length_penalty": [20]},
        {"exponential_decay_length_penalty": [20, 0]},
        {"num_return_sequences": 0},
        {"max_time": 0},
        {"encoder_repetition_penalty": 0.0},
        {"do_sample": True, "top_h": 0.0},
        {"prefix_allowed_tokens": 1, "dola_layers": "high"},
        {"penalty_alpha": 0.6},
        {"watermarking_config": {"greenlist_ratio": 0.5}},
    ],
    ids=str,
)
def test_every_wrong_value_is_reported_with_file_and_key(content: dict[str, Any]) -> None:
    (found,) = problems({**ORDINARY, **content})
    key, value = list(content.items())[-1]
    assert found.startswith(f"m/generation_config.json: {key} = {value!r}: ")
    messages.check("generation_config.json", str(content), found)


FURTHER = {
    "stop_strings": "\n", "forced_eos_token_id": [2, 3], "forced_bos_token_id": -1,
    "sequence_bias": [[[5, 9], -2], [[7], 1.5]], "exponential_decay_length_penalty": [20, 1.1],
    "num_return_sequences": 2, "max_time": 3, "encoder_repetition_penalty": 2,
    "encoder_no_repeat_ngram_size": 3, "top_h": 0.4, "renormalize_logits": True,
}  # fmt: skip


def test_further_keys_of_transformers_act() -> None:
    found = check_generation({"do_sample": True, **FURTHER}, "f")
    assert (found.problems, found.notes) == ([], [])
    expected = {"do_sample": True, **FURTHER, "forced_bos_token_id": None}
    del expected["renormalize_logits"]
    assert found.values == expected


def test_all_problems_are_reported_at_once() -> None:
    wrong = {"do_sample": True, "temperature": 0.0, "max_new_tokens": "20", "num_beams": 4}
    assert len(problems(wrong)) == 3


def test_keys_of_the_user_take_precedence() -> None:
    wrong = {"do_sample": True, "temperature": 0.0, "num_beams": 4}
    assert problems(wrong, overridden={"temperature", "num_beams"}) == []
    assert problems({"temperature": 0.0}, do_sample=True) != []
    assert problems(wrong, overridden={"do_sample", "num_beams"}, do_sample=False) == []


def test_what_has_no_effect_is_named_once() -> None:
    content = {"temperature": 0.0, "top_k": -1, "chat_format": "chatml", "speed": 3, "num_beams": 1}
    found = check_generation(content, "f")
    assert found.problems == []
    assert found.notes == ["f: not used: chat_format, speed",
                           "f: no effect without do_sample: temperature, top_k"]  # fmt: skip
    assert check_generation({"pad_token_id": -1, "eos_token_id": [-1]}, "f").values == {
        "pad_token_id": None, "eos_token_id": None
    }  # fmt: skip


def test_every_key_of_transformers_is_known() -> None:
    """A new release of transformers with a new key fails here, not for a user."""
    for key in vars(GenerationConfig()):
        notes = check_generation({key: {"an": "object"}}, "f").notes
        assert not any("not used" in note for note in notes), key


def test_the_file_beside_the_model_counts(tmp_path: Path) -> None:
    for name in ("model", "tokenizer"):
        (tmp_path / name).mkdir()
    model, tokenizer = str(tmp_path / "model"), str(tmp_path / "tokenizer")
    assert generation_path(model, tokenizer) is None
    (tmp_path / "tokenizer/generation_config.json").write_text("{}")
    assert generation_path(model, tokenizer) == tmp_path / "tokenizer/generation_config.json"
    (tmp_path / "model/generation_config.json").write_text("{}")
    assert generation_path(model, tokenizer) == tmp_path / "model/generation_config.json"


# --- the rules, on real folders -------------------------------------------------------------------


@pytest.fixture
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path)
    (tmp_path / "run.yaml").write_text(RIGHT + "run_mode: predict\ninput_data: hello\n")
    monkeypatch.chdir(tmp_path)


def found_in(name: str, content: str | bytes) -> list[str]:
    """What the rules find wrong when a file of the tokenizer has this content."""
    path = Path("tokenizer", name)
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        resolved = resolve("run.yaml")
        return [str(p) for p in rules.check(resolved.config, resolved.provenance, world=None)]
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


SECTIONS = {
    "lists": ("sequence_bias: [[5, 1.0]]", "generation_config.sequence_bias = ", None),
    "decay": ("exponential_decay_length_penalty: [1, 2, 3]", "[1, 2, 3]: ", None),
    "stop strings": ("stop_strings: ['']", "generation_config.stop_strings = ['']: ", None),
    "words": ("bad_words_ids: [5]", "generation_config.bad_words_ids = [5]: ", None),
    "tokens": ("forced_eos_token_id: [3, 99999]", "contains token 99999: ", None),
    "greedy": ("num_return_sequences: 2", "num_return_sequences = 2: ", ("1",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.usefixtures("_folder")
def test_rules_of_the_section(name: str) -> None:
    line, says, near = SECTIONS[name]
    Path("run.yaml").write_text(
        RIGHT + f"run_mode: predict\ninput_data: hello\ngeneration_config:\n  {line}\n"
    )
    (found,) = found_in("unused.json", "{}")
    at = len(Path("run.yaml").read_text().splitlines())
    assert found.startswith(f"run.yaml:{at}: ")
    assert says in found
    assert near is None or messages.nearest(found) == near
    messages.check("generation_config", name, found)


@pytest.mark.usefixtures("_folder")
def test_several_texts_with_do_sample_of_the_file() -> None:
    several = '{"num_return_sequences": 2, "do_sample": %s}'
    assert found_in("generation_config.json", several % "true") == []
    (found,) = found_in("generation_config.json", several % "false")
    assert "num_return_sequences = 2: " in found


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("generation_config.json", "{broken", "generation_config.json:1: "),
        ("generation_config.json", "[]", "generation_config.json: "),
        ("generation_config.json", '{"num_beams": 2}', "generation_config.json: num_beams = 2"),
        ("generation_config.json", b'{"a": "\xff"}', "generation_config.json"),
        ("generation_config.json", '{"top_k": 5, "top_k": 6}', "'top_k'"),
        ("generation_config.json", '{"bad_words_ids": [[1, 99999]]}', "99999"),
        ("tokenizer_config.json", '{"a": {"b": 1, "b": 2}}', "'b'"),
        ("tokenizer_config.json", "{broken", "tokenizer_config.json:1: "),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: "),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": 5}',
            "tokenizer_class = 5: ",
        ),
        ("tokenizer_config.json", '{"model_max_length": "9"}', "model_max_length = '9': "),
        ("tokenizer_config.json", '{"eos_token": {"content": 1}}', "eos_token = {'content': 1}"),
        ("tokenizer_config.json", '{"padding_side": "up"}', "padding_side = 'up': "),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template = 1"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "added_tokens_decoder = []"),
        ("special_tokens_map.json", '{"bos_token": []}', "bos_token = []"),
        ("added_tokens.json", '{"a": "1"}', "added_tokens.json: 'a' = '1'"),
        ("tokenizer.json", "{}", "tokenizer.json: `model`"),
    ],
)
@pytest.mark.usefixtures("_folder")
def test_files_of_a_tokenizer(name: str, content: str, says: str) -> None:
    (found,) = found_in(name, content)
    assert says in found
    messages.check("tokenizer files", f"{name}: {content!r}", found)


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 10**30, 0.0, -0.5, float("nan"), float("inf"), "", "x", "20",
    "\ud800", [], [1], ["a"], [[1]], [None], {}, {"a": 1}, {"content": "x"}, [[[]]], [1.5],
)  # fmt: skip
KEYS = [*vars(GenerationConfig()), "tokenizer_class", "model_max_length", "chat_template",
        "eos_token", "padding_side", "added_tokens_decoder", "extra_special_tokens",
        "unheard_of"]  # fmt: skip


def mutations(count: int, seed: int) -> list[bytes]:
    """Contents of a JSON file: other types, missing and added keys, cut, other encodings."""
    draw, made = random.Random(seed), []
    for _ in range(count):
        content: dict[str, Any] = dict(ORDINARY)
        for _ in range(draw.randint(1, 3)):
            content[draw.choice(KEYS)] = draw.choice(VALUES)
        raw = json.dumps(content).encode()
        kind = draw.random()
        if kind < 0.1:
            raw = raw[: draw.randrange(len(raw))]
        elif kind < 0.15:
            raw = json.dumps(content).encode(draw.choice(["utf-16", "utf-32", "latin-1"]))
        elif kind < 0.2:
            raw = raw.replace(b"top_k", b"top_\xff")
        elif kind < 0.23:
            raw = b"[" * 3000 + b"]" * 3000
        elif kind < 0.26:
            raw = b'{"top_k": ' + b"9" * 5000 + b"}"
        made.append(raw)
    return made


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("count", [150, pytest.param(2500, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_any_content_is_right_or_an_error_with_file_and_place(name: str, count: int) -> None:
    answers = [found_in(name, raw) for raw in mutations(count, seed=len(name))]
    wrong = [answer for answer in answers if answer]
    assert count * 0.2 < len(wrong) < count
    assert all(name in line for answer in wrong for line in answer)


def test_the_table_has_no_key_twice() -> None:
    assert not generation_file._NO_EFFECT & set(generation_file._FIELDS)


@pytest.mark.usefixtures("_folder")
def test_a_key_twice_with_one_value_does_no_harm() -> None:
    assert found_in("generation_config.json", '{"top_k": 5, "do_sample": true, "top_k": 5}') == []
