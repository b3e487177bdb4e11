"""Prompts in, texts out, files written."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import UserError
from launcher.generation.settings import GenerationSettings
from launcher.predict.generate import Generation, continued_text, generate
from launcher.predict.prompts import read_prompts
from launcher.predict.results import result_text, write_results
from models.build import build_model
from tests.models.tiny import dense_spec, pair
from tests.predict.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OWN, MODULE = pair(dense_spec(type="LlamaConfig", max_position_embeddings=64))
PROMPTS = ["def f(x):", "a", "import os, sys", "return", "for i in"]


def texts(given: Any) -> list[str]:
    prompts = read_prompts(given)
    assert all(prompt.conversation is None for prompt in prompts)
    return [prompt.text for prompt in prompts]


def test_one_prompt_several_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first \\n line\n\nsecond\n", encoding="utf-8")
    assert texts("I love Beijing, because") == ["I love Beijing, because"]
    assert texts("a\\nb") == texts(["a\\nb"]) == ["a\nb"]
    assert texts(["a\\nb", "c"]) == ["a\\nb", "c"]
    assert texts(str(file)) == ["first \\n line", "second"]
    assert texts(["a", str(file), "b"]) == ["a", "first \\n line", "second", "b"]
    assert [prompt.where for prompt in read_prompts(str(file))] == [f"{file}:1", f"{file}:3"]
    assert texts("x" * 300) == ["x" * 300]  # no file system takes it for a name


def test_results_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    for text in ("a", "a", "b"):
        write_results([Generation(prompt="p", text=text, tokens=(1,))], path, 1)
    texts = {f.name: f.read_text() for f in tmp_path.glob("*.txt")}
    assert texts == {
        "result-1.txt": "[{'text_generation_text': ['a']}]",
        "result.txt": "[{'text_generation_text': ['b']}]",
    }
    assert {f.name for f in tmp_path.glob("*.jsonl")} == {"result-1.jsonl", "result.jsonl"}


def refused(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    return {
        "nothing": (None, "predict needs prompts. Give --predict_data"),
        "empty text": ("", "predict needs prompts"),
        "absent file": (str(tmp_path / "absent.txt"), "there is no such file"),
        "one of several": (["a", str(tmp_path / "absent.txt")], "there is no such file"),
        "empty file": (str(tmp_path / "empty.txt"), "is empty. Write one prompt a line."),
        "binary file": (str(tmp_path / "binary.bin"), "is not UTF-8 text"),
        "directory": (str(tmp_path), "is a directory: prompts are text, or a file"),
    }


def test_invalid_prompts(tmp_path: Path) -> None:
    for given, text in refused(tmp_path).values():
        with pytest.raises(UserError) as raised:
            read_prompts(given)
        assert text in str(raised.value)


def test_texts_equal_transformers() -> None:
    found = generate(OWN, TOKENIZER, PROMPTS, GenerationSettings(max_new_tokens=9), batch_size=2)
    assert [g.prompt for g in found] == PROMPTS
    for generation in found:
        ids = TOKENIZER(generation.prompt, return_tensors="pt")
        text = MODULE.eval().generate(
            ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=9,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0]  # fmt: skip
        assert list(generation.tokens) == text[ids["input_ids"].shape[1] :].tolist()
        assert generation.text == TOKENIZER.decode(text, skip_special_tokens=True)
        assert generation.text.startswith(generation.prompt)


def test_ranks_share_the_prompts_and_rank_0_has_all() -> None:
    settings = GenerationSettings(max_new_tokens=5, do_sample=True)
    alone = generate(OWN, TOKENIZER, PROMPTS, settings, batch_size=2, seed=3)
    shares: dict[int, Any] = {}
    for rank in (1, 0):

        def gather(share: Any, rank: int = rank) -> Any:
            shares[rank] = share
            return [shares[r] for r in sorted(shares)] if rank == 0 else None

        found = generate(OWN, TOKENIZER, PROMPTS, settings, batch_size=2, seed=3, rank=rank,
                         data_parallel=2, gather=gather)  # fmt: skip
        assert found == (alone if rank == 0 else [])
    assert [index for index, _ in shares[1]] == [1, 3]


def test_several_texts_of_a_prompt_begin_with_the_one_that_it_has_alone() -> None:
    settings = GenerationSettings(max_new_tokens=8, do_sample=True, temperature=1.5)
    alone = generate(OWN, TOKENIZER, PROMPTS, settings, batch_size=2)
    several = replace(settings, num_return_sequences=3)
    found = generate(OWN, TOKENIZER, PROMPTS, several, batch_size=4)
    assert [g.prompt for g in found] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert found[::3] == alone
    assert len({g.tokens for g in found[:3]}) == 3


def test_an_empty_prompt_begins_with_the_bos_token_where_there_is_one() -> None:
    settings = GenerationSettings(max_new_tokens=3, bos_token_id=1)
    (found,) = generate(OWN, TOKENIZER, [""], settings)
    assert len(found.tokens) == 3
    with pytest.raises(UserError, match="prompt 1: is empty"):
        generate(OWN, TOKENIZER, [""], GenerationSettings())


def test_positions_of_the_model_are_respected() -> None:
    with pytest.raises(UserError, match="the model has 64 positions"):
        generate(OWN, TOKENIZER, ["x" * 64], GenerationSettings(max_new_tokens=1))
    stretching = dense_spec(type="LlamaConfig", max_position_embeddings=8,
                            rope_scaling={"type": "dynamic", "factor": 2.0})  # fmt: skip
    model = build_model(stretching, dtype=next(OWN.parameters()).dtype)
    model.to_empty(device="cpu")
    model.load_state_dict(OWN.state_dict())
    assert generate(model, TOKENIZER, ["x" * 9], GenerationSettings(max_new_tokens=1))


def test_the_prompt_is_kept_as_typed() -> None:
    class Joining:
        """Puts spaces between words and loses a leading one, as SentencePiece does."""

        words = ("<s>", "Hello", "world", "again")

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return " ".join(self.words[i] for i in ids if i or not skip_special_tokens)

    assert continued_text(Joining(), "Hello", [0, 1], [2, 3]) == "Hello world again"


GENERATIONS = [
    Generation(prompt="a", text="a 'quoted'\n\"text\"", tokens=(1, 2)),
    Generation(prompt="é", text="é日本", tokens=()),
    Generation(prompt="c", text="c", tokens=(3,)),
]


def test_results_in_the_format_of_mindformers_and_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "out" / "text_generation_result.txt"
    beside = write_results(GENERATIONS, path, batch_size=2)
    assert beside == path.with_suffix(".jsonl")
    assert ast.literal_eval(path.read_text(encoding="utf-8")) == [
        {"text_generation_text": [GENERATIONS[0].text, GENERATIONS[1].text]},
        {"text_generation_text": ["c"]},
    ]
    rows = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"prompt": "a", "text": GENERATIONS[0].text, "tokens": [1, 2]}
    assert rows[1]["text"] == "é日本"
    assert result_text(GENERATIONS[2:], 1) == "[{'text_generation_text': ['c']}]"
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "text_generation_result.jsonl", "text_generation_result.txt",
    ]  # fmt: skip
