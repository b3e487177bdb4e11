"""Data sections of MindFormers whose loader is MindDataset.

Owns what their keys about columns, documents and labels become here. MindFormers gives the columns
to the network by position (`input_ids, labels, ...`), or by the names of `construct_args_key`; here
`data_loader.column_map` names those that a row is made of. Columns of known names count by their
name, whatever their position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.config.draft import Draft
from launcher.mindspore.sections.values import count, is_on, written

_BY_POSITION = ("input_ids", "labels")
_READ = {"input_ids": "input_ids", "labels": "labels", "target_ids": "labels",
         "loss_mask": "loss_mask"}  # fmt: skip
"""Name of a column or argument -> what of a row it is."""
_IGNORED = ("attention_mask", "input_position", "input_embeds", "init_reset", "batch_valid_length")
"""Arguments that a training of MindFormers ignores, or that follow from the documents here."""
_POSITIONS = ("position_ids", "actual_seq_len")
_MODEL = "model.model_config"


def translate(draft: Draft, section: str) -> None:
    """Translate one data section, if MindDataset reads it."""
    loaders = _loaders(draft, section)
    if not loaders:
        return
    resets = is_on(draft, f"{section}.eod_reset")
    _labels(draft, loaders)
    _columns(draft, section, loaders, resets=resets)
    _documents(draft, section, loaders, resets=resets)


def _loaders(draft: Draft, section: str) -> list[str]:
    """The keys of the loaders of MindRecord files: one, or those of a mixture."""
    node = draft.find(f"{section}.data_loader")
    keys = [f"{section}.data_loader"]
    if node is not None and isinstance(node.value, list):
        keys = [f"{section}.data_loader.{number}" for number in range(len(node.value))]
    return [key for key in keys if written(draft, f"{key}.type") == "MindDataset"]


def _labels(draft: Draft, loaders: Sequence[str]) -> None:
    """Keys of the model about labels become keys of its data."""
    ignored = count(draft, f"{_MODEL}.ignore_token_id", -100)
    for loader in loaders:
        if is_on(draft, f"{_MODEL}.input_sliced_sig"):
            draft.imply(f"{loader}.labels", "shifted", f"{_MODEL}.input_sliced_sig")
        elif not is_on(draft, "use_legacy", default=True):
            draft.imply(f"{loader}.labels", "shifted", "use_legacy")
        if ignored != -100:
            draft.imply(f"{loader}.ignore_token_id", ignored, f"{_MODEL}.ignore_token_id")


def _columns(draft: Draft, section: str, loaders: Sequence[str], *, resets: bool) -> None:
    keys = {
        name: f"{section}.{name}"
        for name in ("input_columns", "output_columns", "column_order", "construct_args_key")
    }
    lists = {name: written(draft, key) for name, key in keys.items()}
    if not all(value is None or _are_names(value) for value in lists.values()):
        return  # reported when it is typed
    given = lists["input_columns"]
    if given is None and lists["construct_args_key"] is None:
        return
    names = given or lists["construct_args_key"]
    if not resets:
        names = lists["output_columns"] or lists["column_order"] or names
    columns, others = bound(names, lists["construct_args_key"])
    source = keys["input_columns" if given is not None else "construct_args_key"]
    positions = [name for name in others if name in _POSITIONS]
    if positions and not resets:
        draft.refuse(
            source,
            f"{positions[0]} is not read from a column: positions follow from the documents",
            advice="Remove it, and set data_loader.eod_token_id where rows have several documents",
        )
        return
    why = "the columns that a row is made of"
    if others:
        why += f"; a training does not use {', '.join(others)}"
    own = [loader for loader in loaders if draft.find(f"{loader}.column_map") is None]
    draft.replace(source, {f"{loader}.column_map": columns for loader in own or loaders[:1]}, why)
    others_of_them = [key for key in keys.values() if key != source]
    draft.drop_all(others_of_them, "it is part of data_loader.column_map")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def bound(
    names: Sequence[str], arguments: Sequence[str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """What of a row each column is (`{"labels": "target_ids"}`), and the columns that are none.

    names: the columns in order. arguments: the names that they are given to the network under.
    """
    columns, others = dict[str, str](), list[str]()
    for place, name in enumerate(names):
        if arguments is not None:
            argument = arguments[place] if place < len(arguments) else ""
        elif name in _READ or name in (*_IGNORED, *_POSITIONS):
            argument = name
        else:
            argument = _BY_POSITION[place] if place < len(_BY_POSITION) else ""
        role = _READ.get(argument)
        if role is not None and role not in columns:
            columns[role] = name
        else:
            others.append(name)
    return columns, others


def _documents(draft: Draft, section: str, loaders: Sequence[str], *, resets: bool) -> None:
    """`eod_reset` with `eod_token_id` is one key here."""
    reset, token = f"{section}.eod_reset", f"{section}.eod_token_id"
    if not resets:
        draft.drop_all((reset, token), "a row is one document without eod_reset")
        return
    if written(draft, token) is None:
        draft.refuse(
            reset,
            "the token that ends a document is not known",
            advice=f"Set {token}, or data_loader.eod_token_id",
        )
        return
    why = "documents of a row are kept apart where it is set"
    value = written(draft, token)
    draft.replace(token, {f"{loader}.eod_token_id": value for loader in loaders}, why)
    draft.drop(reset, "data_loader.eod_token_id has its effect")
