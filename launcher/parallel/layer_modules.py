"""The modules of a layer that recompute, offload and compile can select, and their names.

Owns names alone. A layer module is the layer itself (""), a module in it under its own name
(`self_attn.q_norm`), or one of two functions that are no modules of their own:

    self_attn.attend    from queries, keys and values to outputs
    mlp.activation      from the outputs of gate_proj and up_proj through down_proj

Patterns are regular expressions over such names. They may also use MindFormers' names for the same
modules, those of its older models (`feed_forward\\.w1\\.activation`) and of its newer ones
(`mlp\\.activation_func`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import nn

from launcher.errors import UserError, did_you_mean
from models.attention import BaseAttention
from models.families.table import DECODERS
from models.layers import MLP
from models.moe import Experts
from models.stage import StageSplit

Function = Callable[..., Any]

_FUNCTIONS: dict[type[nn.Module], tuple[str, str]] = {
    BaseAttention: ("attend", "attend"),
    MLP: ("activation", "activated"),
    Experts: ("activation", "activated"),
}
"""Class of a module -> (name of its function, attribute that is called for it)."""

_SPELLINGS = {
    "self_attn": ("attention", "self_attention"),
    "attend": ("flash_attention", "core_attention", "core_attention.flash_attention"),
    "q_proj": ("wq", "linear_q"), "k_proj": ("wk", "linear_k"), "v_proj": ("wv", "linear_v"),
    "o_proj": ("wo", "linear_proj"),
    "q_norm": ("q_layernorm",), "k_norm": ("k_layernorm",),
    "mlp": ("feed_forward",),
    "gate_proj": ("w1",), "up_proj": ("w3",), "down_proj": ("w2", "linear_fc2"),
    "activation": ("mul", "w1.activation", "w1.activation.silu", "activate", "activate.silu",
                   "activation_func",
                   "activation_func.silu"),
    "experts": ("routed_experts", "routed_experts.ffn"), "gate": ("router",),
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("ffn_norm", "pre_mlp_layernorm"),
    **{part: names for family in DECODERS.values()
       for part, names in family.mindformers_modules.items()},
}  # fmt: skip
"""A component of a name -> its names in MindFormers."""

_FREE = re.compile(
    r"(.*\.)?(re)?(shape|cast|rcast|cast_up|cast_down|add|add_3d|bias_add|transpose)"
)
"""Operations of MindFormers' models that save no activations here."""


@dataclass(frozen=True)
class LayerModule:
    """One module, or function of one, which runs when `attribute` of `owner` is called."""

    owner: nn.Module
    attribute: str

    def wrap(self, wrapper: Callable[[Function], Function]) -> None:
        """Wrap the called attribute of this instance: parameter names, and the hooks on a module's
        call, do not change."""
        setattr(self.owner, self.attribute, wrapper(getattr(self.owner, self.attribute)))


def layer_modules(layer: nn.Module) -> dict[str, LayerModule]:
    """The modules of `layer` by name."""
    found: dict[str, LayerModule] = {}
    for name, module in layer.named_modules():
        found[name] = LayerModule(module, "forward")
        for kind, (function, attribute) in _FUNCTIONS.items():
            if isinstance(module, kind):
                found[f"{name}.{function}"] = LayerModule(module, attribute)
    return found


def module_names(layers: Collection[nn.Module]) -> list[str]:
    """The names of all modules of `layers`, without the layers themselves."""
    return list(dict.fromkeys(name for layer in layers for name in layer_modules(layer) if name))


def matching(pattern: str, names: Collection[str]) -> set[str]:
    """Those of `names` that the pattern matches, in any spelling."""
    expression = re.compile(pattern)
    return {name for name in names if any(map(expression.fullmatch, spellings(name)))}


def spellings(name: str) -> Iterator[str]:
    """`name` and its other spellings."""
    choices = [(part, *_SPELLINGS.get(part, ())) for part in name.split(".")]
    for parts in product(*choices):
        spelled = ".".join(parts)
        yield spelled
        if name.endswith("norm"):
            yield f"{spelled}.norm"


