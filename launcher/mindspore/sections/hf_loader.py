"""HFDataLoader and CommonDataLoader of MindFormers, in keys of this launcher.

Owns what the steps of `handler` mean: an alpaca handler is InstructionDataLoader with a prompt
template, PackingHandler is `packing`, a method of `datasets.Dataset` is a step of `transforms`. How
the result differs from theirs is in the reason of each change: labels are shifted once.
"""

from __future__ import annotations

from typing import Any

from launcher.config.draft import Change, Draft, asks_for_nothing, is_from_command_line
from launcher.config.key_checks import plain_value
from launcher.config.nodes import Node, NoPlace, put, without
from launcher.config.schema.data import RECORD_FORMATS
from launcher.config.schema.transforms import REFUSED, TRANSFORMS
from launcher.errors import did_you_mean
from launcher.mindspore.sections.values import is_on, names, prune, refuse, word, written

LOADERS = ("HFDataLoader", "CommonDataLoader")
PROMPT_HANDLERS = {
    "AlpacaInstructDataHandler": "mindformers_alpaca",
    "CodeAlpacaInstructDataHandler": "mindformers_code_alpaca",
}
PACKING = "PackingHandler"
NOT_BUILT = ("AdgenInstructDataHandler", "LlavaInstructDataHandler")
HANDLERS = (*PROMPT_HANDLERS, PACKING, *NOT_BUILT)

_PACKED = (
    "packing keeps samples apart; labels are shifted once, and samples are placed by first fit: "
    "a long one is cut and counted, not left out"
)
_PROMPTED = (
    "the tokens are those of the handler since 2026; labels are shifted once, whatever handlers "
    "follow"
)
_CONCATENATED = "samples are one stream that is cut; labels are shifted once"
_STRATEGIES = {"pack": ("", _PACKED), "truncate": ("concatenate", _CONCATENATED)}
_COLUMN_KEYS = {"prompt_key": "instruction", "input_key": "input", "output_key": "output"}
_NO_EFFECT = {
    "padding": "rows are always padded, and padding has no loss",
    "is_dynamic": "rows have one length; padding has no loss",
    "pad_token_id": "padding has no loss",
    "pad_token": "padding has no loss",
    "output_columns": "the columns are always input_ids and labels",
    "packing": "PackingHandler decides",
}
_TOKENIZER_NO_EFFECT = {
    "trust_remote_code": "only --trust_remote_code on the command line is used",
    "padding_side": "padding is on the right, and has no loss",
    "use_fast": "the fast tokenizer is used where there is one",
}
_IGNORED_LABEL = -100


def translate_loader(draft: Draft, section: str, loader: str) -> None:
    """Translate `loader`, the one of `section` or an entry of its list, if it is one of LOADERS."""
    _tokenizer(draft, f"{section}.tokenizer")
    if word(draft, f"{loader}.type") not in LOADERS:
        return
    _other_files(draft, loader)
    if written(draft, f"{loader}.split") is None:
        draft.drop(f"{loader}.split", "it is null: `train` is read")
    if loader == f"{section}.data_loader":  # a source of a mixture has a name
        draft.rename(f"{loader}.name", f"{loader}.subset", "the folder of one configuration")
    _tokenizer(draft, f"{loader}.tokenizer")
    _strategy(draft, section, f"{loader}.packing")
    _adaptor(draft, f"{loader}.adaptor_config")
    draft.drop(f"{loader}.column_names", "the columns are always input_ids and labels")
    _handlers(draft, section, loader)


def _other_files(draft: Draft, loader: str) -> None:
    """Files on the command line are read instead of those of a file, or of a name on a hub."""
    given = [draft.find(f"{loader}.{name}") for name in ("dataset_dir", "dataset_files")]
    if not any(is_from_command_line(node) for node in given if node is not None):
        return
    for name in ("path", "name", "data_dir", "data_files"):
        node = draft.find(f"{loader}.{name}")
        is_format = name == "path" and word(draft, f"{loader}.path") in RECORD_FORMATS
        if node is not None and not is_format and not is_from_command_line(node):
            draft.drop(f"{loader}.{name}", "the command line names other files")


