"""Every parameter has a rule of its family; one without is an error when the model is built."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from launcher.builders.layout import model_layout
from launcher.layout.mesh import Mesh
from models.build import build_model, initialize, initialize_shard
from models.families import DECODERS
from models.spec import ModelSpec
from tests.models.tiny import EXPERTS, dense_spec, experts_spec


def without(spec: ModelSpec, kind: str) -> ModelSpec:
    """`spec`, its family without the rule for a kind of parameter."""
    assert spec.decoder is not None
    rules = {name: rule for name, rule in spec.decoder.parameters.items() if name != kind}
    return replace(spec, decoder=replace(spec.decoder, parameters=rules))


@pytest.mark.parametrize(
    "kind", ["self_attn.q_proj.weight", "mlp.experts.down_proj", "lm_head.weight",
             "mlp.gate.e_score_correction_bias"],
)  # fmt: skip
def test_a_parameter_without_a_rule_raises_when_the_model_is_built(kind: str) -> None:
    spec = experts_spec("deepseek_v3", q_lora_rank=None)
    model = build_model(spec, dtype=torch.float32)
    broken = without(spec, kind)
    with pytest.raises(LookupError, match=f"no rule for .*{kind}: list '{kind}' in the `param"):
        build_model(broken, dtype=torch.float32)
    with pytest.raises(LookupError, match=f"no rule for .*{kind}"):
        model_layout(model, broken, Mesh(tp=2), split=None, vocab_emb_dp=True)


@pytest.mark.parametrize("family", DECODERS)
def test_the_rules_of_a_family_fit_its_parameters(family: str) -> None:
    """Sharded dims exist; experts are stacks; biases that are added once are not sharded."""
    given = {"type": DECODERS[family].config_class}
    spec = experts_spec(family) if family in EXPERTS else dense_spec(**given)
    assert spec.decoder is not None
    shapes = {
        n: tuple(t.shape) for n, t in build_model(spec, dtype=torch.float32).state_dict().items()
    }
    for kind, rule in spec.decoder.parameters.items():
        for name in (name for name in shapes if name.endswith(kind)):
            assert rule.tp_dim is None or rule.tp_dim < len(shapes[name])
            if rule.expert:
                assert spec.decoder.experts is not None
                assert shapes[name][0] == spec.decoder.experts.num_experts
        assert not (rule.added_once and rule.tp_dim is not None)
        assert bool(rule.entry) <= rule.expert


def test_only_drawn_vectors_are_initialized_randomly() -> None:
    spec = experts_spec("gpt_oss")
    model = build_model(spec, dtype=torch.float32, device="cpu")
    initialize(model, spec, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "router.bias")):
            assert len(parameter.unique()) == len(parameter), name
            shape, part = tuple(parameter.shape), (len(parameter) - 1,)
            values = initialize_shard(name, shape, (1,), part, spec, 3)
            assert torch.equal(values, parameter[1:]), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
