"""Buffers in files of older transformers are ignored, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.errors import UserError
from models.build import build_model, ignorable, mappings_of, may_be_missing
from models.spec import ModelSpec
from tests.models.test_tensor_mapping import loaded
from tests.models.tiny import dense_spec, module_spec, oracle, saved, tokens

MASK = torch.ones(1, 1, 8, 8).tril()
NUMBER, FREQUENCIES, TABLE = torch.tensor(-1e9), torch.ones(4), torch.ones(1, 1, 32, 8)
OLD: dict[str, dict[str, Tensor]] = {
    "gpt2": {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": NUMBER,
             "transformer.h.1.crossattention.bias": MASK},
    "gpt_neo": {"transformer.h.0.attn.attention.bias": MASK.bool(),
                "transformer.h.0.attn.attention.masked_bias": NUMBER},
    "gptj": {"transformer.h.0.attn.bias": MASK.bool(), "transformer.h.0.attn.masked_bias": NUMBER,
             "transformer.h.0.attn.embed_positions": torch.ones(32, 8)},
    "gpt_neox": {"gpt_neox.layers.0.attention.bias": MASK.bool(),
                 "gpt_neox.layers.0.attention.masked_bias": NUMBER,
                 "gpt_neox.layers.0.attention.rotary_emb.inv_freq": FREQUENCIES},
    "gpt_bigcode": {"transformer.h.0.attn.bias": MASK[0, 0].bool()},
    "codegen": {"transformer.h.0.attn.causal_mask": MASK.bool(),
                "transformer.h.1.attn.attention.bias": MASK,
                "transformer.h.0.attn.embed_positions": torch.ones(32, 8)},
    "opt": {"model.decoder.version": torch.tensor([3.0])},
    "xglm": {"model.embed_positions.weights": torch.ones(40, 64),
             "model.embed_positions._float_tensor": torch.zeros(1)},
    "falcon": {"transformer.h.0.self_attention.rotary_emb.inv_freq": FREQUENCIES,
               "transformer.h.1.self_attention.maybe_rotary.inv_freq": FREQUENCIES,
               "transformer.h.0.self_attention.rotary_emb.cos_cached": TABLE[0]},
    "phi": {"model.layers.0.self_attn.rotary_emb.sin_cached": TABLE,
            "model.layers.0.self_attn.rotary_emb.inv_freq": FREQUENCIES},
    "LlamaConfig": {"model.layers.0.self_attn.rotary_emb.inv_freq": FREQUENCIES,
                    "model.layers.2.self_attn.rotary_emb.cos_cached": TABLE,
                    "model.layers.2.self_attn.rotary_emb.sin_cached": TABLE},
    "Qwen2Config": {"model.rotary_emb.inv_freq": FREQUENCIES, "model.position_ids":
                    torch.arange(8)[None]},
}  # fmt: skip
"""Family -> buffers that older versions of its class saved."""


def spec_of(family: str) -> ModelSpec:
    return dense_spec(type=family) if family.endswith("Config") else module_spec(family)


@pytest.mark.parametrize("family", OLD)
def test_they_are_ignored(tmp_path: Path, family: str) -> None:
    spec = spec_of(family)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec.hf_config)).eval()
    old = {name: tensor.clone() for name, tensor in OLD[family].items()}
    save_file(saved(module) | old, tmp_path / "model.safetensors", {"format": "pt"})
    input_ids = tokens(2, 16)
    with torch.no_grad():
        found, expected = loaded(spec, tmp_path)(input_ids), module(input_ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


WEIGHTS: dict[str, tuple[str, dict[str, Tensor]]] = {
    "a bias": ("LlamaConfig", {"model.layers.0.self_attn.bias": torch.ones(64)}),
    "a bias of attention": ("gpt_neo", {"transformer.h.0.attn.attention.bias": torch.ones(64)}),
    "a matrix that is not square": ("LlamaConfig", {"model.layers.0.attn.bias": torch.ones(4, 8)}),
    "a square one of numbers": ("opt", {"model.decoder.layers.0.attn.bias": torch.ones(8, 8)}),
    "scores of every head": ("opt", {"model.decoder.layers.0.attn.bias": torch.ones(1, 4, 8, 8)}),
    "a bias of a layer too many": (
        "gpt2", {"transformer.h.7.attn.c_attn.bias": torch.ones(192)}),
    "a matrix of a layer too many": (
        "gpt2", {"transformer.h.7.attn.c_attn.weight": torch.ones(64, 192)}),
    "learnt frequencies": (
        "LlamaConfig", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, 4)}),
    "positions that are learnt": ("LlamaConfig", {"model.position_ids": torch.ones(8, 64)}),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_weight_is_never_ignored(case: str) -> None:
    family, tensors = WEIGHTS[case]
    spec = spec_of(family)
    model = build_model(spec, dtype=torch.float32)
    mappings, expected = mappings_of(model), set[str]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        found = mappings(name, tuple(tensor.shape))
        expected |= {name} if found is None else {mapping.name for mapping in found}
    leave = ignorable(model, spec, expected)
    for name, tensor in tensors.items():
        assert not leave(name, tuple(tensor.shape), "F32")


def test_a_weight_of_a_layer_too_many_stops_the_load(tmp_path: Path) -> None:
    spec = module_spec("gpt2")
    more = {"transformer.h.7.attn.c_attn.bias": torch.ones(192)}
    save_file(saved(oracle(spec)) | more, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="0 missing, 1 extra"):
        loaded(spec, tmp_path)


def test_what_a_class_declares_may_be_missing() -> None:
    """Buffers are initialized already; a parameter would not be."""
    model = build_model(module_spec("glm4_moe_lite"), dtype=torch.float32)
    name = next(n for n, _ in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert not may_be_missing(model, name)
    model.wrapped._keys_to_ignore_on_load_missing = {"e_score_correction_bias", "gate.weight"}
    assert may_be_missing(model, name)
    assert not may_be_missing(model, name.replace("e_score_correction_bias", "weight"))
