"""The sizes of the models and batches: those that say something about a GPU, and tiny ones.

Owns every number that depends on `--tiny`. The tiny ones run the same code in seconds on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LLAMA_1B: dict[str, Any] = {
    "type": "LlamaConfig", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B: dict[str, Any] = {
    **LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_4_LAYERS: dict[str, Any] = {
    **LLAMA_1B, "num_hidden_layers": 4, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS_6_LAYERS: dict[str, Any] = {
    "type": "Qwen3MoeConfig", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS_4_LAYERS: dict[str, Any] = {
    **EXPERTS_6_LAYERS, "num_hidden_layers": 4, "vocab_size": 32000, "num_experts": 32,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256,
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A model, and the batch of one step."""

    model: dict[str, Any]
    """`model_config`."""
    length: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All sizes of one run."""

    small: Training
    """Of the cases that compare bits."""
    small_experts: Training
    train_1b: Training
    train_8b: Training
    experts: Training
    attention_length: int
    """Of the rows whose kernels are asked for."""
    heads: tuple[int, int, int]
    """Of these: heads, KV heads and their size."""
    documents_length: int
    """Of the row of seven documents."""
    warm_up: int
    """Steps before the measured ones; compiling is in them."""
    steps: int
    """Measured steps."""
    compiler: bool | str
    """`compile` where layers are compiled: of the tiny ones without a compiler for C++."""
    repeats: int
    """Of the case that looks for a race."""
    prompt: int
    new_tokens: int
    batches: tuple[int, ...]
    """Prompts that are continued together."""


FULL = Sizes(
    small=Training(LLAMA_4_LAYERS, length=2048, rows=2),
    small_experts=Training(EXPERTS_4_LAYERS, length=2048, rows=2),
    train_1b=Training(LLAMA_1B, length=4096, rows=8),
    train_8b=Training(LLAMA_8B, length=8192, rows=1),
    experts=Training(EXPERTS_6_LAYERS, length=8192, rows=1),
    attention_length=8192, heads=(32, 8, 128), documents_length=4096, warm_up=3, steps=8,
    compiler=True, repeats=20, prompt=512, new_tokens=128, batches=(1, 8),
)  # fmt: skip


def _tiny(model: dict[str, Any], **more: Any) -> Training:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes = model | _TINY | (experts if "num_experts" in model else {})
    return Training(sizes | more, length=32, rows=2)


TINY = Sizes(
    small=_tiny(LLAMA_4_LAYERS), small_experts=_tiny(EXPERTS_4_LAYERS), train_1b=_tiny(LLAMA_1B),
    train_8b=_tiny(LLAMA_8B), experts=_tiny(EXPERTS_6_LAYERS), attention_length=64,
    heads=(4, 2, 16), documents_length=64, warm_up=1, steps=2, compiler="eager", repeats=2,
    prompt=8, new_tokens=4, batches=(1, 2),
)  # fmt: skip
