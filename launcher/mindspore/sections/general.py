"""The top level of a MindFormers configuration.

Owns what its single keys mean where their name alone does not say it.
"""

from __future__ import annotations

from launcher.config.draft import Draft
from launcher.mindspore.sections.values import is_on, written


def translate(draft: Draft) -> None:
    """Translate the keys of the top level."""
    for key in ("output_dir", "load_ckpt_format"):
        if written(draft, key, "") == "" and draft.find(key) is not None:
            draft.drop(key, "it is empty")
    _cutting(draft)


def _cutting(draft: Draft) -> None:
    """`auto_trans_ckpt: True` beside an empty load_checkpoint is a leftover of a template: without
    the key weights are cut where they need to be."""
    node = draft.find("load_checkpoint")
    is_empty = node is not None and written(draft, "load_checkpoint", "") == ""
    if is_empty and is_on(draft, "auto_trans_ckpt"):
        draft.drop("auto_trans_ckpt", "load_checkpoint is empty: there is nothing to cut")
