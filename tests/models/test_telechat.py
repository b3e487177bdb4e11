"""TeleChat2 against a reference in plain torch, by the names and layouts of its files.

Transformers has no class for the family: the reference follows the description of the published
files (fused key_value rows by KV head, biases on `dense` and `down_proj`, half against half
rotation) and shares nothing with the decoder.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.layout.box import full_box
from launcher.layout.shard import Shard
from launcher.weights.tensor_mapping import mapped
from models.build import build_model, hf_directory_files, mappings_of, materialize, tied_names
from models.decoder import Decoder
from models.families import ModelSpec, model_spec
from tests.models.tiny import WITH_CODE_OF_THEIR_OWN, problems_of

CONFIG = WITH_CODE_OF_THEIR_OWN["telechat"]


def tensors_of(config: dict[str, Any], *, biases: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a published directory, by its names."""
    hidden, inner, heads = config["hidden_size"], config["ffn_hidden_size"], config["n_head"]
    size, groups = hidden // heads, config["num_key_value_heads"] or heads
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (config["vocab_size"], hidden),
        "transformer.ln_f.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["n_layer"]):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attention.query.weight": (hidden, hidden),
            "self_attention.key_value.weight": (2 * groups * size, hidden),
            "self_attention.dense.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }  # fmt: skip
        if experts := config.get("num_experts"):
            one = {n: s for n, s in of_layer.items() if n.startswith("mlp.")}
            one |= {"mlp.down_proj.bias": (hidden,)} if biases else {}
            of_layer = {n: s for n, s in of_layer.items() if n not in one}
            of_layer["mlp.router.weight"] = (experts, hidden)
            for expert in range(experts):
                place = f"mlp.local_experts.{expert}."
                of_layer |= {n.replace("mlp.", place): shape for n, shape in one.items()}
            of_layer |= {"self_attention.dense.bias": (hidden,)} if biases else {}
        elif biases:
            of_layer |= {"self_attention.dense.bias": (hidden,), "mlp.down_proj.bias": (hidden,)}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in of_layer.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def reference(config: dict[str, Any], held: dict[str, Tensor], ids: Tensor, base: float) -> Tensor:
    """Logits [rows, length, vocabulary], in plain torch."""
    heads, size = config["n_head"], config["hidden_size"] // config["n_head"]
    groups = config["num_key_value_heads"] or heads
    rows, length = ids.shape

    def norm(states: Tensor, name: str) -> Tensor:
        mean = states.pow(2).mean(-1, keepdim=True)
        return held[name] * states * torch.rsqrt(mean + config["layer_norm_epsilon"])

    def turned(states: Tensor) -> Tensor:
        powers = base ** (torch.arange(0, size, 2) / size)
        angles = torch.arange(length)[:, None] / powers
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    states = held["transformer.word_embeddings.weight"][ids]
    for layer in range(config["n_layer"]):
        part = {
            k.split(".", 3)[3]: t
            for k, t in held.items()
            if k.startswith(f"transformer.h.{layer}.")
        }
        name = f"transformer.h.{layer}."
        normed = norm(states, name + "input_layernorm.weight")
        query = (normed @ part["self_attention.query.weight"].T).view(rows, length, heads, size)
        mixed = normed @ part["self_attention.key_value.weight"].T
        key, value = mixed.view(rows, length, groups, 2, size).unbind(3)
        query, key = turned(query), turned(key)
        key, value = (t.repeat_interleave(heads // groups, dim=2) for t in (key, value))
        scores = torch.einsum("rqhd,rkhd->rhqk", query, key) / math.sqrt(size)
        scores = scores + torch.full((length, length), -math.inf).triu(1)
        mixed = torch.einsum("rhqk,rkhd->rqhd", scores.softmax(-1), value).flatten(2)
        bias = part.get("self_attention.dense.bias")
        states = states + F.linear(mixed, part["self_attention.dense.weight"], bias)
        normed = norm(states, name + "post_attention_layernorm.weight")
        states = states + mlp_of(config, part, normed)
    head = held.get("lm_head.weight", held["transformer.word_embeddings.weight"])
    return norm(states, "transformer.ln_f.weight") @ head.T


def mlp_of(config: dict[str, Any], part: dict[str, Tensor], normed: Tensor) -> Tensor:
    """The MLP, or the sum over the experts of a token, by its normalized top-k probabilities."""

    def gated(place: str) -> Tensor:
        gate, up = (normed @ part[f"{place}{name}_proj.weight"].T for name in ("gate", "up"))
        bias = part.get(f"{place}down_proj.bias")
        return F.linear(F.silu(gate) * up, part[f"{place}down_proj.weight"], bias)

    experts = config.get("num_experts")
    if not experts:
        return gated("mlp.")
    weights = (normed @ part["mlp.router.weight"].T).softmax(-1)
    best = weights.topk(config["num_experts_per_tok"], dim=-1)
    kept = torch.zeros_like(weights).scatter(-1, best.indices, best.values)
    if config.get("norm_topk_prob", True):
        kept = kept / kept.sum(-1, keepdim=True)
    outputs = [gated(f"mlp.local_experts.{expert}.") for expert in range(experts)]
    return (torch.stack(outputs, dim=-1) * kept[..., None, :]).sum(-1)


def filled(spec: ModelSpec, held: dict[str, Tensor]) -> Decoder:
    """The decoder with the tensors of the files."""
    model = build_model(spec, dtype=torch.float32)
    materialize(model, "cpu")
    assert isinstance(model, Decoder)
    with torch.no_grad():
        in_files = by_file(model, dict(model.named_parameters()))
        assert in_files.keys() == held.keys()
        for name, tensor in in_files.items():
            tensor.copy_(held[name])
    return model


def by_file(model: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the decoder by their names in files, in the same memory."""
    held = {name: Shard(tuple(t.shape), full_box(tuple(t.shape)), t) for name, t in tensors.items()}
    return {name: shard.tensor for name, shard in mapped(held, mappings_of(model)).items()}


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "grouped queries": ({}, 1e4),
    "as many key heads": ({"num_key_value_heads": 6}, 1e4),
    "one key head": ({"num_key_value_heads": 1}, 1e4),
    "no biases": ({"out_proj_has_bias": False}, 1e4),
    "experts": ({"num_experts": 6, "num_experts_per_tok": 2}, 1e4),
    "experts, no biases": (
        {"num_experts": 4, "num_experts_per_tok": 3, "out_proj_has_bias": False,
         "norm_topk_prob": False}, 1e4,
    ),
    "tied": ({"tie_word_embeddings": True}, 1e4),
    # alpha = 2 ** ceil(log2(32 / 8) + 1) - 1 = 7, head size 4
    "trained on longer rows": (
        {"training_seqlen": 32, "base_seqlen": 8, "seq_length": 32}, 1e4 * 49,
    ),
    "trained on a little more": (
        {"training_seqlen": 36, "base_seqlen": 32, "seq_length": 36}, 1e4 * 9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_the_reference(case: str) -> None:
    changes, base = CASES[case]
    config = CONFIG | changes
    held = tensors_of(config, biases=config.get("out_proj_has_bias", True))
    for tensor in held.values():
        tensor.requires_grad_()
    ids = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(1))
    expected = reference(config, held, ids, base)
    own = filled(model_spec({}, config), {k: t.detach() for k, t in held.items()})
    logits = own(ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for result in (logits, expected):
        F.cross_entropy(result[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    for name, gradient in by_file(own, gradients).items():
        torch.testing.assert_close(gradient, held[name].grad, rtol=1e-3, atol=1e-5)


def test_config_json_keeps_its_spelling() -> None:
    spec = model_spec({}, CONFIG)
    written = json.loads(hf_directory_files(spec, None)["config.json"])
    assert written.items() >= {k: v for k, v in CONFIG.items() if k != "torch_dtype"}.items()
    assert not {"num_hidden_layers", "rms_norm_eps", "intermediate_size"} & written.keys()
    again = model_spec({}, written)
    assert again.decoder == spec.decoder
    usual = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
             "ffn_hidden_size": "intermediate_size", "layer_norm_epsilon": "rms_norm_eps",
             "seq_length": "max_position_embeddings"}  # fmt: skip
    assert model_spec({}, {usual.get(k, k): v for k, v in CONFIG.items()}).decoder == spec.decoder


def test_model_config_alone_describes_the_model() -> None:
    spec = model_spec(
        {"type": "TelechatConfig", "num_layers": 2, "num_heads": 6, "n_kv_heads": 2,
         "hidden_size": 24, "intermediate_size": 40, "vocab_size": 96, "seq_length": 32,
         "hidden_dropout_prob": 0.1, "out_proj_has_bias": False}, None,
    )  # fmt: skip
    assert spec.decoder is not None
    assert (spec.decoder.hidden_dropout, spec.decoder.output_bias) == (0.1, False)
    assert (spec.decoder.down_bias, spec.decoder.mlp_bias) == (False, False)
    assert spec.hf_config["hidden_dropout"] == 0.1


def test_a_tied_head_has_the_names_of_the_files() -> None:
    spec = model_spec({}, CONFIG | {"tie_word_embeddings": True})
    model = build_model(spec, dtype=torch.float32)
    assert isinstance(model, Decoder)
    assert tied_names(model) == {"lm_head.weight": "transformer.word_embeddings.weight"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_layernorm": True}, "embed_layernorm = True: this family supports only one value"),
        ({"use_RMSNorm": False}, "use_RMSNorm = False: this family supports only one value"),
        ({"training_seqlen": None}, "base_seqlen = 64: training_seqlen is missing"),
        ({"training_seqlen": "64"}, "training_seqlen = '64': must be an integer"),
        ({"seq_length": 65}, "max_position_embeddings = 65: rows longer than training_seqlen (64)"),
        ({"num_hidden_layers": 3}, "n_layer = 2: conflicts with num_hidden_layers = 3"),
        ({"num_key_value_heads": 4}, "6 attention heads cannot be divided over 4 KV heads"),
        ({"out_proj_has_bias": "yes"}, "out_proj_has_bias = 'yes': must be True or False"),
        ({"num_experts": 2}, "num_experts_per_tok = 4 (the default of telechat): must be at most"),
        ({"num_experts": 4, "moe_intermediate_size": 0}, "moe_intermediate_size = 0: must be"),
    ],
)
def test_what_is_not_supported_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in problems_of({}, CONFIG | changes)
