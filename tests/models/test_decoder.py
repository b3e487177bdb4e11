"""The decoder against transformers; packing and dropout by sample, which transformers lacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import build_model, initialize
from models.cache import KVCache
from models.decoder import Decoder
from models.dropout import dropout, dropout_seeds
from models.rope import inverse_frequencies
from tests.models.tiny import VOCABULARY, dense_spec, pair, tokens

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN_SCALES = YARN | {"mscale": 1.0, "mscale_all_dim": 0.8, "beta_fast": 24, "truncate": False}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig"},
    "llama tied": {"type": "LlamaConfig", "tie_word_embeddings": True},
    "llama biases": {"type": "LlamaConfig", "attention_bias": True, "mlp_bias": True},
    "llama all heads": {"type": "LlamaConfig", "n_kv_heads": 4},
    "llama gelu": {"type": "LlamaConfig", "hidden_act": "gelu_pytorch_tanh"},
    "llama linear": {"type": "LlamaConfig", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama dynamic": {
        "type": "LlamaConfig", "rope_scaling": {"type": "dynamic", "factor": 2.5},
        "max_position_embeddings": 16,
    },
    "llama yarn": {"type": "LlamaConfig", "rope_scaling": YARN, "max_position_embeddings": 64},
    "llama yarn scales": {
        "type": "LlamaConfig", "rope_scaling": YARN_SCALES, "max_position_embeddings": 64,
    },
    "llama llama3": {"type": "LlamaConfig", "rope_scaling": LLAMA3, "max_position_embeddings": 64},
    "mistral": {"type": "MistralConfig", "sliding_window": None},
    "mistral window": {"type": "MistralConfig", "sliding_window": 8},
    "mistral long window": {"type": "MistralConfig", "sliding_window": 64},
    "qwen2": {"type": "Qwen2Config"},
    "qwen2 tied": {"type": "Qwen2Config", "tie_word_embeddings": True},
    "qwen2 window": {"type": "Qwen2Config", **WINDOW},
    "qwen3": {"type": "Qwen3Config", "head_dim": 24},
    "qwen3 tied bias window": {
        "type": "Qwen3Config", "head_dim": 24, "tie_word_embeddings": True, "attention_bias": True,
        **WINDOW,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_equal_transformers_to_the_bit(name: str) -> None:
    own, module = pair(dense_spec(**FAMILIES[name]))
    input_ids = tokens(3, 32)
    expected = module(input_ids, use_cache=False).logits
    logits = own(input_ids)
    assert torch.equal(logits, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    (logits * weight).sum().backward()
    gradients = {name: p.grad for name, p in own.named_parameters()}
    for parameter_name, parameter in module.named_parameters():
        assert torch.equal(gradients.pop(parameter_name), parameter.grad), parameter_name
    assert not gradients


def test_window_as_long_as_the_row_needs_no_mask() -> None:
    """transformers builds a mask here, and its gradients are summed in another order."""
    own, module = pair(dense_spec(type="MistralConfig", sliding_window=32))
    input_ids = tokens(2, 32)
    assert torch.equal(own(input_ids), module(input_ids, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_follows_the_weights(dtype: torch.dtype) -> None:
    own, module = pair(dense_spec(type="Qwen3Config", head_dim=16))
    own = own.to(dtype)
    for (
        parameter
    ) in module.parameters():  # not .to(), which would also round its rotary frequencies
        parameter.data = parameter.data.to(dtype)
    input_ids = tokens(2, 16)
    logits = own(input_ids)
    assert logits.dtype == dtype
    assert torch.equal(logits, module(input_ids, use_cache=False).logits)


@pytest.mark.parametrize(
    ("key", "dtype"), [("layernorm_compute_dtype", "bfloat16"), ("rotary_dtype", "float32")]
)
def test_precision_keys_have_an_effect(key: str, dtype: str) -> None:
    plain, _ = pair(dense_spec(type="LlamaConfig"))
    spec = dense_spec(type="LlamaConfig", **{key: dtype})
    assert spec.decoder is not None
    changed = Decoder(spec.decoder, spec.precision)
    changed.load_state_dict(plain.state_dict())
    input_ids = tokens(2, 32)
    with torch.no_grad():
        reference = plain(input_ids)
        difference = (plain.bfloat16()(input_ids) - changed.bfloat16()(input_ids)).abs().max()
    assert 0 < difference < 0.1 * reference.abs().max()


@pytest.mark.parametrize("name", [name for name, c in FAMILIES.items() if "rope_scaling" in c])
def test_frequencies_equal_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    spec = dense_spec(**FAMILIES[name])
    config = AutoConfig.for_model(**spec.hf_config)
    expected, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    assert spec.decoder is not None
    frequencies, own_factor = inverse_frequencies(spec.decoder)
    assert torch.equal(frequencies, expected)
    assert own_factor == factor


def test_dynamic_scaling_does_not_depend_on_the_other_rows() -> None:
    own, _ = pair(dense_spec(**FAMILIES["llama dynamic"]))
    input_ids = tokens(2, 32)
    short = torch.arange(32).repeat(2, 1)
    short[1] = torch.arange(32) % 8  # this row stays within max_position_embeddings
    both = own(input_ids, position_ids=short)
    torch.testing.assert_close(both[1:], own(input_ids[1:], position_ids=short[1:]))
    assert not torch.allclose(both[:1], own(input_ids[:1], position_ids=short[1:]))


PACKED = ["llama", "llama yarn", "mistral window", "qwen2 window", "qwen3"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_equal_documents_alone(name: str) -> None:
    own, _ = pair(dense_spec(**FAMILIES[name]))
    lengths = [[11, 1, 20], [5, 13, 14]]
    input_ids = tokens(2, 32)
    document_ids = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = own(input_ids, document_ids=document_ids, position_ids=position_ids)
    for row, sizes in enumerate(lengths):
        alone = [own(piece) for piece in input_ids[row : row + 1].split(sizes, dim=1)]
        torch.testing.assert_close(packed[row : row + 1], torch.cat(alone, dim=1))


def test_one_document_a_row_equals_plain_causal() -> None:
    own, _ = pair(dense_spec(**FAMILIES["qwen3"]))
    input_ids = tokens(2, 32)
    packed = own(input_ids, document_ids=torch.zeros_like(input_ids))
    torch.testing.assert_close(packed, own(input_ids))


@pytest.mark.parametrize("name", ["llama", "llama dynamic", "mistral window", "qwen2 window"])
def test_cache_gives_the_logits_of_the_full_text(name: str) -> None:
    own, _ = pair(dense_spec(**FAMILIES[name] | {"max_position_embeddings": 64}))
    own.eval()
    input_ids = tokens(2, 24)
    cache = KVCache(capacity=4)
    with torch.no_grad():
        pieces = [own(piece, cache=cache) for piece in input_ids.split([7, 9, 1, 1, 6], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), own(input_ids))
    assert cache.length == 24


def test_left_padding_changes_nothing() -> None:
    own, _ = pair(dense_spec(**FAMILIES["mistral window"]))
    own.eval()
    input_ids = tokens(1, 20)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), input_ids], dim=1)
    mask = torch.arange(25)[None] >= 5
    with torch.no_grad():
        logits = own(padded, attention_mask=mask)
        torch.testing.assert_close(logits[:, 5:], own(input_ids))
        assert torch.isfinite(logits).all()
        last = own(padded, attention_mask=mask, last_only=True)
    torch.testing.assert_close(last, logits[:, -1:])


DROPOUT = {"type": "Qwen3Config", "head_dim": 16, "attention_dropout": 0.2, "hidden_dropout": 0.1}
SEEDS = torch.tensor([5, 2**40 + 7, 9, 11])


def test_dropout_belongs_to_the_sample_not_to_the_batch() -> None:
    own, _ = pair(dense_spec(**DROPOUT))
    input_ids = tokens(4, 24)
    whole = own(input_ids, sample_seeds=SEEDS)
    partial_saves = [own(input_ids[i : i + 2], sample_seeds=SEEDS[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(whole, torch.cat(partial_saves))
    assert torch.equal(whole, own(input_ids, sample_seeds=SEEDS))
    torch.testing.assert_close(whole.flip(0), own(input_ids.flip(0), sample_seeds=SEEDS.flip(0)))
    other = own(input_ids, sample_seeds=SEEDS + 1)
    assert all(not torch.allclose(whole[row], other[row]) for row in range(4))


def test_dropout_only_in_training_and_only_with_seeds() -> None:
    own, module = pair(dense_spec(**DROPOUT))
    input_ids = tokens(4, 24)
    expected = module.eval()(input_ids, use_cache=False).logits
    assert torch.equal(own(input_ids), expected)
    assert torch.equal(own.eval()(input_ids, sample_seeds=SEEDS), expected)


def test_explicit_attention_without_dropout_equals_the_kernel() -> None:
    """A dropout probability too small to drop anything leaves only the explicit computation."""
    own, module = pair(dense_spec(**DROPOUT | {"attention_dropout": 1e-9, "hidden_dropout": 0.0}))
    input_ids = tokens(2, 24)
    torch.testing.assert_close(
        own(input_ids, sample_seeds=SEEDS[:2]), module(input_ids, use_cache=False).logits
    )


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_rate_mean_and_independence(probability: float) -> None:
    seeds = torch.arange(4)
    ones = torch.ones(4, 8, 64, 64)
    patterns = [
        dropout(ones, probability, dropout_seeds(seeds, layer, site)) > 0
        for layer in (0, 1)
        for site in (0, 1)
    ]
    kept = dropout(ones, probability, dropout_seeds(seeds, 0, 0))
    assert abs((kept == 0).float().mean().item() - probability) < 0.005
    assert abs(kept.mean().item() - 1) < 0.05
    flat = torch.stack([*(p.flatten() for p in patterns)]).float()
    rows = patterns[0].flatten(1).float()
    for group in (flat, rows, patterns[0][0].flatten(1).float(), patterns[0][0, 0].float()):
        correlation = torch.corrcoef(group) - torch.eye(len(group))
        assert correlation.abs().max() < 6 / group.shape[1] ** 0.5


def test_gradients_do_not_depend_on_how_rows_are_split() -> None:
    own, _ = pair(dense_spec(**DROPOUT))
    input_ids = tokens(4, 24)

    def gradients(rows: list[slice]) -> list[Tensor]:
        model = copy.deepcopy(own)
        for part in rows:
            model(input_ids[part], sample_seeds=SEEDS[part]).pow(2).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    together, apart = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_built_on_meta_and_filled_equals_built_in_place() -> None:
    spec = dense_spec(type="Qwen3Config", head_dim=16, tie_word_embeddings=True)
    model = build_model(spec, dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())
    assert not list(model.buffers())
    assert "lm_head.weight" not in model.state_dict()
    model.to_empty(device="cpu")
    initialize(model, spec, seed=3)
    other = build_model(spec, dtype=torch.float32, device="cpu")
    initialize(other, spec, seed=3)
    input_ids = tokens(1, 8)
    assert torch.equal(model(input_ids), other(input_ids))
    assert model(input_ids).shape == (1, 8, VOCABULARY)


def test_layers_and_activations_can_be_wrapped() -> None:
    own, _ = pair(dense_spec(**DROPOUT))
    input_ids = tokens(2, 16)
    expected = own(input_ids, sample_seeds=SEEDS[:2])
    called: list[str] = []

    def noting(name: str, function: Any) -> Any:
        return lambda *arguments: called.append(name) or function(*arguments)

    own.run_layers = noting("layers", own.run_layers)  # type: ignore[method-assign]
    for number, layer in own.model.layers.items():
        layer.mlp.activated = noting(number, layer.mlp.activated)
    assert torch.equal(own(input_ids, sample_seeds=SEEDS[:2]), expected)
    assert called == ["layers", *own.model.layers]


def test_compiles_without_breaks() -> None:
    """Traced in full (without code generation, which needs a compiler): no graph breaks."""
    own, _ = pair(dense_spec(**DROPOUT))
    input_ids = tokens(2, 16)
    documents = torch.arange(16).repeat(2, 1) // 8
    compiled = torch.compile(own, fullgraph=True, backend="eager")
    given = {"document_ids": documents, "sample_seeds": SEEDS[:2]}
    torch.testing.assert_close(compiled(input_ids, **given), own(input_ids, **given))
