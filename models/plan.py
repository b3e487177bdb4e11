"""The parallel plan: which dim of which parameter tensor parallelism cuts, and what is an expert.

Owns what the rules of a family (`models.spec.Rule`) mean for a layout. Torch-free. Inside a
*region* (attention, MLP, head) each rank works on its own heads or columns; the region is entered
once and left once, and nothing in between talks to other ranks. A parameter that
is not cut inside a region gets only a part of its gradient on each rank: `is_partial`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from launcher.layout.layout import REPLICATED, ShardSpec
from models.spec import DecoderConfig, Rule

EMBEDDING = "model.embed_tokens.weight"
_LAYERS = "model.layers."


def kind_of(name: str) -> str:
    """The name of a tensor below its layer: that of its kind. Outside of layers, the name."""
    return name.removeprefix(_LAYERS).partition(".")[2] if name.startswith(_LAYERS) else name


def rule_of(name: str, parameters: Mapping[str, Rule]) -> Rule:
    """The rule for the tensor `name`. Raises LookupError where there is none."""
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
    """How each named tensor of the decoder is cut; pipeline stages are added elsewhere.

    `vocab_emb_dp` keeps all of the embedding on every tensor-parallel rank. `otherwise`: how
    tensors of files are cut that the model does not have; None: LookupError is raised for them.
    """
    return {
        name: otherwise if otherwise and kind_of(name) not in config.parameters
        else _cut(name, config, tp, vocab_emb_dp)
        for name in names
    }  # fmt: skip


def _cut(name: str, config: DecoderConfig, tp: int, vocab_emb_dp: bool) -> ShardSpec:
    rule = rule_of(name, config.parameters)
    if rule.is_buffer:
        return REPLICATED
    in_full = (vocab_emb_dp and name == EMBEDDING) or (
        rule.kv_heads and repeats_kv_heads(config, tp)
    )
    return ShardSpec(tp_dim=None if in_full else rule.tp_dim, expert=rule.expert)


def repeats_kv_heads(config: DecoderConfig, tp: int) -> bool:
    """Whether there are fewer key/value heads than ranks: each rank then holds all of them and
    computes the ones its query heads need."""
    return config.latent is None and config.num_key_value_heads % tp != 0


def is_partial(
    name: str, cut: ShardSpec, config: DecoderConfig, *, tp: int, sequence_parallel: bool,
    tied_whole_embedding: bool,
) -> bool:  # fmt: skip
    """Whether each tensor-parallel rank has only a part of the gradient of `name`, to be added up.

    So it is with a tensor that is not cut inside a region; with the norms between regions when the
    sequence is cut there; and with an embedding that is not cut and also the head, of which each
    rank uses its own rows.
    """
    if tp == 1 or cut.tp_dim is not None:
        return False
    if name == EMBEDDING:
        return tied_whole_embedding
    return sequence_parallel or rule_of(name, config.parameters).in_region
