"""Checks of the keys of config.json about experts, and of sizes specific to one family.

Owns the ranges of those keys, and whether top-k and groups fit the number of experts. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from models.checks import Describe, is_integer, is_number, nearest
from models.spec import Problems

if TYPE_CHECKING:
    from models.families.family import Family

_LEAST = {
    "num_experts": 1, "num_local_experts": 1, "n_routed_experts": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 1, "decoder_sparse_step": 1, "n_shared_experts": 0,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 1,
    "kv_lora_rank": 1, "qk_nope_head_dim": 1, "qk_rope_head_dim": 1, "v_head_dim": 1,
}  # fmt: skip
"""Integer key -> its minimum; only `q_lora_rank` may be None."""
_NOT_NEGATIVE = ("router_aux_loss_coef", "routed_scaling_factor", "router_topk_scaling_factor")
_FLAGS = ("norm_topk_prob", "output_router_logits", "rope_interleave")


class ExpertsCheck:
    """The checks of one configuration: single values first, then their combination."""

    def __init__(
        self, own: Family, config: Mapping[str, Any], describe: Describe, problems: Problems
    ) -> None:
        self.own, self.config = own, config
        self.describe, self.problems = describe, problems

    def run(self) -> None:
        before = len(self.problems)
        self._values()
        if len(self.problems) == before:
            self._top_k()
            if is_integer(self.config["num_attention_heads"]):
                self.own.check(dict(self.config), self._add)

    def _add(self, key: str, rule: str, near: str = "", advice: str = "") -> None:
        what, written = self.describe(key)
        self.problems.log(what, rule, nearest=near, advice=advice, key=written)

    def _values(self) -> None:
        config, own = self.config, {**self.own.defaults, **self.own.beyond}
        for key, least in _LEAST.items():
            absent = key not in own or (key == "q_lora_rank" and config[key] is None)
            if not absent and not is_integer(config[key], least):
                self._add(key, f"must be an integer of at least {least}")
        for key in _FLAGS:
            if key in own and not isinstance(config[key], bool):
                self._add(key, "must be True or False")
        for key in _NOT_NEGATIVE:
            if key in own and not (is_number(config[key]) and config[key] >= 0):
                self._add(key, "must be a number of at least 0")
        dense = config.get("mlp_only_layers")
        is_list = isinstance(dense, list | tuple) and all(is_integer(layer, 0) for layer in dense)
        if dense is not None and not is_list:
            self._add("mlp_only_layers", "must be a list of layer numbers, from 0")
        if config.get("router_jitter_noise"):
            self._add("router_jitter_noise", "router noise is not built yet", "Nearest: 0.0")
        for key, only in self.own.fixed.items():
            if config.get(key, only) != only:
                self._add(key, "this family supports only one value", f"Nearest: {only}")
        if config["output_router_logits"] is True and "router_aux_loss_coef" not in own:
            rule = "this family has no balance loss"
            self._add("output_router_logits", rule, "Nearest: False")

    def _top_k(self) -> None:
        """Whether top-k and groups fit the number of experts."""
        config = self.config
        count_key = str(self.own.expert_count)
        count, chosen = config[count_key], config["num_experts_per_tok"]
        if chosen > count:
            rule = f"must be at most the number of experts, {count}"
            self._add("num_experts_per_tok", rule, nearest(count))
        if "n_group" not in self.own.defaults:
            return
        groups, kept = config["n_group"], config["topk_group"]
        if count % groups or count // groups < 2:
            rule = f"cannot be divided into {groups} groups of at least 2 experts"
            below = max(count // groups, 2) * groups
            self._add(count_key, rule, nearest(below, below + groups))
        elif kept > groups:
            self._add("topk_group", f"there are only {groups} groups", nearest(groups))
        elif chosen > kept * count // groups:
            rule = f"there are fewer experts in {kept} groups of {count // groups}"
            self._add("num_experts_per_tok", rule, nearest(kept * count // groups))