def _handlers(draft: Draft, section: str, loader: str) -> None:
    key = f"{loader}.handler"
    node = draft.find(key)
    if node is None:
        return
    if asks_for_nothing(plain_value(node)):
        draft.drop(key, "it is empty")
        return
    if isinstance(node.value, dict) and "type" in node.value:
        node = Node(value=[node], where=node.where)
        draft.tree = put(draft.tree, key, node)
    if not isinstance(node.value, list):
        refuse(
            draft, key, "a handler is a list of steps, each with its type",
            advice="Write `handler: [{type: take, n: 2000}, ...]`",
        )  # fmt: skip
        return
    kinds = [word(draft, f"{key}.{index}.type") for index in range(len(node.value))]
    if _are_in_order(draft, key, kinds):
        for index, kind in enumerate(kinds):
            _handler(draft, section, f"{key}.{index}", kind)
        _steps(draft, loader, [i for i, kind in enumerate(kinds) if kind not in HANDLERS])
    draft.imply(f"{loader}.shuffle", False, key)  # their default
    draft.tree = without(draft.tree, key)


def _are_in_order(draft: Draft, key: str, kinds: list[str]) -> bool:
    """Whether steps on records come before those that make tokens of them."""
    made = next((i for i, kind in enumerate(kinds) if kind in HANDLERS), len(kinds))
    for index, kind in enumerate(kinds):
        if index > made and kind not in HANDLERS:
            draft.refuse(
                f"{key}.{index}.type",
                f"{kinds[made]} makes tokens of the records before this step",
                advice=f"Move `{kind}` before {kinds[made]}: it then works on records",
            )
            return False
    repeated = next((kind for kind in PROMPT_HANDLERS if kinds.count(kind) > 1), "")
    if repeated or all(kind in kinds for kind in PROMPT_HANDLERS):
        draft.refuse(key, "records are put into one prompt", advice="Keep one of these handlers")
        return False
    return True


def _handler(draft: Draft, section: str, step: str, kind: str) -> None:
    """Translate one step that makes tokens or rows."""
    loader = step.rpartition(".handler.")[0]
    if kind in NOT_BUILT:
        draft.refuse(
            f"{step}.type", "not built yet", nearest=f"Nearest: {next(iter(PROMPT_HANDLERS))}",
            advice="Use rename_columns and column_map to name the columns of alpaca records",
        )  # fmt: skip
    elif kind in PROMPT_HANDLERS:
        _arguments(draft, section, step, kind)
        values = {
            f"{loader}.type": "InstructionDataLoader",
            f"{loader}.format": "alpaca",
            f"{loader}.prompt_template": PROMPT_HANDLERS[kind],
        }
        draft.tree = without(draft.tree, f"{loader}.type")
        draft.replace(f"{step}.type", values, _PROMPTED)
    elif kind == PACKING:
        _arguments(draft, section, step, kind)
        if draft.find(f"{step}.pack_strategy") is not None:
            _strategy(draft, section, f"{step}.pack_strategy")
            draft.drop(f"{step}.type", "train_dataset.packing has the same effect")
        else:
            draft.replace(f"{step}.type", {f"{section}.packing": True}, _PACKED)


