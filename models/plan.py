"""The parallel plan: which dim of which parameter tensor parallelism cuts, and what is an expert.

Owns one table for all decoders of ours, by the name a parameter ends in; a family adds rows, not
code. Torch-free. What the cuts mean for the computation: inside a *region* (attention, MLP, head)
each rank works on its own heads or columns; the region is entered once and left once, and nothing
in between talks to other ranks. A parameter that is whole inside a region sees only a part of the
gradient on each rank: `is_partial`.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.layout.layout import REPLICATED, ShardSpec
from models.spec import DecoderConfig

REGIONS = ("self_attn", "mlp", "block_sparse_moe")
"""Children of a layer that are regions; the head is one too."""

_DIMS = {
    "q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1,
    "q_b_proj": 0, "kv_b_proj": 0,
    "gate_proj": 0, "up_proj": 0, "down_proj": 1,
    "lm_head": 0,
}  # fmt: skip
"""Module -> dim of its weight that is cut. Dim 0 is what comes out (heads, columns), dim 1 what
goes in; a bias of the former is cut too, one of the latter is added once."""

_EXPERT_DIMS = {"gate_proj": 1, "up_proj": 1, "down_proj": 2}
"""Stacked expert parameter [experts, out, in] -> dim that is cut."""

_BUFFERS = ("e_score_correction_bias",)
EMBEDDING = "model.embed_tokens.weight"


def shard_specs(
    names: Iterable[str], config: DecoderConfig, *, tp: int, vocab_emb_dp: bool
) -> dict[str, ShardSpec]:
    """How each named tensor of the decoder is cut; pipeline stages are added elsewhere.

    `vocab_emb_dp` keeps the embedding whole on every tensor-parallel rank.
    """
    return {name: _cut(name, config, tp, vocab_emb_dp) for name in names}


def _cut(name: str, config: DecoderConfig, tp: int, vocab_emb_dp: bool) -> ShardSpec:
    if name.endswith(_BUFFERS):
        return REPLICATED
    if name == EMBEDDING:
        return ShardSpec(tp_dim=None if vocab_emb_dp else 0)
    parts = name.split(".")
    if parts[-2] == "experts":
        return ShardSpec(tp_dim=_EXPERT_DIMS[parts[-1]], expert=True)
    dim = _DIMS.get(parts[-2])
    if dim is None or (parts[-1] == "bias" and dim == 1):
        return ShardSpec()
    if parts[-2] in ("k_proj", "v_proj") and repeats_kv_heads(config, tp):
        return ShardSpec()
    return ShardSpec(tp_dim=dim)


def repeats_kv_heads(config: DecoderConfig, tp: int) -> bool:
    """Whether there are fewer key/value heads than ranks: each rank then holds all of them and
    computes the ones its query heads need."""
    return config.latent is None and config.num_key_value_heads % tp != 0


def in_region(name: str) -> bool:
    """Whether a tensor is used inside a region."""
    parts = name.split(".")
    return name.startswith("lm_head.") or any(part in REGIONS for part in parts)


def is_partial(
    name: str, cut: ShardSpec, *, tp: int, sequence_parallel: bool, tied_whole_embedding: bool
) -> bool:
    """Whether each tensor-parallel rank has only a part of the gradient of `name`, to be added up.

    So it is with a tensor that is whole inside a region; with the norms between regions when the
    sequence is cut there; and with an embedding that is whole and also the head, of which each rank
    uses its own rows.
    """
    if tp == 1 or cut.tp_dim is not None:
        return False
    if name == EMBEDDING:
        return tied_whole_embedding
    return in_region(name) or sequence_parallel
