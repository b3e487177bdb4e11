"""The top level of a MindFormers configuration.

Owns what its single keys mean where that does not follow from their name.
"""

from __future__ import annotations

from launcher.config.draft import Draft
from launcher.mindspore.sections.values import is_of_mindformers, is_on, written


def translate(draft: Draft) -> None:
    """Translate the keys of the top level."""
    for key in ("output_dir", "load_ckpt_format"):
        if written(draft, key, "") == "" and draft.find(key) is not None:
            draft.drop(key, "it is empty")
    _cutting(draft)


def _cutting(draft: Draft) -> None:
    """`auto_trans_ckpt: True` of a template has no effect as long as no weights are given: where
    there are some they are cut if need be. Elsewhere it is an assertion that there are some."""
    is_empty = not written(draft, "load_checkpoint", "")
    if is_empty and is_on(draft, "auto_trans_ckpt") and is_of_mindformers(draft):
        draft.drop("auto_trans_ckpt", "load_checkpoint is empty: there is nothing to cut")
