"""Low-rank adapters (LoRA, DoRA) on the linear layers of a model.

Owns what an adapter computes, and which parameters of a model with one are trained. An adapter adds
parameters to the layer it belongs to; no parameter of the base model changes its name:

    q_proj.weight                 W  [outputs, inputs]     not trained
    q_proj.lora_A.weight          A  [rank, inputs]
    q_proj.lora_B.weight          B  [outputs, rank]       zeros at first: the model is the base
    q_proj.lora_magnitude_vector  m  [outputs]             with DoRA: the lengths of the rows

Invariants: results are those of PEFT for the same values; dropout is a function of (seed of the
sample, layer, module, index), the same on any layout, as all dropout here (a module of transformers
draws from torch's generator).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.errors import UserError, did_you_mean
from models.dropout import ADAPTER, dropout, dropout_seeds
from models.layers import Linear
from models.lora_config import (
    MAGNITUDE,
    PARTS,
    LoraConfig,
    Names,
    is_adapter,
    is_frozen,
    is_stack,
    layer_of,
    module_names,
)
from models.moe import Experts
from models.plan import kind_of
from models.products import linear

if TYPE_CHECKING:
    from models.attention import StepContext
    from models.spec import ModelSpec

_OUTSIDE = 1 << 20
"""In place of a layer's number, for modules outside of layers."""


class LowRank:
    """The adapter of one layer, whose parameters are the layer's own."""

    def __init__(self, lora: LoraConfig, names: Names) -> None:
        """`names` of the layer, that in the model first."""
        self.scaling, self.dropout = lora.scaling_of(names), lora.dropout
        layer = layer_of(names[0])
        self.seed_layer: int | Tensor = _OUTSIDE if layer is None else layer
        """As in `DecoderLayer`."""
        self.site = zlib.crc32(kind_of(names[0]).encode())
        self.enabled = True
        self.column_shard = 0
        """Which shard of the layer's inputs is local, of equal ones."""
        self.sum_of_shards: Callable[[Tensor], Tensor] = _identity
        """From sums over the local inputs to sums over all of them; without gradients."""

    def add(
        self, linear: Linear, states: Tensor, output: Tensor, context: StepContext | None
    ) -> Tensor:
        """`output` [..., outputs] of the layer for `states` [..., inputs], with the adapter."""
        if not self.enabled:
            return output
        assert linear.lora_A is not None
        assert linear.lora_B is not None
        return self.combine(
            states, self._dropped(states, context), output,
            weight=linear.held("weight"), bias=linear.held("bias"),
            a=linear.lora_A.held("weight"), b=linear.lora_B.held("weight"),
            magnitude=linear.held(MAGNITUDE),
        )  # fmt: skip

    def combine(
        self, states: Tensor, dropped: Tensor, output: Tensor, *, weight: Tensor,
        bias: Tensor | None, a: Tensor, b: Tensor, magnitude: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`output` of a layer with `weight` [outputs, inputs] for `states`, with the adapter;
        `dropped` are the states after dropout."""
        low = linear(linear(dropped, a), b) * self.scaling
        if magnitude is None:
            return output + low
        factor = magnitude / self.row_norms(weight, a, b)
        if dropped is not states:
            plain = linear(dropped, weight)
        else:
            plain = output if bias is None else output - bias
        return output + (factor - 1) * plain + factor * low

    def row_norms(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The lengths [outputs] of the rows of W + scaling * B A: a constant in the backward pass,
        as in section 4.3 of the DoRA paper."""
        with torch.no_grad():
            rows = weight + self.scaling * (b @ a)
            return self.sum_of_shards(rows.square().sum(1)).sqrt()

    def _dropped(self, states: Tensor, context: StepContext | None) -> Tensor:
        if not self.dropout or context is None or context.dropout_seeds is None:
            return states
        seeds = dropout_seeds(context.dropout_seeds, self.seed_layer, ADAPTER)
        width = states.shape[-1]
        columns = torch.arange(width, device=states.device) + self.column_shard * width
        return dropout(
            states, self.dropout, dropout_seeds(seeds, 0, self.site),
            lines=context.mask.token_indices, columns=columns,
        )  # fmt: skip


def _identity(sums: Tensor) -> Tensor:
    return sums


def attach_adapters(model: nn.Module, spec: ModelSpec, dtype: torch.dtype) -> None:
    """Add the adapters of `spec` to a full model, on the meta device and in `dtype`, and choose
    what is trained.

    Raises UserError if no layer matches, or if nothing is left to train.
    """
    if spec.lora is not None:
        modules = list(model.named_modules())
        added = [_attach(module, name, spec, spec.lora, dtype) for name, module in modules]
        if not any(added):
            raise _no_target(model, spec.lora)
        if not isinstance(spec.lora.modules_to_save, str):  # a text is that of files
            _check_names(model, "pet_config.modules_to_save", spec.lora.modules_to_save)
    _check_names(model, "freeze", spec.frozen)
    if spec.lora is None and not spec.frozen:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, spec))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"freeze = {list(spec.frozen)}",
            rule="it names all parameters that would be trained",
            advice="Name fewer of them",
        )


