"""The description of a family, and the parts of it that several families share.

A family has defaults (those of the transformers configuration class; a test compares), the step
from its config.json to the decoder's configuration, and a rule for each kind of parameter.
Torch-free. A new family is a file in this package and a line in `table`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.checks import LAYER_TYPES
from models.keys import EXPERT_COUNTS
from models.spec import ExpertsConfig, Rule

Config = dict[str, Any]
"""A complete config.json, checked."""

Add = Callable[[str, str, str, str], None]
"""Adds a problem: (key of config.json, rule, nearest, advice)."""


def _no_windows(config: Config) -> tuple[int | None, ...]:
    return (None,) * config["num_hidden_layers"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type with a native decoder."""

    config_class: str
    architecture: str
    defaults: Mapping[str, Any]
    """Keys of config.json that transformers reads for the family, and their defaults."""
    parameters: Mapping[str, Rule]
    """The rule of every kind of parameter, by its name below its layer."""
    in_transformers: bool = True
    """Whether transformers has the configuration class and the model."""
    config_keys: Mapping[str, str] = field(default_factory=dict)
    """Key of config.json, as most families spell it -> its spelling in this family's config.json.
    Both are read, the latter is written."""
    qkv_bias: bool | None = None
    """True or False if the family fixes it, None if `attention_bias` decides."""
    output_bias: bool = False
    """Whether the output projection of attention has a bias if q, k and v have one."""
    windows: Callable[[Config], tuple[int | None, ...]] = _no_windows
    """The sliding window of every layer. Adds to the configuration what transformers derives."""
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_theta": 10000.0})
    """Default rope settings; the `rope_theta` also if config.json has settings without it."""
    partial_rotary_factor: float | None = None
    """The default fraction of a head that is rotated; None: partial rotary embeddings are not
    supported."""
    expert_count: str | None = None
    """The key of the number of experts; None: a dense family."""
    experts: Callable[[Config], ExpertsConfig | None] = lambda config: None
    options: Callable[[Config], dict[str, Any]] = lambda config: {}
    """Further fields of `DecoderConfig` that this family sets."""
    check: Callable[[Config, Add], None] = lambda config, add: None
    """Adds problems with sizes specific to this family."""
    with_experts: Family | None = None
    """Of a dense family, the one with experts of the same model type."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further spelling -> key, as `defaults` has it."""
    has_latent: bool = False
    """Latent attention (MLA), whose head sizes have other keys."""
    reads_mxfp4: bool = False
    """Whether its files may have MXFP4 experts (`launcher.weights.mxfp4`)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that transformers does not read -> the only supported value."""
    unread: frozenset[str] = frozenset()
    """Further keys of its config.json, that nothing reads."""
    beyond: Mapping[str, Any] = field(default_factory=dict)
    """Keys that the decoder reads and transformers does not -> the value with which both are equal.
    """
    mindformers_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """A component of a layer module's name, as selected by recompute and offload -> its names in
    MindFormers; in addition to those of `launcher.parallel.layer_modules`."""

    @property
    def spellings(self) -> dict[str, str]:
        """Other spelling -> key, as `defaults` has it."""
        counts = EXPERT_COUNTS - {self.expert_count} if self.expert_count is not None else ()
        by_family = {name: key for key, name in self.config_keys.items()}
        by_count = dict.fromkeys(counts, str(self.expert_count))
        return {**by_count, **by_family, **self.aliases}

    def variant(self, *configs: Mapping[str, Any]) -> Family:
        """This family, or the one with experts if one of `configs` has several."""
        own = self.with_experts
        if own is None:
            return self
        names = {
            own.expert_count,
            *(n for n, key in own.spellings.items() if key == own.expert_count),
        }
        counts = [config[name] for config in configs for name in names if name in config]
        return own if any(isinstance(count, int) and count > 1 for count in counts) else self

    @property
    def own_keys(self) -> set[str]:
        """Keys of config.json that are specific to this family."""
        partial = {"partial_rotary_factor"} if self.partial_rotary_factor is not None else set()
        return {*self.defaults, *self.fixed, *self.unread, *self.beyond, *partial}

    def has_qkv_bias(self, config: Mapping[str, Any]) -> bool:
        """Whether q, k and v have biases."""
        return bool(config.get("attention_bias")) if self.qkv_bias is None else self.qkv_bias


# Defaults of most configuration classes.

COMMON: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True,
    "pad_token_id": None, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
BALANCE: dict[str, Any] = {"output_router_logits": False, "router_aux_loss_coef": 0.001}

# Rules of the parameters that most families share.

