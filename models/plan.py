"""The parallel plan: which dim of which parameter tensor parallelism shards, and what is an expert.

Owns what the rules of a family (`models.spec.Rule`) mean for a layout. Torch-free. Inside a
*region* (attention, MLP, head) each rank computes with its own heads or columns; ranks communicate
only where a region is entered and left. An unsharded parameter inside a region gets only a part of
its gradient on each rank: `is_partial`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from launcher.layout.layout import REPLICATED, ShardSpec
from models.spec import DecoderConfig, Rule

EMBEDDING = "model.embed_tokens.weight"
_LAYERS = "model.layers."


def kind_of(name: str) -> str:
    """The name of a tensor without the prefix of its layer; outside of layers, the full name."""
    return name.removeprefix(_LAYERS).partition(".")[2] if name.startswith(_LAYERS) else name


def rule_of(name: str, parameters: Mapping[str, Rule]) -> Rule:
    """The rule for the tensor `name`. Raises LookupError if there is none."""
    rule = parameters.get(kind_of(name))
    if rule is None:
        raise LookupError(
            f"no rule for {name}: list {kind_of(name)!r} in the `parameters` of its family, in "
            "models/families"
        )
    return rule


def shard_specs(
    names: Iterable[str], config: DecoderConfig, *, tp: int, vocab_emb_dp: bool,
    otherwise: ShardSpec | None = None,
) -> dict[str, ShardSpec]:  # fmt: skip
    """How each named tensor of the decoder is sharded; pipeline stages are added elsewhere.

    `vocab_emb_dp` replicates the embedding over tensor-parallel ranks. `otherwise`: the spec of
    tensors in files that the model does not have; None: LookupError is raised for them.
    """
    return {
        name: otherwise if otherwise and kind_of(name) not in config.parameters
        else _shard_spec(name, config, tp, vocab_emb_dp)
        for name in names
    }  # fmt: skip


def _shard_spec(name: str, config: DecoderConfig, tp: int, vocab_emb_dp: bool) -> ShardSpec:
    rule = rule_of(name, config.parameters)
    if rule.is_buffer:
        return REPLICATED
    replicated = (vocab_emb_dp and name == EMBEDDING) or (
        rule.kv_heads and repeats_kv_heads(config, tp)
    )
    return ShardSpec(tp_dim=None if replicated else rule.tp_dim, expert=rule.expert)


def repeats_kv_heads(config: DecoderConfig, tp: int) -> bool:
    """Whether there are fewer KV heads than ranks: each rank then holds all of them and computes
    those that its query heads need."""
    return config.latent is None and config.num_key_value_heads % tp != 0


def is_partial(
    name: str, shard: ShardSpec, config: DecoderConfig, *, tp: int, sequence_parallel: bool,
    tied_unsharded_embedding: bool,
) -> bool:  # fmt: skip
    """Whether the gradient of `name` is partial on each tensor-parallel rank, to be all-reduced.

    These are unsharded tensors inside a region; norms between regions with sequence parallelism;
    and an unsharded embedding that is also the head, of which each rank uses its own rows.
    """
    if tp == 1 or shard.tp_dim is not None:
        return False
    if name == EMBEDDING:
        return tied_unsharded_embedding
    return sequence_parallel or rule_of(name, config.parameters).in_region
