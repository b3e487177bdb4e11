"""The numbers of a model that decide how its weights are laid out, from its config.json.

Config files of models that transformers has no class for (chatglm, telechat) spell some keys in
their own way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import UserError

_KEYS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embed"),
    "heads": ("num_attention_heads", "n_head"),
    "groups": ("num_key_value_heads", "multi_query_group_num"),
    "head_size": ("head_dim", "kv_channels"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_width": ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size"),
    "prediction_layers": ("num_nextn_predict_layers",),
    "query_rank": ("q_lora_rank",),
    "key_value_rank": ("kv_lora_rank",),
    "plain_size": ("qk_nope_head_dim",),
    "rotary_size": ("qk_rope_head_dim",),
    "value_size": ("v_head_dim",),
}
"""Field of `Sizes` to its spellings, the usual one first."""
_NEEDED = ("layers", "hidden", "heads")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of a model. Those of parts that it does not have are 0."""

    family: str
    """`model_type` of config.json."""
    layers: int
    hidden: int
    heads: int
    groups: int
    """Key/value heads."""
    head_size: int
    experts: int = 0
    expert_width: int = 0
    prediction_layers: int = 0
    """Multi-token prediction modules."""
    query_rank: int = 0
    key_value_rank: int = 0
    plain_size: int = 0
    """Of each head, without rotary embedding (DeepSeek)."""
    rotary_size: int = 0
    value_size: int = 0

    @property
    def group_heads(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.groups


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """The numbers in the content of config.json. Raises `UserError` where one is missing or is not
    an integer."""
    found = {field: _number(config, keys) for field, keys in _KEYS.items()}
    for field in _NEEDED:
        if not found[field]:
            raise UserError(
                f"config.json has no {_KEYS[field][0]}",
                rule="weights under the names of MindFormers are mapped by the sizes of the model",
                advice="Give the config.json of this model",
            )
    if config.get("multi_query_attention") is False:
        found["groups"] = 0
    groups = found["groups"] or found["heads"]
    if found["heads"] % groups:
        raise UserError(
            f"{found['heads']} attention heads, {groups} key/value heads",
            rule="the former must be a multiple of the latter",
            advice="Correct config.json",
        )
    head_size = found["head_size"] or found["hidden"] // found["heads"]
    others = {key: n for key, n in found.items() if key not in ("groups", "head_size")}
    family = str(config.get("model_type", ""))
    return Sizes(family=family, groups=groups, head_size=head_size, **others)


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The value of the first of `keys` that is set; 0 without any."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(
                f"config.json: {key} = {value!r}",
                rule="it must be an integer, 0 or more",
                advice="Correct config.json",
            )
        return value
    return 0
