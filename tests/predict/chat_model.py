"""A model whose answers are known: each token has one successor, whatever was before it.

A question that ends in `?` is answered by `ANSWER`, whose characters take several tokens each; one
that ends in `~` by the alphabet, again and again.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase

import torch
import yaml
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.workshop import VOCABULARY, Workshop

ANSWER = "日éЖ😀ह"
POSITIONS = 100_000
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message.role + ': ' + message.content -}}"
    "{%- if not (add_generation_prompt and loop.last) -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""The last token of a prompt is the last one of the question."""


def write_chat_model(materials: Workshop, folder: Path) -> str:
    """Write `model/` and a configuration of predict. Returns the name of the latter."""
    shutil.copytree(materials.folder / "tokenizer", folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=VOCABULARY, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
        max_position_embeddings=POSITIONS,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    state = model.state_dict()
    with torch.no_grad():
        state["model.embed_tokens.weight"].copy_(torch.eye(VOCABULARY))
        state["model.layers.0.self_attn.o_proj.weight"].zero_()
        state["model.layers.0.mlp.down_proj.weight"].zero_()
        state["lm_head.weight"].zero_()  # no successor: token 0, which ends a text
        chains = ("?" + ANSWER, "~" + ascii_lowercase + "a")
        for chain in chains:
            ids = [i for character in chain for i in tokenizer(character)["input_ids"]]
            for token, successor in pairwise(ids):
                state["lm_head.weight"][successor, token] = 1
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "model")
    (folder / "chat.yaml").write_text(yaml.safe_dump({
        "run_mode": "predict", "pretrained_model_dir": "model",
        "context": {"device_target": "CPU"},
        "generation_config": {"max_new_tokens": POSITIONS},
    }))  # fmt: skip
    return "chat.yaml"


def write_long_chat(path: Path) -> int:
    """Write a conversation of two exchanges, of which the first nearly fills the model. Returns how
    many turns it has."""
    turns = ["é" * (POSITIONS // 2 - 20), "Yes.", "Really?", "Yes."]
    messages = [
        {"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(turns)
    ]
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return len(turns)
