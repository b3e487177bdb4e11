"""The order in which the keys of a MindFormers model are translated.

Owns the steps. The family is first, because the others ask for it; what has no effect is last, so
that each step sees all that was written.
"""

from __future__ import annotations

from launcher.config.draft import Draft
from launcher.mindspore.model_section import (
    balance,
    experts,
    family,
    layout,
    moe_config,
    precision,
    rope,
    sizes,
    spellings,
    stages,
    switches,
    unused,
)
from launcher.mindspore.model_section.keys import SECTION, ModelKeys, config_json_of

KEYS: frozenset[str] = frozenset().union(
    rope.KEYS, sizes.KEYS, switches.KEYS, precision.KEYS, layout.KEYS, unused.KEYS, balance.KEYS,
    experts.KEYS, ("moe_config",),
)  # fmt: skip
"""The keys of model_config that are translated."""


def translate(draft: Draft) -> None:
    """Translate `model.model_config` and `moe_config` into keys of config.json."""
    for section in ("model", SECTION):
        node = draft.find(section)
        if node is not None and (node.is_text or not isinstance(node.value, dict | None)):
            return  # reported when it is typed
    keys = ModelKeys(draft, config_json=config_json_of(draft))
    spellings.translate(keys)
    found = len(draft.problems)
    family.choose(keys)
    if len(draft.problems) > found:
        return  # what the other keys mean follows from the family
    sizes.rename(keys)
    family.imply_defaults(keys)
    layout.translate(keys)
    moe_config.translate(keys)
    experts.translate(keys)
    balance.translate(keys)
    rope.translate(keys)
    sizes.translate(keys)
    switches.translate(keys)
    precision.translate(keys)
    stages.translate(keys)
    unused.translate(keys)
