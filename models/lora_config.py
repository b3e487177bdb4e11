"""Low-rank adapters as plain values: which layers get one, of which rank, and how it is sharded.

Keys and meanings are those of PEFT's `LoraConfig` (https://huggingface.co/docs/peft), so that its
`adapter_config.json` describes the same adapter. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from launcher.weights.adapters.matching import by_pattern, is_named
from models.names import in_files, unstacked
from models.plan import kind_of, rule_of
from models.spec import ModelSpec, Rule

ALL_LINEAR = "all-linear"
"""Of `target_modules`: every linear layer but the head, the router and stacked experts."""
PARTS = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude_vector"
_NOT_ADAPTED = re.compile(r"norm|embed_tokens|(^|\.)(gate|router)\.weight$")
HEAD = "lm_head"

Names = tuple[str, ...]
"""The names of one module: in the decoder and, where it differs, in files."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The low-rank adapter of a model: y = W x + scaling * B A x (https://arxiv.org/abs/2106.09685),
    or with `use_dora` the same weight with rows of a learned length
    (https://arxiv.org/abs/2402.09353)."""

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    """`all-linear`, a regular expression for full module names, or names and endings of names."""
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: str | tuple[str, ...] = ()
    """Modules that are trained and saved in full, by names and endings, or by a regular expression
    for full names. They and the modules in them get no adapter."""
    use_rslora: bool = False
    """Scaling alpha / sqrt(rank) instead of alpha / rank (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    layers: tuple[int, ...] | None = None
    """Numbers of the layers with adapters; None: all. A full name in `target_modules` counts in any
    layer."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Ending of a module name, or a regular expression for it -> another value than the default."""

    def targets(self, names: Names) -> bool:
        """Whether the linear layer of these names gets an adapter."""
        if self.exclude_modules and any(is_named(name, self.exclude_modules) for name in names):
            return False
        if any(self.saves(f"{name}.weight") for name in names):
            return False
        if self.layers is not None and layer_of(names[0]) not in self.layers:
            wanted = self.target_modules
            return not isinstance(wanted, str) and any(name in wanted for name in names)
        if self.target_modules == ALL_LINEAR:
            return names[0].rpartition(".")[2] != HEAD and not is_expert(names[0])
        return any(is_named(name, self.target_modules) for name in names)

    def saves(self, parameter: str) -> bool:
        """Whether a parameter of the base model is in `modules_to_save`."""
        return any(is_named(module, self.modules_to_save) for module in parents(parameter))

    def rank_of(self, names: Names) -> int:
        """The rank of the adapter of a module."""
        return by_pattern(self.rank_pattern, names, self.rank)

    def scaling_of(self, names: Names) -> float:
        """The factor of the adapter of a module."""
        alpha, rank = by_pattern(self.alpha_pattern, names, self.alpha), self.rank_of(names)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


def parents(parameter: str) -> list[str]:
    """The modules that hold a parameter, innermost first: `a.b.weight` is in `a.b` and `a`."""
    parts = parameter.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)]


def is_adapter(parameter: str) -> bool:
    """Whether a parameter belongs to an adapter, not to the base model."""
    return MAGNITUDE in parameter or any(
        f".{part}.weight" in parameter or parameter.endswith(f"_{part}") for part in PARTS
    )


def is_saved(parameter: str, lora: LoraConfig | None) -> bool:
    """Whether checkpoints hold a tensor of the model: with an adapter, only its own and those of
    `modules_to_save`."""
    return lora is None or is_adapter(parameter) or lora.saves(parameter)


def is_frozen(parameter: str, patterns: Iterable[str]) -> bool:
    """Whether one of `patterns` names a parameter: by its name or that of a module with it, by the
    ending of such a name, or by a regular expression for all of it."""
    names = (parameter, *parents(parameter))
    return any(
        is_named(name, (pattern,)) or _matches(pattern, name)
        for pattern in patterns for name in names
    )  # fmt: skip


def is_expert(name: str) -> bool:
    """Whether a module name is that of a projection of routed experts."""
    return ".experts." in name


def with_adapters(spec: ModelSpec, lora: LoraConfig | None, frozen: Sequence[str]) -> ModelSpec:
    """`spec` with adapters and frozen parameters, and the rules of their parameters."""
    decoder = spec.decoder
    if lora is not None and decoder is not None:
        decoder = replace(decoder, parameters={**decoder.parameters, **rules(decoder.parameters)})
    return replace(spec, decoder=decoder, lora=lora, frozen=tuple(frozen))


