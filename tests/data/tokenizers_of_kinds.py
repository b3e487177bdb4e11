"""Tiny tokenizers of the kinds in use, which differ in what they join to a word."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

MARKS = ["<|im_start|>", "<|im_end|>", "<unk>"]
TEXT = (
    "USER: is it ? ASSISTANT: Yes No \n\n the ship slides .\n\n A ramp .\n user assistant\n\n"
    "system\n Why ? Because . \n\n\n"
) * 20


def _made(tokenizer: Any, trainer: Any) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>"
    )


def _trainer(kind: Any, **settings: Any) -> Any:
    return kind(vocab_size=400, special_tokens=MARKS, show_progress=False, **settings)


def byte_level(*, trim_offsets: bool, use_regex: bool = True) -> PreTrainedTokenizerFast:
    """Joins a space to the next word and line breaks to each other; without the regular expression
    also a full stop to the next line break."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _made(tokenizer, _trainer(trainers.BpeTrainer, initial_alphabet=alphabet))


def metaspace() -> PreTrainedTokenizerFast:
    """As SentencePiece: a space is a part of the next word, and one is put before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _made(tokenizer, _trainer(trainers.BpeTrainer))


def legacy_llama() -> PreTrainedTokenizerFast:
    """As the first Llama: the normalizer adds the space, after every special token too."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=MARKS + tokens, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>"
    )


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: no token holds a space or a line break."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _made(tokenizer, _trainer(trainers.WordPieceTrainer))


KINDS = {
    "byte-level": lambda: byte_level(trim_offsets=False),
    "byte-level, trimmed": lambda: byte_level(trim_offsets=True),
    "byte-level, all merges": lambda: byte_level(trim_offsets=True, use_regex=False),
    "metaspace": metaspace,
    "legacy llama": legacy_llama,
    "word pieces": word_piece,
}


class WithoutOffsets:
    """The same tokenizer without offsets."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)
