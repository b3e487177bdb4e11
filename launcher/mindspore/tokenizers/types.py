"""The tokenizer types of MindFormers: which files each needs, its pattern, its special tokens.

Owns these facts, and nothing of the formats. Each builder takes the files by key and returns the
parts of a tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.data.named_tokenizer import TokenizerParts, from_tokenizer_json
from launcher.errors import UserError
from launcher.mindspore.tokenizers.byte_level import (
    byte_level_bpe,
    merges_of,
    read_merges,
    read_ranks,
    read_vocabulary,
)
from launcher.mindspore.tokenizers.sentencepiece import backend_of, read_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""Also that of GLM-4."""
_QWEN2_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN2_PUBLISHED = 151_643
"""Tokens of the published vocabulary; only with it do the ids of further tokens mean something."""
_QWEN2_FURTHER_SPECIAL = (
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_QWEN2_FURTHER = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>",
)  # fmt: skip
_LLAMA3_RESERVED = 256
_GLM4_SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
_TELECHAT_SPECIAL = ("<_start>", "<_end>", "<_pad>", "<_user>", "<_bot>")
_TELECHAT_FURTHER = (
    "<_system>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip

Files = Mapping[str, Path]
"""Key of `processor.tokenizer` -> the file that it names."""


def qwen2(files: Files) -> TokenizerParts:
    """Qwen2 and Qwen2.5: vocab.json and merges.txt."""
    vocabulary = read_vocabulary(_required(files, "vocab_file", "Qwen2Tokenizer"))
    merges = read_merges(_required(files, "merges_file", "Qwen2Tokenizer"), vocabulary)
    backend = byte_level_bpe(vocabulary, merges, _QWEN2_PATTERN, normalizes=True)
    _add(backend, _QWEN2_SPECIAL)
    if len(vocabulary) == _QWEN2_PUBLISHED:
        _add(backend, _QWEN2_FURTHER_SPECIAL)
        _add(backend, _QWEN2_FURTHER, special=False)
    end = _QWEN2_SPECIAL[0]
    return TokenizerParts(backend, {"unk_token": end, "eos_token": end, "pad_token": end})


def llama(files: Files) -> TokenizerParts:
    """Llama 2: a SentencePiece file."""
    path = _required(files, "vocab_file", "LlamaTokenizer")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return TokenizerParts(backend_of(read_pieces(path)), tokens, adds_bos=True)


def llama_fast(files: Files) -> TokenizerParts:
    """A tokenizer.json, as `tokenizer_file` or `vocab_file`; the tokens at both ends are set here,
    whatever it contains."""
    path = files.get("tokenizer_file") or _required(files, "vocab_file", "LlamaTokenizerFast")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return TokenizerParts(from_tokenizer_json(path), tokens, adds_bos=True)


def llama3(files: Files) -> TokenizerParts:
    """Llama 3: a tiktoken file."""
    backend = _tiktoken(_required(files, "vocab_file", "Llama3Tokenizer"), normalizes=True)
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(_LLAMA3_RESERVED - 5)]
    _add(backend, [
        "<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>",
        "<|end_header_id|>", reserved[4], "<|eot_id|>", *reserved[5:],
    ])  # fmt: skip
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
              "pad_token": reserved[0]}  # fmt: skip
    return TokenizerParts(backend, tokens)


def glm4(files: Files) -> TokenizerParts:
    """GLM-4-9B: a tiktoken file. Every text begins with `[gMASK]<sop>`."""
    backend = _tiktoken(_required(files, "vocab_file", "ChatGLM4Tokenizer"), normalizes=False)
    _add(backend, _GLM4_SPECIAL)
    tokens = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return TokenizerParts(backend, tokens, prefix=("[gMASK]", "<sop>"))


def telechat(files: Files) -> TokenizerParts:
    """TeleChat2: a SentencePiece file, and special tokens that it may lack."""
    pieces = read_pieces(_required(files, "vocab_file", "TelechatTokenizer"))
    backend = backend_of(pieces)
    _add(backend, _TELECHAT_SPECIAL)
    _add(backend, [token for token in _TELECHAT_FURTHER if token in pieces.names])
    tokens = {"bos_token": "<_start>", "eos_token": "<_end>", "pad_token": "<_pad>",
              "unk_token": "<unk>"}  # fmt: skip
    return TokenizerParts(backend, tokens)


def _tiktoken(path: Path, *, normalizes: bool) -> Tokenizer:
    vocabulary, merges = merges_of(read_ranks(path))
    return byte_level_bpe(
        vocabulary, merges, _LLAMA3_PATTERN, normalizes=normalizes, whole_words_first=True
    )


def _add(backend: Tokenizer, tokens: Sequence[str], *, special: bool = True) -> None:
    """Add those of `tokens` that are new, in order, and never split any of them."""
    from tokenizers import AddedToken

    backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in tokens])


def _required(files: Files, key: str, kind: str) -> Path:
    if key not in files:
        raise UserError(
            f"processor.tokenizer.{key} is missing", rule=f"a {kind} needs it",
            advice=f"Set processor.tokenizer.{key}, or pretrained_model_dir to a Hugging Face "
            "directory with a tokenizer",
        )  # fmt: skip
    return files[key]
