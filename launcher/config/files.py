"""Finding and reading configuration files, with their `base_config` chain.

Owns the search for `--config` (the current directory, then configs/ of Slipway), and how several
files become one tree. Defaults of a printed configuration are not in that tree.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from launcher.config.aliases import ALIASES, without_aliases
from launcher.config.nodes import Node, find, merge, without
from launcher.config.printed import without_defaults
from launcher.config.yaml_reader import read_text
from launcher.errors import UserError, did_you_mean, path_problem
from launcher.project_files import configs

PROJECT_CONFIGS = configs()


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
    """The tree of a file merged over its `base_config` chain, without second names."""
    return _load(path, name or _shown(path), ())


def second_names(path: str) -> dict[str, str]:
    """The keys that a file writes under their second name, to that name. Its `base_config` is not
    looked at."""
    raw = read_text(_read(find_config(path), path), path)
    return {key: alias for alias, key in ALIASES.items() if find(raw, alias) is not None}


def _shown(path: Path) -> str:
    """The path relative to the current directory where it is below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _load(path: Path, name: str, chain: tuple[Path, ...]) -> Node:
    text = _read(path, name)
    own = without_defaults(read_text(text, name), text)
    if own.value is None:
        own = Node(value={}, where=own.where)
    if not isinstance(own.value, dict):
        raise UserError(
            "the file is not a mapping",
            where=own.where,
            rule="a configuration consists of `key: value` lines",
        )
    own = without_aliases(own)
    tree, here = Node(value={}, where=own.where), (*chain, path.resolve())
    for entry in _base_entries(find(own, "base_config")):
        base = _base_path(path, entry, here)
        tree = merge(tree, _load(base, _shown(base), here))
    return merge(tree, without(own, "base_config"))


def _base_path(path: Path, entry: Node, chain: tuple[Path, ...]) -> Path:
    base = path.parent / str(entry.value)
    if _resolved(base, entry) in chain:
        raise UserError(
            f"base_config = {entry.value!r}",
            where=entry.where,
            rule="this is circular, a file cannot be its own base_config",
        )
    if not base.is_file():
        raise UserError(
            f"base_config = {entry.value!r}: {base} does not exist",
            where=entry.where,
            rule="base_config is relative to the file it is written in",
            nearest=did_you_mean(
                base.name, {p.name for p in base.parent.glob("*.y*ml")} - {path.name}
            ),
        )
    return base


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
