"""`pet_config` of MindFormers: names of its layers in `target_modules`, and what is frozen.

Owns what these names are in files of Hugging Face. MindFormers matches each alternative of the
expression anywhere in a name, so that `.*wq|.*wv` means the layers `q_proj` and `v_proj`. Its names
of MLPs never mean routed experts.
"""

from __future__ import annotations

import re

from launcher.config.draft import Draft, asks_for_nothing
from launcher.mindspore.sections.values import is_of_mindformers, move_keys, written

_SECTION = "pet_config"
_QKV, _KV = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_ATTENTION: dict[str, tuple[str, ...]] = {
    "wq": ("q_proj",), "wk": ("k_proj",), "wv": ("v_proj",), "wo": ("o_proj",), "w_qkv": _QKV,
    "linear_qkv": _QKV, "linear_q": ("q_proj",), "linear_q_proj": ("q_proj",), "linear_kv": _KV,
    "linear_proj": ("o_proj",), "query_key_value": _QKV,
    "linear_q_down_proj": ("q_a_proj",), "linear_q_up_proj": ("q_b_proj",),
    "linear_kv_down_proj": ("kv_a_proj_with_mqa",), "linear_kv_up_proj": ("kv_b_proj",),
    "q2l_proj": ("q_a_proj",), "l2q_proj": ("q_b_proj",),
    "kv2l": ("kv_a_proj_with_mqa",), "lkv2kv": ("kv_b_proj",),
}  # fmt: skip
_MLP: dict[str, tuple[str, ...]] = {
    "w1": ("gate_proj",), "w2": ("down_proj",), "w3": ("up_proj",), "w_gate_hidden": _GATE_UP,
    "linear_fc1": _GATE_UP, "linear_fc2": ("down_proj",),
    "dense_h_to_4h": _GATE_UP, "dense_4h_to_h": ("down_proj",),
}  # fmt: skip
_EMBEDDINGS = ("word_embeddings", "tok_embeddings")
_ROUTED = r".*\.experts\..*"
"""Names in files of layers of routed experts."""
DROPOUT = 0.01
"""lora_dropout that MindFormers takes where none is written."""


def translate(draft: Draft) -> None:
    """Translate the section."""
    if written(draft, "lora_config") is not None and not asks_for_nothing(
        written(draft, "lora_config")
    ):
        move_keys(draft, "lora_config", _SECTION)
    else:
        draft.drop("lora_config", "it is off")
    if not isinstance(written(draft, _SECTION), dict):
        return
    is_theirs = _targets(draft) or is_of_mindformers(draft)
    _frozen(draft)
    if is_theirs and draft.find(f"{_SECTION}.lora_dropout") is None:
        draft.imply(f"{_SECTION}.lora_dropout", DROPOUT, f"{_SECTION}.target_modules")


def _targets(draft: Draft) -> bool:
    """Translate target_modules. Returns whether it has names of MindFormers."""
    key = f"{_SECTION}.target_modules"
    value = written(draft, key)
    known = {**_ATTENTION, **_MLP}
    if "mixtral" in str(written(draft, "model.model_config.type", "")).lower():
        known = {name: own for name, own in known.items() if name not in ("w1", "w2", "w3")}
    alternatives = value.split("|") if isinstance(value, str) else value or []
    names = [re.sub(r"^\.\*\.?|\.?\*$", "", str(part).strip()) for part in alternatives]
    if not names or not all(name in known or name in _EMBEDDINGS for name in names):
        return False
    own = [part for name in names for part in known.get(name, ())]
    embeddings = [name for name in names if name in _EMBEDDINGS]
    why = "names in files of Hugging Face"
    if embeddings:
        why += f"; {', '.join(embeddings)}: left out, an embedding has no adapter here (train it "
        why += "in full: modules_to_save)"
    draft.replace(key, {key: list(dict.fromkeys(own))}, why)
    is_mlp = any(name in _MLP for name in names)
    if is_mlp and draft.find(f"{_SECTION}.exclude_modules") is None:
        draft.imply(f"{_SECTION}.exclude_modules", _ROUTED, key)
    return True


def _frozen(draft: Draft) -> None:
    """An adapter freezes everything but itself, as `freeze_include: ['*']` with `freeze_exclude:
    ['*lora*']` asks."""
    include, exclude = (f"{_SECTION}.freeze_{kind}" for kind in ("include", "exclude"))
    if written(draft, include, []) == ["*"] and written(draft, exclude, []) in ([], ["*lora*"]):
        for key in (include, exclude):
            draft.drop(key, "an adapter alone is trained")