def outermost(names: Collection[str]) -> list[str]:
    """`names` without those inside another of them."""
    return [name for name in names if not any(is_inside(name, other) for other in names)]


def is_inside(name: str, other: str) -> bool:
    """Whether module `name` is inside module `other`."""
    return name != other and (not other or name.startswith(f"{other}."))


def check_patterns(
    key: str, patterns: Collection[str], names: Collection[str], where: Callable[[str], str]
) -> list[str]:
    """The patterns without effect: those of operations that save no activations here.

    `names`: the modules of all layers of the model. `where`: from a key to file and line. Raises
    UserError for any other pattern that matches no module.
    """
    idle = [pattern for pattern in patterns if not matching(pattern, names)]
    for pattern in idle:
        written = pattern.replace("\\.", ".")
        if not _FREE.fullmatch(written):
            known = [spelled for name in names for spelled in spellings(name)]
            raise UserError(
                f"{key}: {pattern!r}",
                where=where(key),
                rule="the layers of this model have no such module",
                nearest=did_you_mean(written, known) or f"Known: {', '.join(names)}",
            )
    return idle


def layers_selected(value: bool | Sequence[Any], split: StageSplit) -> frozenset[int]:
    """Numbers of the layers that a boolean or a list of entries selects.

    An entry is a boolean or a number of layers, counted from the first. A list has one entry a
    pipeline rank, dealt one by one to the stages of the rank, or one list for each stage of a rank
    with an entry for each rank. Missing entries are 0. (As in MindFormers.)
    """
    chosen: set[int] = set()
    for rank in set(split.ranks):
        stages = [split.layers[stage] for stage in split.stages_of(rank)]
        counts = _counts(value, rank, [len(layers) for layers in stages])
        for layers, count in zip(stages, counts, strict=True):
            chosen.update(layers[:count])
    return frozenset(chosen)


def _counts(value: bool | Sequence[Any], rank: int, sizes: list[int]) -> list[int]:
    """How many layers are selected in each stage of `rank`; the stages have `sizes` layers."""
    if isinstance(value, bool):
        return [_number(value, size) for size in sizes]
    if not any(isinstance(row, list) for row in value):
        return _dealt(_number(_entry(value, rank), sum(sizes)), sizes)
    rows = [*value, *[False] * len(sizes)]
    return [_number(_entry(row, rank), size) for row, size in zip(rows, sizes, strict=False)]


def _entry(row: bool | int | Sequence[Any], rank: int) -> bool | int:
    if isinstance(row, bool):
        return row
    entries = row if isinstance(row, Sequence) else [row]
    return entries[rank] if rank < len(entries) else 0


def _number(entry: bool | int, size: int) -> int:
    return size * entry if isinstance(entry, bool) else min(entry, size)


def _dealt(number: int, sizes: list[int]) -> list[int]:
    """`number` dealt to the stages one by one, up to their sizes."""
    dealt = [0] * len(sizes)
    while sum(dealt) < number:
        for stage, size in enumerate(sizes):
            if sum(dealt) < number and dealt[stage] < size:
                dealt[stage] += 1
    return dealt


Selection = Mapping[str, frozenset[int]]
"""Pattern -> numbers of the layers it applies to."""


def selection(value: Any, split: StageSplit, default: Collection[str]) -> dict[str, frozenset[int]]:
    """The selection of a boolean, of patterns, of entries, or of patterns with entries; `default`
    are the patterns where none are given."""
    if isinstance(value, Mapping):
        return {str(pattern): layers_selected(entry, split) for pattern, entry in value.items()}
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return {pattern: layers_selected(True, split) for pattern in value}
    return {pattern: layers_selected(value, split) for pattern in default}


def selected(selection: Selection, layer: int, names: Collection[str]) -> set[str]:
    """Those of `names`, the modules of the layer with this number, that are selected."""
    return {
        name
        for pattern, layers in selection.items() if layer in layers
        for name in matching(pattern, names)
    }  # fmt: skip
