"""Products of linear layers in FP8, by torchao.

Owns which layers compute in FP8, and how torchao's product takes the place of `F.linear` in them.
Weights, their names, gradients and checkpoints stay in their dtype: operands are scaled and rounded
for each of the three products of a layer, and the results are in the dtype of the operands.

Invariants: a layer that is not converted computes as before; torchao is imported only when FP8 is
configured.

torchao's own conversion replaces modules of `torch.nn.Linear`, which those of `models.layers` are
not; here its autograd function is called with a configuration that its conversion made.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import UserError, did_you_mean
from launcher.parallel.local import local
from models.layers import Linear

MULTIPLE = 16
"""Of the sizes of an FP8 product: `torch._scaled_mm` takes no others."""
CAPABILITY = (8, 9)
"""Of GPUs that multiply in FP8."""
_KEY = "fp8_config"
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Converted:
    """What computes in FP8."""

    names: tuple[str, ...]
    """Of the converted layers."""
    unaligned: tuple[str, ...]
    """Of those left because of their sizes."""
    excluded: int
    """How many the configuration excludes."""


def check_device(device: torch.device, where: str) -> None:
    """Raise UserError unless `device` multiplies in FP8."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < CAPABILITY:
        has = "the CPU" if found is None else f"compute capability {found[0]}.{found[1]}"
        raise UserError(
            f"{_KEY}.recipe on {has}",
            where=where,
            rule=f"FP8 needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (Ada, "
            "Hopper) or more",
            nearest=f"Nearest: {_KEY}.emulate: True, which is slow",
            advice="Or leave it out",
        )


def fp8_product(recipe: str, *, emulate: bool, where: str) -> Product:
    """A function as `models.products.linear` that multiplies in FP8.

    Raises UserError if torchao is not installed.
    """
    try:
        float8: Any = importlib.import_module("torchao.float8")
        function: Any = importlib.import_module("torchao.float8.float8_linear")
    except ImportError as error:
        raise UserError(
            f"{_KEY}.recipe = {recipe}: {error}",
            where=where,
            rule="FP8 is computed by torchao",
            advice="Install it: pip install 'slipway[fp8]'",
        ) from error
    config = _with(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    # Its conversion also corrects what inductor would compile wrongly.
    sample = nn.Sequential(nn.Linear(MULTIPLE, MULTIPLE, bias=False, device="meta"))
    converted: Any = float8.convert_to_float8_training(sample, config=config)[0]
    multiply = function.matmul_with_hp_or_float8_args.apply

    def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = multiply(states, weight.t(), converted.linear_mm_config, converted.config)
        return output if bias is None else output + bias

    return product


def _with(config: Any, *, emulate: bool) -> Any:
    # Not dataclasses.replace, which would run __post_init__ on values that it has filled in itself.
    # Rows that do not divide are padded: for the gradient of a weight they are the inner size.
    object.__setattr__(config, "emulate", emulate)
    object.__setattr__(config, "pad_inner_dim", True)
    return config


def apply_fp8(
    layers: Mapping[int, nn.Module], product: Product, exclude: Sequence[str] = ()
) -> Converted:
    """Compute the linear layers in `layers` by `product`, and return which. Called after tensor
    parallelism has been applied, and before the layers are compiled."""
    names: list[str] = []
    unaligned: list[str] = []
    excluded = 0
    for number, layer in layers.items():
        for name, module in linear_layers(layer):
            if any(re.fullmatch(pattern, name) for pattern in exclude):
                excluded += 1
            elif any(size % MULTIPLE for size in local(module.held("weight")).shape):
                unaligned.append(f"{number}.{name}")
            else:
                module.product = product
                names.append(f"{number}.{name}")
    return Converted(tuple(names), tuple(unaligned), excluded)


def check_exclude(patterns: Sequence[str], layers: Sequence[nn.Module], where: str) -> None:
    """Raise UserError for a pattern that matches no linear layer of the model."""
    known = list(dict.fromkeys(name for layer in layers for name, _ in linear_layers(layer)))
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in known):
            raise UserError(
                f"{_KEY}.exclude: {pattern!r}",
                where=where,
                rule="no linear layer of this model has such a name",
                nearest=did_you_mean(pattern.replace("\\.", "."), known)
                or f"Known: {', '.join(known)}",
            )


def linear_layers(layer: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The linear layers of a layer that may compute in FP8, with their names in it. Not those of
    experts and adapters, whose products are grouped or small."""
    for name, module in layer.named_modules():
        in_adapter = name.rpartition(".")[2] in ("lora_A", "lora_B")
        if isinstance(module, Linear) and not in_adapter:
            yield name, module