def rules(parameters: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of the parameters of adapters of every linear layer in `parameters`.

    B has the rows of the weight and A its columns: each is sharded as the weight is in that dim,
    and replicated otherwise.
    """
    found: dict[str, Rule] = {}
    for kind, rule in parameters.items():
        if _has_adapter(kind, rule):
            of = _rules_of_stack if _is_stack(kind, rule) else _rules_of_matrix
            found |= of(kind.removesuffix(".weight"), rule)
    return found


def linear_modules(parameters: Mapping[str, Rule], layers: int) -> list[tuple[str, ...]]:
    """The names of each module of a decoder that may have an adapter: in the decoder and, where it
    differs, in files. Stacked experts are one module for each projection, with the name in files of
    the first one."""
    found = []
    for kind, rule in parameters.items():
        if not _has_adapter(kind, rule):
            continue
        numbers = range(layers) if kind != f"{HEAD}.weight" else (None,)
        for number in numbers:
            name = kind if number is None else f"model.layers.{number}.{kind}"
            found.append(module_names(name, (1,), parameters))
    return found


def module_names(weight: str, shape: Sequence[int], parameters: Mapping[str, Rule]) -> Names:
    """The names of the module with the parameter `weight`: in the decoder, and in files."""
    experts = unstacked(weight, shape, parameters)
    stored = experts[0] if experts else in_files(weight, parameters)
    return tuple(dict.fromkeys(name.removesuffix(".weight") for name in (weight, stored)))


def unmatched(wanted: str | Sequence[str], modules: Iterable[Names]) -> list[str]:
    """The entries of `target_modules` or `exclude_modules` that name none of `modules`."""
    names = [name for module in modules for name in module]
    if isinstance(wanted, str):
        found = wanted == ALL_LINEAR or any(is_named(name, wanted) for name in names)
        return [] if found else [wanted]
    return [entry for entry in wanted if not any(is_named(name, (entry,)) for name in names)]


def _has_adapter(kind: str, rule: Rule) -> bool:
    """Whether the module of a parameter may have an adapter."""
    if _NOT_ADAPTED.search(kind) or rule.is_buffer:
        return False
    return _is_stack(kind, rule) or (not rule.expert and kind.endswith(".weight"))


def is_stack(name: str, parameters: Mapping[str, Rule]) -> bool:
    """Whether a parameter is the stacked weights of one projection of experts."""
    return _is_stack(kind_of(name), rule_of(name, parameters))


def _is_stack(kind: str, rule: Rule) -> bool:
    return rule.is_stacked and not kind.endswith("bias")


def _rules_of_matrix(module: str, rule: Rule) -> dict[str, Rule]:
    rows, columns = rule.tp_dim == 0, rule.tp_dim == 1
    plain = Rule(in_region=rule.in_region)
    by_row = replace(plain, tp_dim=0, kv_heads=rule.kv_heads) if rows else plain
    by_column = replace(plain, tp_dim=1) if columns else plain
    found = {
        f"{module}.lora_A.weight": by_column,
        f"{module}.lora_B.weight": by_row,
        f"{module}.{MAGNITUDE}": replace(by_row, tp_dim=0 if rows else None),
    }
    if not rule.in_files:
        return found
    base, own = rule.in_files.removesuffix("weight"), f"{module}."
    return {
        kind: replace(part, in_files=base + kind.removeprefix(own)) for kind, part in found.items()
    }


def _rules_of_stack(kind: str, rule: Rule) -> dict[str, Rule]:
    dims = {"lora_A": 2 if rule.tp_dim == 2 else None, "lora_B": 1 if rule.tp_dim == 1 else None}
    return {
        f"{kind}_{part}": Rule(
            tp_dim=dim, expert=True, in_region=rule.in_region,
            entry=_of_part(rule.entry, part), in_files=_of_part(rule.in_files, part),
        )
        for part, dim in dims.items()
    }  # fmt: skip


def _of_part(name: str, part: str) -> str:
    return f"{name.removesuffix('weight')}{part}.weight" if name else ""


def layer_of(name: str) -> int | None:
    """The number of the layer of a module; None outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
