"""A small real tokenizer, and a short way to build a dataset from real files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.data.rows import RowDataset

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def train_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "The ship slides down the slipway. What is a slipway? It is a ramp for ships.\n" * 20
    tokenizer.train_from_iterator([text], trainer)
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"} | settings
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Without a chat template."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With ChatML, whose marks are single tokens."""
    made = train_tokenizer()
    made.chat_template = CHATML
    return made


Build = Callable[..., RowDataset]


@pytest.fixture
def logged() -> list[str]:
    """The lines that the `build` fixture's datasets logged."""
    return []


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, logged: list[str]) -> Build:
    """build(seq_length=8, packing=True, tokenizer=..., **data_loader settings)."""

    def make(*, seq_length: int = 8, packing: bool = True, **settings: Any) -> RowDataset:
        used = settings.pop("tokenizer", tokenizer)
        cache_dir = settings.pop("cache_dir", tmp_path / "cache")
        options = {"on_progress": settings.pop("on_progress")} if "on_progress" in settings else {}
        strategy = settings.pop("packing_strategy", None)
        section = DatasetSection(
            data_loader=DataLoaderSection(**settings), packing=packing, packing_strategy=strategy
        )
        return build_dataset(
            section,
            tokenizer=used,
            seq_length=seq_length,
            cache_dir=cache_dir,
            once=lambda prepare: prepare(),
            log=logged.append,
            **options,
        )

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Seven documents of different lengths, in folders."""
    folder = tmp_path / "corpus"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, length in enumerate((1, 40, 7, 3, 90, 2, 15)):
        where = folder if number % 2 else folder / "deep" / "er"
        words = " ".join(f"ship{number}x{word}" for word in range(length))
        (where / f"{number}.txt").write_text(words)
    return folder
