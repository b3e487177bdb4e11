"""Pipeline stages: the layers of each, and a decoder reduced to one.

Owns the split. Invariant: the stages, in order, have every layer once; the first also has the
embedding, the last the final norm and the head (with a tied head, a replica of the embedding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.layout.layout import ShardSpec
from models.spec import DecoderConfig

if TYPE_CHECKING:
    from models.decoder import Decoder

_LAYERS = "model.layers."


@dataclass(frozen=True)
class StageSplit:
    """The stages of a pipeline, first to last."""

    layers: tuple[range, ...]
    """Layers of each stage."""
    ranks: tuple[int, ...]
    """Pipeline rank that computes each stage."""

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self.layers)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Stages of the pipeline rank, in order."""
        return tuple(stage for stage, owner in enumerate(self.ranks) if owner == rank)

    def ranks_of(self, name: str, *, tied: bool) -> tuple[int, ...]:
        """Pipeline ranks that hold the tensor `name`; the first one is its owner."""
        first, last = self.ranks[0], self.ranks[-1]
        if name.startswith("model.embed_tokens."):
            return tuple(dict.fromkeys((first, last))) if tied else (first,)
        if not name.startswith(_LAYERS):
            return (last,)
        layer = int(name[len(_LAYERS) :].partition(".")[0])
        return tuple(
            rank for layers, rank in zip(self.layers, self.ranks, strict=True) if layer in layers
        )


def stage_split(
    config: DecoderConfig,
    ranks: int,
    *,
    per_rank: int = 1,
    v_shaped: bool = False,
    counts: Sequence[int] | None = None,
) -> StageSplit:
    """Divide the layers over `ranks` pipeline ranks with `per_rank` stages each.

    Stages are on ranks 0 1 0 1 or, `v_shaped`, 0 1 1 0. `counts` are the numbers of layers of the
    stages; by default equal, or balanced by FLOPs where the layers do not divide.
    """
    stages = ranks * per_rank
    if stages > config.num_hidden_layers:
        raise ValueError(f"{config.num_hidden_layers} layers for {stages} stages")
    if counts is None:
        counts = _even_or_balanced(config, stages)
    ends = [sum(counts[: stage + 1]) for stage in range(stages)]
    if ends[-1] != config.num_hidden_layers or min(counts) < 1:
        raise ValueError(f"stages of {list(counts)} layers for {config.num_hidden_layers} layers")
    layers = tuple(range(end - count, end) for end, count in zip(ends, counts, strict=True))
    return StageSplit(layers, tuple(stage_rank(s, ranks, v_shaped=v_shaped) for s in range(stages)))


def stage_rank(stage: int, ranks: int, *, v_shaped: bool) -> int:
    """The pipeline rank that computes `stage`."""
    lap, rank = divmod(stage, ranks)
    return ranks - 1 - rank if v_shaped and lap % 2 else rank


def with_stages(
    specs: dict[str, ShardSpec], split: StageSplit, *, tied: bool
) -> dict[str, ShardSpec]:
    """`specs` with the pipeline ranks that hold each tensor."""
    return {
        name: ShardSpec(spec.tp_dim, spec.expert, spec.sharded, split.ranks_of(name, tied=tied))
        for name, spec in specs.items()
    }


def layer_weights(config: DecoderConfig) -> tuple[list[int], int]:
    """Multiplications a token of each layer, and of the head, by which stages are balanced."""
    hidden = config.hidden_size
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * hidden * heads * config.head_dim
    experts = config.experts
    weights = []
    for layer in range(config.num_hidden_layers):
        width = config.intermediate_size
        if experts is not None and experts.layers[layer]:
            width = experts.intermediate_size * (experts.experts_per_token + experts.shared_experts)
        weights.append(attention + 3 * hidden * width)
    return weights, hidden * config.vocab_size


def _even_or_balanced(config: DecoderConfig, stages: int) -> list[int]:
    layers = config.num_hidden_layers
    if layers % stages == 0:
        return [layers // stages] * stages
    weights, head = layer_weights(config)
    return balanced(weights, stages, last=head)


def balanced(weights: Sequence[int], stages: int, *, last: int = 0) -> list[int]:
    """Lengths of `stages` non-empty runs of `weights` that minimize the weight of the heaviest run.

    `last` is added to the last run. Ties are resolved by the sum of squared weights, then by longer
    earlier runs.
    """
    count = len(weights)
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    # best[k - 1][n]: of the last k runs, which begin at n: (the heaviest, the sum of squares,
    # minus the end of the first)
    best = [{n: _runs(sums[count] - sums[n] + last, (0, 0), count) for n in range(count)}]
    for k in range(2, stages + 1):
        best.append({
            start: min(
                _runs(sums[end] - sums[start], best[-1][end], end)
                for end in range(start + 1, count - k + 2)
            )
            for start in range(count - k + 1)
        })  # fmt: skip
    lengths, start = [], 0
    for k in range(stages, 0, -1):
        end = -best[k - 1][start][2]
        lengths.append(end - start)
        start = end
    return lengths


def _runs(first: int, others: Sequence[int], end: int) -> tuple[int, int, int]:
    """The key of a run of weight `first` that ends at `end`, before `others`."""
    return max(first, others[0]), first * first + others[1], -end


def keep_stage(model: Decoder, split: StageSplit, stage: int) -> Decoder:
    """Remove from a full decoder on the meta device all that `stage` does not compute, in place."""
    kept = split.layers[stage]
    for layer in range(model.config.num_hidden_layers):
        if layer not in kept:
            del model.model.layers[str(layer)]
    model.embeds, model.ends = stage == 0, stage == split.count - 1
    if not model.ends:
        del model.model.norm
        model.lm_head = None
        model.tied_head = None
    if not model.embeds and not (model.ends and model.config.tie_word_embeddings):
        del model.model.embed_tokens
    return model
