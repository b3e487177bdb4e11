"""Finding and reading configuration files, with their `base_config` chain.

Owns the search for `--config` (the current directory, then the project's configs/), the folding of
keys that have two names, and how several files become one tree.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.nodes import Node, merge, read_text
from launcher.errors import Problem, UserError, did_you_mean, path_problem
from launcher.project_files import configs

PROJECT_CONFIGS = configs()

ALIASES = {
    "generation": "generation_config",
    "load_balanced": "balanced_load",
    "top_k": "generation_config.top_k",
    "parallel_config.micro_batch_interleave_num": "micro_batch_interleave_num",
    "generation_config.max_decode_length": "generation_config.max_length",
    "lr_schedule.base_lr": "lr_schedule.learning_rate",
    "checkpoint.reshard_worker_number": "checkpoint.reshard_worker_num",
}
"""Second names of keys, folded into the first ones while reading; a section before its keys."""


def find_config(path: str) -> Path:
    """The file `--config` names. Raises UserError when there is none."""
    try:
        return _find(path)
    except (OSError, ValueError) as error:
        raise UserError(path_problem(error, where="command line: --config")) from None


def _find(path: str) -> Path:
    candidates = [Path(path)]
    if not os.path.isabs(path):
        candidates.append(PROJECT_CONFIGS / path)
        if not path.endswith((".yaml", ".yml")):
            candidates += [Path(f"{path}.yaml"), PROJECT_CONFIGS / f"{path}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if Path(path).is_dir():
        raise UserError(
            f"{path} is a directory",
            where="command line: --config",
            rule="--config must be one YAML file",
            advice=f"YAML files in it: {_yaml_files(Path(path)) or 'none'}",
        )
    known = sorted(p.name for p in PROJECT_CONFIGS.glob("*.yaml"))
    beside = Path(path).parent
    near = sorted(p.name for p in beside.glob("*.y*ml")) if beside.is_dir() else []
    raise UserError(
        f"{path} does not exist",
        where="command line: --config",
        rule="--config is searched for in the current directory, then in configs/ of Slipway",
        nearest=did_you_mean(Path(path).name, [*near, *known]),
        advice=f"Files in configs/: {', '.join(known) or 'none'}",
    )


def _yaml_files(folder: Path) -> str:
    return ", ".join(sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")))


def load_tree(path: Path, *, name: str = "") -> Node:
    """One tree of the file and its whole `base_config` chain, aliases folded."""
    return _load(path, name or _shown(path), ())


def _shown(path: Path) -> str:
    """The path as short as it can be said from the current directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _load(path: Path, name: str, chain: tuple[Path, ...]) -> Node:
    own = read_text(_read(path, name), name)
    if own.value is None:
        own.value = {}
    if not isinstance(own.value, dict):
        raise UserError(
            "the file is not a mapping",
            where=own.where,
            rule="a configuration consists of `key: value` lines",
        )
    problems: list[Problem] = []
    for alias, key in ALIASES.items():
        fold(own, alias, key, problems)
    if problems:
        raise UserError(problems)
    tree = Node(value={}, where=own.where)
    base = own.value.pop("base_config", None)
    for entry in _base_entries(base):
        parent = path.parent / str(entry.value)
        here = (*chain, path.resolve())
        if _resolved(parent, entry) in here:
            raise UserError(
                f"base_config = {entry.value!r}",
                where=entry.where,
                rule="this is circular, a file cannot be its own base_config",
            )
        if not parent.is_file():
            raise UserError(
                f"base_config = {entry.value!r}: {parent} does not exist",
                where=entry.where,
                rule="base_config is relative to the file it is written in",
                nearest=did_you_mean(
                    parent.name, {p.name for p in parent.parent.glob("*.y*ml")} - {path.name}
                ),
            )
        tree = merge(tree, _load(parent, _shown(parent), here))
    return merge(tree, own)


def _resolved(path: Path, entry: Node) -> Path:
    try:
        path.is_file()
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        problem = path_problem(error, where=entry.where)
        raise UserError(replace(problem, what=f"base_config: {problem.what}")) from None


def _base_entries(base: Node | None) -> list[Node]:
    if base is None or base.value in (None, "", []):
        return []
    entries = base.value if isinstance(base.value, list) else [base]
    for entry in entries:
        if not isinstance(entry.value, str):
            raise UserError(
                f"base_config = {entry.plain()!r}",
                where=entry.where,
                rule="must be a file name or a list of file names",
            )
    return entries


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the file: {error.strerror}", where=name) from None
    except UnicodeDecodeError:
        raise UserError(
            "the file is not UTF-8 text", where=name, rule="a configuration is a YAML file in UTF-8"
        ) from None


def canonical(path: str) -> str:
    """The first name of a key that may be written under its second one."""
    for alias, key in ALIASES.items():
        if path == alias or path.startswith(f"{alias}."):
            path = key + path[len(alias) :]
    return path


def fold(tree: Node, alias: str, key: str, problems: list[Problem]) -> None:
    """Move what is written at `alias` to `key`; two different values there are a problem."""
    node = take(tree, alias)
    if node is None:
        return
    _put(tree, key.split("."), node, alias, key, problems)


def take(tree: Node, path: str) -> Node | None:
    """Remove and return the node at a dotted path, None when there is none."""
    *sections, last = path.split(".")
    for name in sections:
        child = tree.value.get(name) if isinstance(tree.value, dict) else None
        if child is None:
            return None
        tree = child
    popped: Any = tree.value.pop(last, None) if isinstance(tree.value, dict) else None
    return popped if isinstance(popped, Node) else None


def _put(
    tree: Node, names: list[str], node: Node, alias: str, key: str, problems: list[Problem]
) -> None:
    for name in names[:-1]:
        section = tree.value.setdefault(name, Node(value={}, where=node.where))
        if section.value is None:
            section.value = {}
        if not isinstance(section.value, dict):
            return  # a wrong type, told when the section is read
        tree = section
    present = tree.value.get(names[-1])
    if present is None:
        tree.value[names[-1]] = node
    elif isinstance(present.value, dict) and isinstance(node.value, dict):
        for name, child in node.value.items():
            _put(present, [name], child, f"{alias}.{name}", f"{key}.{name}", problems)
    elif present.plain() != node.plain():
        problems.append(
            Problem(
                what=f"`{alias}` = {node.plain()!r}, but `{key}` = {present.plain()!r}",
                where=node.where,
                rule=f"these are two names of one key (the other is at {present.where})",
                advice=f"Remove `{alias}`",
            )
        )
