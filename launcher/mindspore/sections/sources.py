"""MultiSourceDataLoader of MindFormers as a list of data loaders, which is a mixture here.

Owns the meaning of its arguments (mindformers/dataset/dataloader/multi_source_dataloader.py):

    sub_data_loader                   the sources
    sub_data_loader_args, any other   arguments of every source, before its own
    nums_per_dataset                  so many rows of each source in an epoch
    dataset_ratios, samples_count     the same: ratio * samples_count, rounded down
    shuffle                           True, global: sources and files; files: the sources only

Both programs then blend the sources by these numbers. Sources one after another (`shuffle: False`
or `infile`) and indices from a file are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from launcher.config.draft import Change, Draft
from launcher.config.key_checks import plain_value
from launcher.config.nodes import Node, from_plain, put
from launcher.config.schema import MixtureSourceSection
from launcher.errors import did_you_mean
from launcher.mindspore.sections.hf_loader import LOADERS as HF_LOADERS
from launcher.mindspore.sections.values import refuse, written

TYPE = "MultiSourceDataLoader"
_NOTHING = Node(value=None, where="")
_NO_EFFECT = {
    "shuffle_buffer_size": "the blend is computed, nothing is buffered",
    "data_source_type": "rows are always read by their number",
    "num_shards": "every rank reads exactly its share",
    "shard_id": "every rank reads exactly its share",
}
_OF_A_SOURCE = frozenset(field.name for field in fields(MixtureSourceSection))
_REFUSED = ("load_indices_npz_path", "save_indices_npz_path")
_OWN = (
    *("type", "sub_data_loader", "sub_data_loader_args", "shuffle"),
    *("dataset_ratios", "samples_count", "nums_per_dataset"), *_NO_EFFECT, *_REFUSED,
)  # fmt: skip


def translate_sources(draft: Draft, section: str, *, is_evaluation: bool) -> None:
    """Write the sources of a MultiSourceDataLoader as a list, or refuse what cannot be one."""
    key = f"{section}.data_loader"
    if written(draft, f"{key}.type") != TYPE:
        return
    refused = len(draft.problems)
    sources = _sources(draft, key)
    numbers = _numbers(draft, key, len(sources)) if sources else []
    shuffle = _shuffle(draft, key, is_evaluation=is_evaluation)
    for name in _REFUSED:
        if written(draft, f"{key}.{name}") is not None:
            rule = "indices are not read from files or written: they follow from the seed"
            refuse(draft, f"{key}.{name}", rule, advice="Remove it")
    if len(draft.problems) > refused:
        _leave_the_problems(draft, key)
        return
    node = draft.find(key)
    assert node is not None
    common = {name: child for name, child in node.value.items() if name not in _OWN}
    _check_names(draft, key, common)
    if len(draft.problems) > refused:
        _leave_the_problems(draft, key)
        return
    inner = node.value.get("sub_data_loader_args")
    if inner is not None and isinstance(inner.value, dict):
        common = {**inner.value, **common}  # as MindFormers, which applies them last
    if shuffle is not None:
        common["shuffle"] = shuffle  # whatever a source has
    entries = [
        replace(source, value=_entry({**source.value, **common}, number, source.where))
        for source, number in zip(sources, numbers, strict=True)
        if number != 0
    ]
    draft.changes += [
        Change(kind="no effect", key=f"{key}.sub_data_loader.{index}", value=source.plain(),
               where=source.where, why="no samples of it are to be used")
        for index, source in enumerate(sources) if numbers[index] == 0
    ]  # fmt: skip
    _write(draft, key, node, entries)


def _check_names(draft: Draft, key: str, common: Iterable[str]) -> None:
    """Arguments of every source are those of their loaders, not a misspelled one of TYPE."""
    for name in common:
        if name not in _OF_A_SOURCE and (near := did_you_mean(name, _OWN, cutoff=0.8)):
            draft.refuse(f"{key}.{name}", f"not an argument of {TYPE}", nearest=near)


def _entry(values: dict[str, Node], number: int | None, where: str) -> dict[str, Node]:
    if "name" in values and plain_value(values.get("type", _NOTHING)) in HF_LOADERS:
        values = {("subset" if key == "name" else key): value for key, value in values.items()}
    if "shuffle" not in values and "handler" in values:
        values["shuffle"] = from_plain(True, where)  # off is the default of a loader alone
    return values if number is None else {**values, "max_samples": from_plain(number, where)}


def _sources(draft: Draft, key: str) -> list[Node]:
    node = draft.find(f"{key}.sub_data_loader")
    value = None if node is None else node.value
    if isinstance(value, list) and value and all(isinstance(s.value, dict) for s in value):
        return value
    draft.refuse(f"{key}.sub_data_loader", "must be a list of data loaders, each with its type")
    return []


def _numbers(draft: Draft, key: str, count: int) -> list[int | None]:
    """Samples of each source in an epoch; None: all of them."""
    ratios = written(draft, f"{key}.dataset_ratios")
    if ratios is None:
        numbers = written(draft, f"{key}.nums_per_dataset")
        if numbers is None:
            return [None] * count
        if _are_numbers(numbers, count) and all(n == int(n) for n in numbers) and any(numbers):
            return [int(n) for n in numbers]
        draft.refuse(f"{key}.nums_per_dataset", f"must be {count} integers, one for each source")
        return [None] * count
    total = written(draft, f"{key}.samples_count", 0)
    if not _are_numbers(ratios, count) or abs(sum(ratios) - 1) > 1e-5:
        draft.refuse(
            f"{key}.dataset_ratios",
            f"must be {count} numbers, one for each source, that add up to 1",
        )
    elif type(total) is not int or total < 1:
        draft.refuse(f"{key}.samples_count", "must be a number of samples: dataset_ratios need it")
    else:
        return [int(ratio * total) for ratio in ratios]
    return [None] * count


def _are_numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, list) and len(value) == count
        and all(isinstance(n, int | float) and not isinstance(n, bool) and n >= 0 for n in value)
    )  # fmt: skip


def _shuffle(draft: Draft, key: str, *, is_evaluation: bool) -> Node | None:
    """`shuffle` of every source; None: it is not given, or an evaluation has no order."""
    node = draft.find(f"{key}.shuffle")
    value = None if node is None else plain_value(node)
    if node is None or value is None or is_evaluation:
        return None
    word = str(value).lower()
    if word in ("true", "global", "files"):
        return from_plain(word != "files", node.where)
    if word in ("false", "infile"):
        draft.refuse(
            f"{key}.shuffle", "sources are blended, not read one after another",
            nearest="Nearest: files",
            advice="With `files` each source is read in the order of its files",
        )  # fmt: skip
    else:
        draft.refuse(f"{key}.shuffle", "must be one of: True, global, files")
    return None


def _leave_the_problems(draft: Draft, key: str) -> None:
    """Take away the loader, so that there are no other problems with it."""
    node = draft.find(key)
    assert node is not None
    draft.problems[:] = [
        replace(problem, also=(*problem.also, key)) if problem.key.startswith(key) else problem
        for problem in draft.problems
    ]
    draft.tree = put(draft.tree, key, Node(value={}, where=node.where))


def _write(draft: Draft, key: str, node: Node, entries: list[Node]) -> None:
    """Put the entries in place of the loader, and note what each of its keys has become."""
    for name, child in node.value.items():
        if name == "sub_data_loader":
            continue
        names, why = _new_names(name, child, node)
        new = [key] if name == "type" else []
        new += [f"{key}.{index}.{inner}" for index in range(len(entries)) for inner in names]
        draft.changes.append(
            Change(
                kind="replaced" if new else "no effect", key=f"{key}.{name}", value=child.plain(),
                where=child.where, new_keys=tuple(new), why=why,
            )
        )  # fmt: skip
    draft.tree = put(draft.tree, key, Node(value=entries, where=node.where))


def _new_names(name: str, child: Node, loader: Node) -> tuple[list[str], str]:
    """The keys of an entry that an argument of the loader has become, and why."""
    if name == "type":
        return [], "a list of data loaders is a mixture"
    if name == "nums_per_dataset" and "dataset_ratios" in loader.value:
        return [], "dataset_ratios decide"
    if name in ("dataset_ratios", "samples_count", "nums_per_dataset"):
        return ["max_samples"], ""
    if name == "sub_data_loader_args":
        return list(child.value) if isinstance(child.value, dict) else [], ""
    if name in _NO_EFFECT:
        return [], _NO_EFFECT[name]
    return ([], "they are None") if name in _REFUSED else ([name], "")
