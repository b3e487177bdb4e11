"""Stages: every layer once, optimally balanced, and decoders reduced to one stage."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.layout.layout import ShardSpec
from models.decoder import Decoder
from models.spec import DecoderConfig
from models.stage import (
    balanced,
    keep_stage,
    layer_weights,
    stage_rank,
    stage_split,
    with_stages,
)
from tests.models.tiny import dense_spec, experts_spec, tokens


def config_of(layers: int, *, tied: bool = False) -> DecoderConfig:
    spec = dense_spec(type="Qwen3Config", num_layers=layers, head_dim=16, tie_word_embeddings=tied)
    assert spec.decoder is not None
    return spec.decoder


CONFIGS = {layers: config_of(layers) for layers in range(1, 17)}


@st.composite
def numbers(draw: st.DrawFn) -> tuple[int, int, int, bool]:
    """Layers, ranks, stages a rank, whether V-shaped; at least a layer a stage."""
    ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    layers = draw(st.integers(ranks * per_rank, 16))
    return layers, ranks, per_rank, draw(st.booleans())


@given(numbers())
def test_every_layer_is_in_one_stage_in_order(given: tuple[int, int, int, bool]) -> None:
    layers, ranks, per_rank, v_shaped = given
    split = stage_split(CONFIGS[layers], ranks, per_rank=per_rank, v_shaped=v_shaped)
    assert [layer for stage in split.layers for layer in stage] == list(range(layers))
    assert all(len(stage) > 0 for stage in split.layers)
    assert split.count == ranks * per_rank
    sizes = {len(stage) for stage in split.layers}
    assert layers % split.count or len(sizes) == 1


@given(numbers())
def test_every_rank_has_equally_many_stages(given: tuple[int, int, int, bool]) -> None:
    layers, ranks, per_rank, v_shaped = given
    split = stage_split(CONFIGS[layers], ranks, per_rank=per_rank, v_shaped=v_shaped)
    found = [split.stages_of(rank) for rank in range(ranks)]
    assert [len(stages) for stages in found] == [per_rank] * ranks
    assert sorted(stage for stages in found for stage in stages) == list(range(split.count))
    for before, after in pairwise(split.ranks):
        if v_shaped:
            assert abs(before - after) <= 1
        else:
            assert after == (before + 1) % ranks


@pytest.mark.parametrize(
    ("v_shaped", "ranks"), [(False, [0, 1, 2, 0, 1, 2, 0, 1]), (True, [0, 1, 2, 2, 1, 0, 0, 1])]
)
def test_stage_ranks(v_shaped: bool, ranks: list[int]) -> None:
    assert [stage_rank(stage, 3, v_shaped=v_shaped) for stage in range(8)] == ranks


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=9).flatmap(
        lambda weights: st.tuples(st.just(weights), st.integers(1, len(weights)))
    ),
    st.integers(0, 40),
)
def test_balanced_minimizes_the_heaviest_stage(given: tuple[list[int], int], last: int) -> None:
    weights, stages = given
    lengths = balanced(weights, stages, last=last)
    assert sum(lengths) == len(weights)
    assert len(lengths) == stages
    assert min(lengths) >= 1
    splits = [
        [end - start for start, end in pairwise((0, *borders, len(weights)))]
        for borders in combinations(range(1, len(weights)), stages - 1)
    ]
    assert heaviest(weights, lengths, last) == min(heaviest(weights, s, last) for s in splits)


def heaviest(weights: list[int], lengths: list[int], last: int) -> int:
    start, runs = 0, []
    for length in lengths:
        runs.append(sum(weights[start : start + length]))
        start += length
    return max([*runs[:-1], runs[-1] + last])


@pytest.mark.parametrize(
    ("weights", "stages", "last", "lengths"),
    [
        ([1] * 7, 3, 0, [3, 2, 2]),
        ([1] * 7, 3, 2, [3, 3, 1]),
        ([5, 1, 1, 1, 1], 2, 0, [1, 4]),
    ],
)
def test_among_equals_earlier_runs_are_longer(
    weights: list[int], stages: int, last: int, lengths: list[int]
) -> None:
    assert balanced(weights, stages, last=last) == lengths


def test_a_large_vocabulary_gives_the_last_stage_fewer_layers() -> None:
    spec = dense_spec(type="Qwen3Config", num_layers=7, head_dim=16, vocab_size=1000)
    assert spec.decoder is not None
    _, head = layer_weights(spec.decoder)
    assert head == 64 * 1000
    split = stage_split(spec.decoder, 3)
    assert [len(stage) for stage in split.layers] == [3, 3, 1]


def test_layers_with_experts_weigh_the_experts_a_token_chooses() -> None:
    config = experts_spec("qwen3_moe").decoder
    assert config is not None
    weights, _ = layer_weights(config)
    attention = 2 * 64 * (4 + 2) * 24
    sparse, dense = attention + 3 * 64 * 32 * 3, attention + 3 * 64 * 80
    assert weights == [sparse, dense, sparse]


@pytest.mark.parametrize("counts", [[4, 3], [8, 0], [9, -1], [8], [4, 2, 2]])
def test_counts_that_do_not_sum_to_the_layers_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError):
        stage_split(CONFIGS[8], 2, counts=counts)


def test_given_counts_are_used() -> None:
    split = stage_split(CONFIGS[8], 2, per_rank=2, v_shaped=True, counts=[3, 2, 2, 1])
    assert split.layers == (range(3), range(3, 5), range(5, 7), range(7, 8))
    assert split.ranks == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("v_shaped", "tied", "ranks"),
    [(False, False, (0,)), (False, True, (0, 1)), (True, False, (0,)), (True, True, (0,))],
)
def test_ranks_of_tensors(v_shaped: bool, tied: bool, ranks: tuple[int, ...]) -> None:
    split = stage_split(CONFIGS[8], 2, per_rank=2, v_shaped=v_shaped)
    ends = split.ranks[-1]
    names = {
        "model.embed_tokens.weight": ranks,
        "model.layers.0.mlp.up_proj.weight": (0,),
        "model.layers.3.self_attn.q_proj.bias": (1,),
        "model.layers.7.input_layernorm.weight": (ends,),
        "model.norm.weight": (ends,),
        "lm_head.weight": (ends,),
    }
    specs = with_stages({name: ShardSpec(tp_dim=0) for name in names}, split, tied=tied)
    assert {name: split.ranks_of(name, tied=tied) for name in names} == names
    for name, found in names.items():
        assert specs[name] == ShardSpec(
            tp_dim=0, expert=specs[name].expert, sharded=specs[name].sharded, stages=found
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("counts", [(3, 2, 2, 1), (2, 2, 2, 2)])
def test_stages_hold_every_parameter_once_and_compute_the_same(
    tied: bool, counts: tuple[int, ...]
) -> None:
    whole = Decoder(config_of(8, tied=tied))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(0.0, 0.2)
    split = stage_split(whole.config, 4, counts=counts)
    stages = [keep_stage(copy.deepcopy(whole), split, stage) for stage in range(4)]
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    copies = ["model.embed_tokens.weight"] if tied else []
    assert sorted(names) == sorted([name for name, _ in whole.named_parameters()] + copies)
    assert [(stage.embeds, stage.ends) for stage in stages] == [
        (True, False), (False, False), (False, False), (False, True),
    ]  # fmt: skip
    states = tokens(2, 10)
    for stage in stages:
        states = stage(states)
        assert not states._is_view()
    assert torch.equal(states, whole(tokens(2, 10)))


def test_keep_stage_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Decoder(config_of(4))
    split = stage_split(model.config, 2)
    stage = keep_stage(model, split, 1)
    assert list(stage.model.layers) == ["2", "3"]
    assert all(parameter.is_meta for parameter in stage.parameters())