def _arguments(draft: Draft, section: str, step: str, kind: str) -> None:
    """Translate the arguments of a handler; unknown ones are problems."""
    loader = step.rpartition(".handler.")[0]
    why = "rows have one length, that of the data section"
    draft.rename(f"{step}.seq_length", f"{section}.seq_length", why)
    _tokenizer(draft, f"{step}.tokenizer")
    for name in ("pretrained_model_dir", "tokenizer_name"):
        draft.rename(f"{step}.{name}", "processor.tokenizer.pretrained_model_dir")
    for name, reason in _NO_EFFECT.items():
        draft.drop(f"{step}.{name}", reason)
    for name in ("ignore_token_id", "ignore_token"):
        if written(draft, f"{step}.{name}", _IGNORED_LABEL) == _IGNORED_LABEL:
            draft.drop(f"{step}.{name}", "labels without a target are -100")
        else:
            refuse(draft, f"{step}.{name}", f"labels without a target are {_IGNORED_LABEL}",
                   nearest=f"Nearest: {_IGNORED_LABEL}")  # fmt: skip
    if kind == PACKING:
        if is_on(draft, f"{step}.dataset_shuffle"):
            draft.rename(f"{step}.dataset_shuffle", f"{loader}.shuffle", "rows are shuffled")
        draft.drop(f"{step}.dataset_shuffle", "it is off")
        draft.drop(f"{step}.seed", "the seed of the data section decides")
    else:
        for name, field in _COLUMN_KEYS.items():
            if written(draft, f"{step}.{name}", field) == field:
                draft.drop(f"{step}.{name}", "it is the default")
            else:
                draft.rename(f"{step}.{name}", f"{loader}.column_map.{field}")
    allowed = ("seq_length", "tokenizer", "pack_strategy", *_NO_EFFECT, *_COLUMN_KEYS)
    for name in names(draft, step):
        if name not in ("type", "pack_strategy"):
            refuse(draft, f"{step}.{name}", f"not an argument of {kind}",
                   nearest=did_you_mean(name, allowed))  # fmt: skip


def _strategy(draft: Draft, section: str, key: str) -> None:
    """`pack` or `truncate`, as rows that are packed."""
    value = written(draft, key)
    if draft.find(key) is None:
        return
    if asks_for_nothing(value):
        draft.drop(key, "it is off")
    elif value not in _STRATEGIES:
        refuse(draft, key, f"must be one of: {', '.join(_STRATEGIES)}",
               nearest=did_you_mean(str(value), _STRATEGIES))  # fmt: skip
    else:
        strategy, why = _STRATEGIES[value]
        values: dict[str, Any] = {f"{section}.packing": True}
        if strategy:
            values[f"{section}.packing_strategy"] = strategy
        draft.replace(key, values, why)


def _adaptor(draft: Draft, key: str) -> None:
    node = draft.find(key)
    known = ("compress_mask", "eod_pad_length")
    unknown = [name for name in names(draft, key) if name not in known]
    if node is None:
        return
    if unknown:
        refuse(draft, f"{key}.{unknown[0]}", "not a key of adaptor_config",
               nearest=did_you_mean(unknown[0], ("compress_mask", "eod_pad_length")))  # fmt: skip
    draft.drop(key, "attention follows from the document boundaries")


def _tokenizer(draft: Draft, key: str) -> None:
    """The tokenizer of a handler or a loader is that of the run."""
    node = draft.find(key)
    if node is None or not isinstance(node.value, dict):
        return
    for name in names(draft, key):
        if name in _TOKENIZER_NO_EFFECT:
            draft.drop(f"{key}.{name}", _TOKENIZER_NO_EFFECT[name])
        else:
            draft.rename(f"{key}.{name}", f"processor.tokenizer.{name}", "a run has one tokenizer")
    prune(draft, key)


def _steps(draft: Draft, loader: str, indices: list[int]) -> None:
    """The steps on records, each at the place where it was written."""
    entries = [draft.find(f"{loader}.handler.{index}") for index in indices]
    found = [entry for entry in entries if entry is not None]
    if not found:
        return
    for index in indices:
        key = f"{loader}.handler.{index}"
        kind = word(draft, f"{key}.type")
        is_step = kind in TRANSFORMS or kind in REFUSED
        if not is_step and (near := did_you_mean(kind, HANDLERS)):
            draft.refuse(f"{key}.type", "there is no such handler", nearest=near)
            return
    new, why = f"{loader}.transforms", "steps on records"
    renamed = [(f"{loader}.handler", new, Node(value=found, where=found[0].where))]
    for place, index in enumerate(indices):
        renamed.append((f"{loader}.handler.{index}", f"{new}.{place}", found[place]))
    draft.changes += [
        Change(kind="renamed", key=old, value=node.plain(), where=node.where, new_keys=(key,),
               why=why)
        for old, key, node in renamed
    ]  # fmt: skip
    try:
        draft.tree = put(draft.tree, new, Node(value=found, where=found[0].where))
    except NoPlace as error:
        draft.refuse(f"{loader}.handler", str(error))
