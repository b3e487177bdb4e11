"""Specifics of DeepSeek-V3: groups of experts, score correction, latent attention. (The full model
is compared with transformers in test_moe.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.build import build_model, initialize, materialize
from models.deepseek import LatentAttention
from models.moe import Router
from models.rope import rotate, score_factor
from models.spec import ExpertsConfig
from tests.models.tiny import experts_spec, pair, tokens


def router(**given: object) -> Router:
    """12 experts in 4 groups of 3; a token takes 2, out of 2 groups; scores are set by hand."""
    config = ExpertsConfig(**{
        "num_experts": 12, "experts_per_token": 2, "intermediate_size": 8, "layers": (True,),
        "scoring": "sigmoid", "groups": 4, "groups_per_token": 2, "routed_scaling_factor": 2.0,
    } | given)  # fmt: skip
    made = Router(12, config)
    with torch.no_grad():
        made.weight.copy_(torch.eye(12))
    return made


def scored(**scores: float) -> Tensor:
    """A token whose expert `e<n>` has this score; 0.1 for all others."""
    values = torch.full((1, 12), 0.1)
    for name, score in scores.items():
        values[0, int(name[1:])] = score
    return values.logit()


def test_the_best_expert_of_a_poor_group_is_not_chosen() -> None:
    token = scored(e0=0.9, e3=0.6, e4=0.6, e6=0.5, e7=0.55)
    weights, chosen, _ = router()(token)
    assert sorted(chosen[0].tolist()) == [3, 4]  # groups 1 (1.2) and 2 (1.05) beat group 0 (1.0)
    torch.testing.assert_close(weights.sum(), torch.tensor(2.0))
    _, chosen, _ = router(groups_per_token=3)(token)
    assert 0 in chosen[0].tolist()


def test_the_correction_affects_only_the_choice() -> None:
    token = scored(e3=0.6, e4=0.5)
    made = router(norm_topk_prob=False)
    made.e_score_correction_bias[9:11] = 5.0
    weights, chosen, probabilities = made(token)
    assert sorted(chosen[0].tolist()) == [9, 10]
    torch.testing.assert_close(weights, torch.full((1, 2), 0.2))
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))


def test_the_router_computes_in_float32() -> None:
    """Scores that are equal in bfloat16."""
    made = router().bfloat16()
    token = torch.zeros(1, 12, dtype=torch.bfloat16)
    token[0, 3:5] = torch.tensor([4.0, 4.03125])
    weights, _, probabilities = made(token)
    assert weights.dtype == probabilities.dtype == torch.float32
    assert probabilities[0, 4] > probabilities[0, 3]


def test_interleaved_rotation_equals_rotation_of_halves_reordered() -> None:
    states = torch.randn(1, 2, 5, 8)
    angles = torch.randn(1, 1, 5, 4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert torch.equal(
        rotate(states, angles.cos(), angles.sin(), interleaved=True),
        rotate(states[..., order], angles.cos(), angles.sin()),
    )


SCALINGS = {
    "plain": None,
    "linear": {"rope_type": "linear", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn without": {"rope_type": "yarn", "factor": 40.0},
    "not stretched": {"rope_type": "yarn", "factor": 1.0, "mscale_all_dim": 1.0},
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scores_are_scaled_as_in_transformers(name: str) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    expected = yarn_apply_mscale(SCALINGS[name] or {"rope_type": "default"}, 1.0)
    assert score_factor(SCALINGS[name]) == pytest.approx(expected)


def test_the_heads_of_latent_attention_sum() -> None:
    """Half the heads, with replicated low-rank projections: half of the sum."""
    import copy

    own, _ = pair(experts_spec("deepseek_v3"))
    attention = own.model.layers["1"].self_attn
    assert isinstance(attention, LatentAttention)
    inputs: list[tuple[Tensor, object]] = []
    attention.register_forward_pre_hook(lambda _module, given: inputs.append(given))
    whole = []
    attention.register_forward_hook(lambda _module, _given, output: whole.append(output))
    own(tokens(2, 8))
    partial_saves = []
    for half in (0, 1):
        piece = copy.deepcopy(attention)
        for name in ("q_b_proj", "kv_b_proj"):
            weight = getattr(piece, name).weight
            weight.data = weight.data.chunk(2)[half]
        piece.o_proj.weight.data = piece.o_proj.weight.data.chunk(2, dim=1)[half]
        partial_saves.append(LatentAttention.forward(piece, *inputs[0]))
    torch.testing.assert_close(sum(partial_saves), whole[0])


def test_the_correction_survives_the_meta_device() -> None:
    spec = experts_spec("deepseek_v3")
    model = build_model(spec, dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert model.state_dict()[name].is_meta
    materialize(model, "cpu")
    correction = model.state_dict()[name]
    assert correction.dtype == torch.float32
    assert not correction.any()
    correction += 1
    initialize(model, spec, seed=0)
    assert not model.state_dict()[name].any()