def is_trained(parameter: str, spec: ModelSpec) -> bool:
    """Whether a parameter is trained: with an adapter, only its own and `modules_to_save`."""
    if is_frozen(parameter, spec.frozen):
        return False
    return spec.lora is None or is_adapter(parameter) or spec.lora.saves(parameter)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """In this context the base model alone computes."""
    found = [adapter for module in model.modules() for adapter in adapters_of(module)]
    before = [adapter.enabled for adapter in found]
    for adapter in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(found, before, strict=True):
            adapter.enabled = enabled


def adapters_of(module: nn.Module) -> list[LowRank]:
    """The adapters of a linear layer or a stack of experts."""
    if isinstance(module, Experts):
        return list(module.adapters.values())
    adapter = getattr(module, "adapter", None)
    return [adapter] if isinstance(adapter, LowRank) else []


def has_transposed_adapters(model: nn.Module) -> bool:
    """Whether layers with an adapter have weights [inputs, outputs]."""
    return any(is_conv1d(module) and bool(adapters_of(module)) for module in model.modules())


def _attach(module: Any, name: str, spec: ModelSpec, lora: LoraConfig, dtype: torch.dtype) -> bool:
    """Add the adapter of one module, if it gets one."""
    if isinstance(module, Experts):
        return _attach_to_stack(module, name, spec, lora, dtype)
    parameters = spec.decoder.parameters if spec.decoder is not None else {}
    names = module_names(f"{name}.weight", (1,), parameters)
    sizes = _sizes(module)
    if sizes is None or not lora.targets(names):
        return False
    inputs, outputs = sizes
    with torch.device("meta"):
        module.lora_A = Linear(inputs, lora.rank_of(names)).to(dtype)
        module.lora_B = Linear(lora.rank_of(names), outputs).to(dtype)
        row_norms = nn.Parameter(torch.empty(outputs, dtype=dtype))
    module.register_parameter(MAGNITUDE, row_norms if lora.use_dora else None)
    module.adapter = LowRank(lora, names)
    if not isinstance(module, Linear):
        module.register_forward_hook(_add_to_module)
    return True


def _attach_to_stack(
    module: Experts, name: str, spec: ModelSpec, lora: LoraConfig, dtype: torch.dtype
) -> bool:
    """Add the adapters of a stack of experts, one for each projection that gets one."""
    assert spec.decoder is not None
    found = {}
    for leaf, weight in list(module.named_parameters(recurse=False)):
        full, shape = f"{name}.{leaf}", tuple(weight.shape)
        names = module_names(full, shape, spec.decoder.parameters)
        if weight.ndim != 3 or not is_stack(full, spec.decoder.parameters):
            continue
        if not lora.targets(names):
            continue
        count, outputs, inputs = shape
        rank = lora.rank_of(names)
        low, high = (count, rank, inputs), (count, outputs, rank)
        for part, size in zip(PARTS, (low, high), strict=True):
            matrix = nn.Parameter(torch.empty(size, device="meta", dtype=dtype))
            module.register_parameter(f"{leaf}_{part}", matrix)
        found[leaf] = LowRank(lora, names)
    module.adapters = found
    return bool(found)


def base_weight(module: nn.Module) -> Tensor:
    """The weight [outputs, inputs] of a linear layer."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer; None for other modules."""
    if isinstance(module, Linear | nn.Linear) or is_conv1d(module):
        outputs, inputs = base_weight(module).shape
        return inputs, outputs
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of GPT-2, whose weight is [inputs, outputs]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _add_to_module(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook of a linear layer of transformers."""
    adapter: LowRank = module.adapter
    if not adapter.enabled:
        return output
    states = inputs[0]
    return adapter.combine(
        states,
        F.dropout(states, adapter.dropout) if module.training and adapter.dropout else states,
        output,
        weight=base_weight(module),
        bias=module.bias,
        a=module.lora_A.weight,
        b=module.lora_B.weight,
        magnitude=getattr(module, MAGNITUDE),
    )


def _check_names(model: nn.Module, key: str, entries: Sequence[str]) -> None:
    """Raise UserError for an entry that names no parameter of the model."""
    names = [name for name, _ in model.named_parameters()]
    for entry in entries:
        if not any(is_frozen(name, (entry,)) for name in names):
            parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
            raise UserError(
                f"{key}: {entry}",
                rule="it names no parameter of the model",
                nearest=did_you_mean(entry, parts),
                advice="Write the name of a module or parameter, or its ending",
            )


def _no_target(model: nn.Module, lora: LoraConfig) -> UserError:
    wanted = lora.target_modules
    names = sorted({
        name.rpartition(".")[2] for name, module in model.named_modules() if _sizes(module)
    })  # fmt: skip
    shown = wanted if isinstance(wanted, str) else list(wanted)
    limits = {"exclude_modules": lora.exclude_modules, "modules_to_save": lora.modules_to_save,
              "layers_to_transform": lora.layers}  # fmt: skip
    limited = "".join(f", with {key} = {value!r}" for key, value in limits.items() if value)
    return UserError(
        f"pet_config.target_modules = {shown!r}{limited} matches no linear layer of the model",
        rule="it is all-linear, a regular expression for full names of linear layers, or a list "
        "of names or their endings",
        nearest=f"The linear layers are {', '.join(names)}",
    )
