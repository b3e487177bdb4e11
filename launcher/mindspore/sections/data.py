"""The data sections of a MindFormers configuration.

Owns the wrappers around a data set, sections that the run does not read, and loaders that are known
and not built: such a loader is one problem, and its other keys none. `hf_loader` has HFDataLoader.
"""

from __future__ import annotations

from launcher.config.draft import Change, Draft, asks_for_nothing, is_from_command_line
from launcher.config.nodes import Node, without
from launcher.config.schema import DataLoaderSection, info_of
from launcher.mindspore.keys_not_built import KEYS_NOT_BUILT
from launcher.mindspore.sections import records
from launcher.mindspore.sections.hf_loader import translate_loader
from launcher.mindspore.sections.sources import translate_sources
from launcher.mindspore.sections.values import is_on, mode, names, trains, written

_LOADER = DataLoaderSection.__dataclass_fields__["type"]
_LOADERS_NOT_BUILT = info_of(_LOADER).planned


def translate(draft: Draft) -> None:
    """Translate train_dataset, eval_dataset and the tasks around them."""
    for name in ("train_dataset", "eval_dataset"):
        _wrapper(draft, name)
        for section in (name, f"{name}_task.dataset_config"):
            translate_sources(draft, section, is_evaluation=name == "eval_dataset")
        records.translate(draft, name)
    evaluates = mode(draft) == "eval" or (trains(draft) and is_on(draft, "do_eval"))
    for name, is_read in (("train_dataset", trains(draft)), ("eval_dataset", evaluates)):
        for section in (name, f"{name}_task.dataset_config"):
            if not mode(draft) or is_read:
                for loader in _loaders(draft, section):
                    translate_loader(draft, section, loader)
                if mode(draft) and _needs_more(draft, section):
                    _only_the_type(draft, section)
            elif _needs_more(draft, section):
                draft.drop(section, "it is not read in this mode")


def _wrapper(draft: Draft, name: str) -> None:
    """The alias of a data set in its task repeats it, but for what the command line changed."""
    inner, outer = draft.find(f"{name}_task.dataset_config"), draft.find(name)
    if inner is not None and outer is not None and _repeats(inner, outer):
        draft.tree = without(draft.tree, f"{name}_task.dataset_config")
        draft.changes.append(
            Change(kind="no effect", key=f"{name}_task.dataset_config", value=None,
                   where=inner.where, why=f"it repeats {name}")
        )  # fmt: skip


def _repeats(inner: Node, outer: Node) -> bool:
    if is_from_command_line(outer):
        return True
    if not isinstance(inner.value, dict) or not isinstance(outer.value, dict):
        return inner.plain() == outer.plain()
    return all(
        name in outer.value and _repeats(child, outer.value[name])
        for name, child in inner.value.items()
    )


def _needs_more(draft: Draft, section: str) -> bool:
    """Whether a data section asks for something that is not built."""
    loaders = _loaders(draft, section)
    if any(written(draft, f"{loader}.type") in _LOADERS_NOT_BUILT for loader in loaders):
        return True
    of_loaders = ((loader, "train_dataset.data_loader") for loader in loaders)
    tables = ((section, "train_dataset"), *of_loaders)
    return any(
        not asks_for_nothing(written(draft, f"{place}.{name}"))
        for place, table in tables
        for rows in KEYS_NOT_BUILT[table].values()
        for name in set(rows) & set(names(draft, place))
    )


def _loaders(draft: Draft, section: str) -> list[str]:
    """The keys of the data loaders of a section: one, or those of a list."""
    loader = f"{section}.data_loader"
    node = draft.find(loader)
    if node is not None and isinstance(node.value, list):
        return [f"{loader}.{index}" for index in range(len(node.value))]
    return [loader]


def _only_the_type(draft: Draft, section: str) -> None:
    """Leave of a loader that is not built its type alone, which is then the one problem."""
    for loader in _loaders(draft, section):
        if written(draft, f"{loader}.type") in _LOADERS_NOT_BUILT:
            others = [f"{loader}.{name}" for name in names(draft, loader) if name != "type"]
            draft.drop_all(others, "it belongs to the loader")
