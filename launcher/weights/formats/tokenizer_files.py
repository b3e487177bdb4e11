"""The files of a Hugging Face tokenizer."""

from __future__ import annotations

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""A directory with one of these has a tokenizer."""
TOKENIZER_EXTRA_FILES = (
    "special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""Files that a tokenizer may have besides."""
