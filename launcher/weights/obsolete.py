"""Obsolete buffers: tensors of old checkpoints that are not weights and that models now derive.

Owns the table of them, by name, shape and dtype. Older versions of transformers, and fairseq before
it, saved masks, rotary tables and version numbers. Buffers that a current class declares
non-persistent, or ignores, are handled by `models.build.ignorable`. A bias is never obsolete: it
has one dim, a mask has two or more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from launcher.layout.box import Shape


class Obsolete(NamedTuple):
    """One kind of obsolete buffer."""

    names: re.Pattern[str]
    fits: Callable[[Shape, str], bool]
    """Whether (shape, dtype of safetensors) fit."""
    reason: str


def _is_mask(shape: Shape, dtype: str) -> bool:
    """[1, 1, n, n], or a boolean [n, n]."""
    square = len(shape) >= 2 and shape[-1] == shape[-2]
    return square and (shape[:-2] == (1, 1) or (len(shape) == 2 and dtype in ("BOOL", "U8")))


def _is_number(shape: Shape, dtype: str) -> bool:
    return all(size == 1 for size in shape)


def _is_table(shape: Shape, dtype: str) -> bool:
    return len(shape) >= 2 and dtype not in _INTEGERS


def _is_frequencies(shape: Shape, dtype: str) -> bool:
    return len(shape) == 1 and dtype not in _INTEGERS


def _is_integer(shape: Shape, dtype: str) -> bool:
    return dtype in _INTEGERS


_INTEGERS = ("I64", "I32", "I16", "I8", "U8", "U64", "U32", "U16")
_ATTENTION = r"(?:^|\.)(?:attn|attention|self_attn|self_attention|crossattention)\."
_ROTARY = r"(?:^|\.)(?:rotary_emb|rotary_pos_emb|rotary_embed|rotary|rope)\."

OBSOLETE: tuple[Obsolete, ...] = (
    Obsolete(re.compile(_ATTENTION + r"(?:bias|causal_mask)$"), _is_mask,
             "the causal mask: gpt2, gpt_neo, gptj, gpt_neox, gpt_bigcode, codegen"),
    Obsolete(re.compile(_ATTENTION + r"masked_bias$"), _is_number,
             "the value of masked scores, -1e4 or -1e9: the same families"),
    Obsolete(re.compile(_ATTENTION + r"embed_positions$"), _is_table,
             "the sines and cosines of positions: gptj, codegen"),
    Obsolete(re.compile(r"(?:^|\.)(?:original_)?inv_freq$"), _is_frequencies,
             "the frequencies of rotary positions: llama and all after it"),
    Obsolete(re.compile(_ROTARY + r"(?:cos|sin)(?:_cached)?$"), _is_table,
             "the cosines and sines of rotary positions: llama, gpt_neox, falcon, persimmon, phi"),
    Obsolete(re.compile(r"(?:^|\.)(?:encoder|decoder)\.version$"), _is_number,
             "the version of fairseq's state: opt, bart, xglm"),
    Obsolete(re.compile(r"(?:^|\.)embed_positions\._float_tensor$"), _is_number,
             "the dtype of fairseq's table of positions: xglm"),
    Obsolete(re.compile(r"(?:^|\.)embed_positions\.weights$"), _is_table,
             "the sines and cosines of positions: xglm, of fairseq"),
    Obsolete(re.compile(r"(?:^|\.)(?:position_ids|token_type_ids)$"), _is_integer,
             "the numbers 0, 1, 2, ... of positions, or zeros: bert, gpt, clip"),
)  # fmt: skip


def has_obsolete_name(name: str) -> bool:
    """Whether a tensor has the name of an obsolete buffer; its shape may still show that it is a
    weight."""
    return any(kind.names.search(name) for kind in OBSOLETE)


def is_obsolete(name: str, shape: Shape, dtype: str) -> bool:
    """Whether a tensor of a checkpoint is an obsolete buffer. `dtype`: its safetensors name."""
    return any(kind.names.search(name) and kind.fits(shape, dtype) for kind in OBSOLETE)