COLUMNS, ROWS, REPLICATED = Rule(tp_dim=0), Rule(tp_dim=1), Rule()
HEADS = Rule(tp_dim=0, kv_heads=True)
BETWEEN = Rule(in_region=False)
ADDED_ONCE = Rule(added_once=True)

ENDS = {
    "model.embed_tokens.weight": Rule(tp_dim=0, in_region=False),
    "model.norm.weight": BETWEEN,
    "lm_head.weight": COLUMNS,
}
NORMS = {"input_layernorm.weight": BETWEEN, "post_attention_layernorm.weight": BETWEEN}
ATTENTION = {
    "self_attn.q_proj.weight": COLUMNS, "self_attn.q_proj.bias": COLUMNS,
    "self_attn.k_proj.weight": HEADS, "self_attn.k_proj.bias": HEADS,
    "self_attn.v_proj.weight": HEADS, "self_attn.v_proj.bias": HEADS,
    "self_attn.o_proj.weight": ROWS, "self_attn.o_proj.bias": ADDED_ONCE,
    "self_attn.q_norm.weight": REPLICATED, "self_attn.k_norm.weight": REPLICATED,
}  # fmt: skip


def mlp(module: str = "mlp") -> dict[str, Rule]:
    """The rules of a gated MLP, the `module` of a layer."""
    return {
        f"{module}.gate_proj.weight": COLUMNS, f"{module}.gate_proj.bias": COLUMNS,
        f"{module}.up_proj.weight": COLUMNS, f"{module}.up_proj.bias": COLUMNS,
        f"{module}.down_proj.weight": ROWS, f"{module}.down_proj.bias": ADDED_ONCE,
    }  # fmt: skip


def expert_stacks(
    block: str = "mlp", entries: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Rule]:
    """The rules of router and stacked gated experts [experts, out, in], the module `block` of a
    layer.

    `entries`: names in files of gate, up and down of one expert.
    """
    gate, up, down = (f"{entry}.weight" for entry in entries)
    return {
        f"{block}.gate.weight": REPLICATED,
        f"{block}.experts.gate_proj": Rule(tp_dim=1, expert=True, entry=gate),
        f"{block}.experts.up_proj": Rule(tp_dim=1, expert=True, entry=up),
        f"{block}.experts.down_proj": Rule(tp_dim=2, expert=True, entry=down),
    }


DENSE = ENDS | NORMS | ATTENTION | mlp()
CORRECTED = {"mlp.gate.e_score_correction_bias": Rule(is_buffer=True)}
"""The score correction bias of a router with sigmoid scores."""


def experts_of(config: Config, count: int, **more: Any) -> ExpertsConfig:
    """The configuration of `count` experts; `more`: fields that differ by family."""
    is_balanced = config["output_router_logits"] and "router_aux_loss_coef" in config
    fields: dict[str, Any] = {
        "layers": (True,) * config["num_hidden_layers"],
        "intermediate_size": config.get("moe_intermediate_size") or config["intermediate_size"],
        "norm_topk_prob": config.get("norm_topk_prob", True),
        "routed_scaling_factor": float(
            config.get("routed_scaling_factor", config.get("router_topk_scaling_factor", 1.0))
        ),
        "balance_coefficient": float(config["router_aux_loss_coef"]) if is_balanced else 0.0,
    }
    return ExpertsConfig(
        num_experts=count, experts_per_token=config["num_experts_per_tok"], **fields | more
    )


def grouped_experts_of(config: Config) -> ExpertsConfig:
    """Grouped experts with sigmoid scores and shared experts, after dense layers (DeepSeek-V3)."""
    first = config["first_k_dense_replace"]
    return experts_of(
        config, config["n_routed_experts"],
        layers=tuple(layer >= first for layer in range(config["num_hidden_layers"])),
        shared_experts=config["n_shared_experts"],
        scoring="sigmoid",
        groups=config["n_group"],
        groups_per_token=config["topk_group"],
    )  # fmt: skip


# Sliding windows.


def same_window(config: Config) -> tuple[int | None, ...]:
    """`sliding_window` in every layer; None if `use_sliding_window` is off."""
    if not config.get("use_sliding_window", True):
        config["sliding_window"] = None
    return (config["sliding_window"],) * config["num_hidden_layers"]


def windows_by_type(config: Config, types: list[str]) -> tuple[int | None, ...]:
    """`sliding_window` in the sliding layers of `layer_types`, by default `types`."""
    if config.get("layer_types") is None:
        config["layer_types"] = types
    window = config["sliding_window"]
    return tuple(window if kind == LAYER_TYPES[1] else None for kind in config["layer_types"])
