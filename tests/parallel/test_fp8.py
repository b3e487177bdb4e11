"""FP8: which layers are converted, what is refused; with torchao also that results are near."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.errors import UserError
from launcher.parallel.fp8 import (
    apply_fp8,
    check_device,
    check_exclude,
    fp8_product,
    linear_layers,
)
from models.layers import Linear
from models.products import linear
from tests.parallel.keeping import CPU, decoder, numbered, plain, step

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao (the extra `fp8`) is not installed"
)


class Product:
    """`models.products.linear` that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.calls += 1
        return linear(states, weight, bias)


def test_the_linear_layers_of_the_layers_are_converted() -> None:
    model, product = decoder("dense"), Product()
    names = set(model.state_dict())
    done = apply_fp8(numbered(model), product)
    assert done.unaligned == ()
    assert len(done.names) == 7 * 3
    gradients, _ = step(model)
    assert product.calls == 7 * 3
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain("dense")[0][name]), name
    assert set(model.state_dict()) == names
    assert model.head_module.product is linear if isinstance(model.head_module, Linear) else True


def test_experts_and_unaligned_layers_are_left() -> None:
    model = decoder("latent")
    layers = numbered(model)
    done = apply_fp8(layers, Product(), exclude=[r"self_attn\.o_proj"])
    for number, layer in layers.items():
        for name, module in linear_layers(layer):
            aligned = all(size % 16 == 0 for size in module.weight.shape)
            is_converted = aligned and name != "self_attn.o_proj"
            assert (f"{number}.{name}" in done.names) == is_converted, name
            assert isinstance(module.product, Product) == is_converted
    assert done.unaligned, "the low ranks of latent attention"
    assert done.excluded == len(layers)
    assert not any(name.endswith((".gate", ".experts")) for name in done.names)


def test_a_pattern_names_a_layer() -> None:
    layers = list(numbered(decoder("dense")).values())
    check_exclude([r"self_attn\..*", "mlp.down_proj"], layers, "run.yaml:3")
    with pytest.raises(UserError) as error:
        check_exclude([r"mlp\.down_projj"], layers, "run.yaml:3")
    assert "run.yaml:3" in str(error.value)
    assert "mlp.down_proj" in error.value.problems[0].nearest


@pytest.mark.parametrize("capability", [None, (8, 6), (8, 9), (9, 0)])
def test_devices(capability: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = CPU if capability is None else torch.device("cuda", 0)
    if capability in ((8, 9), (9, 0)):
        check_device(device, "run.yaml:3")
        return
    with pytest.raises(UserError, match=r"run\.yaml:3: fp8_config\.recipe on") as error:
        check_device(device, "run.yaml:3")
    assert "emulate" in error.value.problems[0].nearest


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr("launcher.parallel.fp8.importlib.import_module", missing)
    with pytest.raises(UserError, match=r"run\.yaml:3.*torchao") as error:
        fp8_product("rowwise", emulate=False, where="run.yaml:3")
    assert "slipway[fp8]" in error.value.problems[0].advice


def difference(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_near_those_of_high_precision(recipe: str) -> None:
    product = fp8_product(recipe, emulate=True, where="run.yaml:3")
    states = torch.randn(2, 7, 32, requires_grad=True)  # 14 rows: padded
    weight, bias = torch.randn(48, 32, requires_grad=True), torch.randn(48)
    exact = linear(states, weight, bias)
    expected = torch.autograd.grad(exact.square().sum(), (states, weight))
    near = product(states, weight, bias)
    found = torch.autograd.grad(near.square().sum(), (states, weight))
    assert 0 < difference(near, exact) < 0.06
    for value, reference in zip(found, expected, strict=True):
        assert 0 < difference(value, reference) < 0.12
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(states, weight, bias), near)


@needs_torchao
def test_a_model_trains_in_fp8() -> None:
    model = decoder("dense")
    apply_fp8(numbered(model), fp8_product("rowwise", emulate=True, where=""))
    gradients, _ = step(model)
    for name, exact in plain("dense")[0].items():
        assert difference(gradients[name], exact) < 0.6, name
