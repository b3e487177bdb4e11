"""Every command and sample of docs/mindspore.md runs, on weights in the form of MindFormers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from launcher.tools import convert_weight
from tests.data.mindrecord_writer import Schema, token_rows, write_mindrecord
from tests.mindspore.names import write_ranks
from tests.test_docs import run_page
from tests.workshop import Workshop

SIZES: dict[str, Any] = {
    "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
PROMPT = "I love Beijing, because"


@pytest.fixture(scope="module")
def folder(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the page speaks of, and the Hugging Face directory they were made from."""
    folder = materials.copy_to(tmp_path_factory.mktemp("page")).folder
    (folder / "corpus").rename(folder / "my_text")
    record = {"instruction": "Count.", "input": "to two", "output": "one two"}
    (folder / "alpaca.json").write_text(json.dumps([record] * 20))
    write_alpaca(folder / "alpaca.mindrecord")
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    torch.manual_seed(5)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "origin")
    arguments = [
        "--model",
        "qwen2_5",
        "--input_path",
        str(folder / "origin"),
        "--qkv_concat",
        "True",
    ]
    for name in ("qwen2_5.ckpt", "complete"):
        assert convert_weight.main([*arguments, "--output_path", str(folder / name)]) == 0
    (stored,) = (folder / "complete").glob("*.safetensors")
    write_ranks(folder / "run", load_file(stored), grid=(2, 1))
    (folder / "run" / "ranks").rename(folder / "distributed")
    (folder / "run" / "strategy").rename(folder / "src_strategy")
    return folder


def write_alpaca(path: Path) -> None:
    """Rows of 65 tokens, as MindFormers' script for Qwen2.5 writes them."""
    rows = np.random.default_rng(2).integers(2, SIZES["vocab_size"], size=(8, 65))
    names = ("input_ids", "target_ids", "attention_mask")
    schema: Schema = {name: ("int32", [-1]) for name in names}
    records = ((row, row, np.ones_like(row)) for row in rows)
    write_mindrecord(path, schema, token_rows(records, *names))


def test_every_command_of_the_page_runs(folder: Path) -> None:
    assert run_page("mindspore.md", folder) >= 13
    texts = {
        name: json.loads((folder / f"output/{name}/text_generation_result.jsonl").read_text())
        for name in ("predict", "two", "one")
    }
    assert texts["two"]["tokens"] == texts["one"]["tokens"] == texts["predict"]["tokens"]
    assert texts["predict"]["tokens"] == _expected(folder, len(texts["predict"]["tokens"]))
    losses = {
        name: [json.loads(row)["loss"] for row in (folder / f"output/{name}/metrics.jsonl").open()]
        for name in ("finetune", "as_ckpt", "records")
    }
    assert len(losses["finetune"]) == 2
    assert losses["finetune"] == losses["as_ckpt"]
    log = (folder / "output/finetune_alpaca/log/rank_0/info.log").read_text()
    assert "6 conversations of 1 file(s)" in log
    assert len(losses["records"]) == 2
    origin = load_file(folder / "origin" / "model.safetensors")
    again = {}
    for file in (folder / "output" / "hugging_face").glob("*.safetensors"):
        again |= load_file(file)
    assert again.keys() == origin.keys()
    assert all(np.array_equal(again[name], values) for name, values in origin.items())
    assert (folder / "output/qwen2_5_again.ckpt").read_bytes() == (
        folder / "qwen2_5.ckpt"
    ).read_bytes()


def _expected(folder: Path, count: int) -> list[int]:
    """The tokens that `transformers` predicts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = AutoModelForCausalLM.from_pretrained(folder / "origin")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    tokens: list[int] = made[0, ids.shape[1] :].tolist()
    return tokens
