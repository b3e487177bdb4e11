"""MultiSourceDataLoader of MindFormers as a list of data loaders, which is a mixture here.

Owns the meaning of its arguments (mindformers/dataset/dataloader/multi_source_dataloader.py):

    sub_data_loader                   the sources
    sub_data_loader_args, any other   arguments of every source, before its own
    nums_per_dataset                  so many samples of each source in an epoch
    dataset_ratios, samples_count     the same: ratio * samples_count, rounded down
    shuffle                           True, global: sources and files; files: the sources only

Both programs then blend the sources by these numbers. Sources one after another (`shuffle: False`
or `infile`) and indices from a file are refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launcher.config.draft import Change, Draft
from launcher.config.key_checks import plain_value
from launcher.config.nodes import Node, from_plain, put
from launcher.mindspore.sections.values import is_on, refuse, written

TYPE = "MultiSourceDataLoader"
_NO_EFFECT = {
    "shuffle_buffer_size": "the blend is computed, nothing is buffered",
    "data_source_type": "rows are always read by their number",
    "num_shards": "every rank reads exactly its share",
    "shard_id": "every rank reads exactly its share",
}
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
    inner = node.value.get("sub_data_loader_args")
    if inner is not None and isinstance(inner.value, dict):
        common = {**inner.value, **common}  # as MindFormers, which applies them last
    if shuffle is not None:
        common["shuffle"] = shuffle
    limit = "num_samples" if is_on(draft, f"{section}.packing") else "max_samples"
    entries = [
        replace(source, value=_limited({**source.value, **common}, limit, number, source.where))
        for source, number in zip(sources, numbers, strict=True)
        if number != 0
    ]
    _write(draft, key, node, entries, limit)


def _limited(entry: dict[str, Node], limit: str, number: int | None, where: str) -> dict[str, Node]:
    if number is None:
        return entry
    present = plain_value(entry[limit]) if limit in entry else None
    least = min(number, present) if isinstance(present, int) else number
    return {**entry, limit: from_plain(least, where)}


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
    """`shuffle` of every source; None: not given."""
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


def _write(draft: Draft, key: str, node: Node, entries: list[Node], limit: str) -> None:
    for name, child in node.value.items():
        if name == "sub_data_loader":
            continue
        places = tuple(f"{key}.{index}" for index in range(len(entries)))
        new: tuple[str, ...] = ()
        why = _NO_EFFECT.get(name, "")
        if name == "type":
            new, why = (key,), "a list of data loaders is a mixture"
        elif name in ("dataset_ratios", "samples_count", "nums_per_dataset"):
            new = tuple(f"{place}.{limit}" for place in places)
        elif name == "sub_data_loader_args":
            new = places
        elif name not in _OWN or name == "shuffle":
            new = tuple(f"{place}.{name}" for place in places)
        draft.changes.append(
            Change(
                kind="replaced" if new else "no effect", key=f"{key}.{name}", value=child.plain(),
                where=child.where, new_keys=new, why=why,
            )
        )  # fmt: skip
    draft.tree = put(draft.tree, key, Node(value=entries, where=node.where))
