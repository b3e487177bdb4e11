"""A configuration of another program as YAML of this one, with a reason for every line.

Owns the text that `--migrate` prints. Invariants: it has what the user wrote and what follows from
it, nothing else, in the order of the schema; read again it gives the same configuration; keys
without effect are comments.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from launcher.config.assign import place_of
from launcher.config.draft import Change, is_from_command_line
from launcher.config.extra_keys import extra_key
from launcher.config.key_checks import plain_value
from launcher.config.model_spelling import SECTION, new_names, with_names
from launcher.config.nodes import Node, find
from launcher.config.printing import flow, text_scalar
from launcher.config.resolve import EVALUATION_READS_ALL, Resolved
from launcher.config.schema import Config, info_of
from launcher.config.suggest import section_of
from launcher.config.typing_rules import hints, members
from launcher.errors import Problem

_GIVEN = (
    *("load_checkpoint", "pretrained_model_dir", "input_data", "src_strategy_path_or_dir"),
    *("train_dataset", "eval_dataset", "processor", "register_path", "run_mode"),
)
"""Keys, and sections, about what only the user can give: paths, data and prompts."""

_ONLY_ON_COMMAND_LINE = "trust_remote_code"


@dataclass(frozen=True)
class Migration:
    """The YAML text, and the problems that it does not solve."""

    text: str
    problems: tuple[Problem, ...]


def migrate(
    resolved: Resolved, found: Sequence[Problem], source: str, second_names: dict[str, str]
) -> Migration:
    """The text for a resolved configuration. `found`: the problems of the rules; `second_names`:
    keys that `source` writes under another name."""
    spelling = new_names(resolved.config, resolved.bad_keys)
    names = {f"{SECTION}.{old}": f"{SECTION}.{new}" for old, new in spelling.items()}
    wrong = {names.get(_key(p), _key(p)): p for p in reversed((*resolved.problems, *found))}
    writer = _Writer(resolved, wrong, second_names | {new: old for old, new in names.items()})
    tree = with_names(resolved.tree, spelling)
    body = [*writer.section(tree, "", 0), *writer.rest()]
    counts = ", ".join(f"{count} {word}" for word, count in writer.counts.items())
    header = [f"# {source} in the keys of Slipway, written by --migrate: {counts or 'empty'}."]
    others = tuple(problem for problem in found if not _is_to_be_given(problem))
    return Migration("\n".join([*header, *body]) + "\n", (*resolved.problems, *others))


def _key(problem: Problem) -> str:
    return getattr(problem, "key", "")


def _is_list_of_sections(path: str) -> bool:
    return path == "callbacks" or path.endswith(".data_loader")


def _is_to_be_given(problem: Problem) -> bool:
    return _key(problem).split(".")[0] in _GIVEN


class _Writer:
    """Writes the lines and counts them by kind: a state that grows with the text."""

    def __init__(
        self, resolved: Resolved, wrong: dict[str, Problem], second_names: dict[str, str]
    ) -> None:
        self.resolved = resolved
        self.no_effect = {
            key for key in resolved.no_effect
            if not any(fnmatchcase(key, pattern) for pattern in EVALUATION_READS_ALL)
        }  # fmt: skip
        self.second_names = second_names
        self.counts: Counter[str] = Counter()
        self.by_new_key = {
            key: change for change in resolved.changes for key in change.new_keys
        }  # fmt: skip
        for new, old in second_names.items():
            if old in self.by_new_key:
                self.by_new_key[new] = self.by_new_key[old]
        self.dropped = [change for change in resolved.changes if change.kind == "no effect"]
        self.needs = {
            **{key: problem.rule or problem.what for key, problem in wrong.items() if key},
            **{change.key: change.why for change in resolved.changes if change.kind == "needs you"},
        }

    def section(self, node: Node, path: str, depth: int) -> Iterator[str]:
        """The lines of a section, in the order of the schema."""
        for name in _ordered(path, node.value):
            yield from self.entry(name, node.value[name], _joined(path, name), depth)
        indent = "  " * depth
        for key in [key for key in self.needs if key.rpartition(".")[0] == path]:
            yield f"{indent}# {key.rpartition('.')[2]}:{self._needs(key)}"
        for change in [change for change in self.dropped if _parent(change.key) == path]:
            self.dropped.remove(change)
            comment = self._no_effect(change.why)
            yield f"{indent}# {_last(change.key)}: {flow(change.value)}{comment}"

    def entry(self, name: str, node: Node, path: str, depth: int) -> Iterator[str]:
        """The lines of one key."""
        indent, key = "  " * depth, text_scalar(name)
        if path in self.no_effect or path == _ONLY_ON_COMMAND_LINE or self._asks_for_nothing(path):
            yield f"{indent}# {key}: {flow(plain_value(node))}{self._no_effect(self._why(path))}"
        elif isinstance(node.value, dict) and node.value:
            lines = list(self.section(node, path, depth + 1))
            is_live = any(not line.lstrip().startswith("#") for line in lines)
            yield f"{indent}{key}:" if is_live else f"{indent}# {key}:"
            yield from lines
        elif _is_list_of_sections(path) and isinstance(node.value, list) and node.value:
            yield f"{indent}{key}:"
            for index, item in enumerate(node.value):
                yield from self._item(item, f"{path}.{index}", depth + 1)
        else:
            yield f"{indent}{key}: {flow(_value(node, path))}{self._origin(path, node)}"

    def _item(self, item: Node, path: str, depth: int) -> Iterator[str]:
        is_section = isinstance(item.value, dict) and item.value
        lines = list(self.section(item, path, depth + 1)) if is_section else [
            flow(plain_value(item))]  # fmt: skip
        first = next((i for i, line in enumerate(lines) if not line.lstrip().startswith("#")), 0)
        lines.insert(0, lines.pop(first))
        yield f"{'  ' * depth}- {lines[0].lstrip()}"
        yield from lines[1:]

    def rest(self) -> Iterator[str]:
        """Keys without effect whose section is not written here."""
        for key in list(self.needs):
            yield f"# {key}:{self._needs(key)}"
        if self.dropped:
            yield "# Keys without effect, of sections that are not needed here:"
        for change in self.dropped:
            yield f"# {change.key}: {flow(change.value)}{self._no_effect(change.why)}"

    def _origin(self, path: str, node: Node) -> str:
        if path in self.needs:
            return self._needs(path)
        change = self._change(path)
        if change is not None:
            self.counts[change.kind] += 1
            old = self.resolved.provenance.names.get(change.key, change.key)
            was = "it was" if old == path else old
            sign = " " if old == path else " = "
            value = f"{sign}{flow(change.value)}" if change.kind == "replaced" else ""
            why = f" ({change.why})" if change.why else ""
            return _comment(f"{change.kind}: {was}{value}{why}")
        for key, name in self.second_names.items():
            if path == key or path.startswith(f"{key}."):
                self.counts["renamed"] += 1
                return _comment(f"renamed: {name}{path[len(key) :]}")
        is_new = find(self.resolved.written, path) is None
        self.counts["added" if is_new else "kept"] += 1
        if is_from_command_line(node):
            return _comment(f"kept: {node.where}")
        return _comment("added: its default is another one here" if is_new else "kept")

    def _change(self, path: str) -> Change | None:
        while path:
            if path in self.by_new_key:
                return self.by_new_key[path]
            path = _parent(path)
        return None

    def _needs(self, key: str) -> str:
        self.counts["need you"] += 1
        return _comment(f"needs you: {self.needs.pop(key)}")

    def _no_effect(self, why: str) -> str:
        self.counts["without effect"] += 1
        return _comment(f"no effect here: {why}" if why else "no effect here")

    def _asks_for_nothing(self, path: str) -> bool:
        """Whether a key that is not built is written with a neutral value."""
        key = extra_key(_label(self.resolved.tree, _parent(path)), _last(path))
        return key is not None and key.info.status == "not built yet" and (
            path not in self.resolved.bad_keys)  # fmt: skip

    def _why(self, path: str) -> str:
        if path == _ONLY_ON_COMMAND_LINE:
            return "it counts on the command line only"
        if self._asks_for_nothing(path):
            return "it asks for nothing"
        section = _label(self.resolved.tree, _parent(path))
        key = extra_key(section, _last(path))
        if key is not None:
            return key.info.why
        kind = _class_of(section)
        fields = {} if kind is None else {f.name: f for f in dataclasses.fields(kind)}
        return info_of(fields[_last(path)]).why if _last(path) in fields else ""


def _comment(text: str) -> str:
    return f"  # {text}".replace("\n", " ")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _label(tree: Node, section: str) -> str:
    """The name of a section in the schema: `callbacks[MFLossMonitor]` of `callbacks.0`."""
    node = find(tree, section) if section.startswith("callbacks.") else None
    kind = node.value.get("type") if node is not None and isinstance(node.value, dict) else None
    return section if kind is None else f"callbacks[{kind.value}]"


def _class_of(section: str) -> type | None:
    """The dataclass of a section; None for one without."""
    kind: type | None = Config
    for name in section.split(".") if section else ():
        annotation = hints(kind).get(name) if kind is not None else None
        kind = section_of(annotation) if annotation is not None else None
    return kind


def _ordered(path: str, keys: dict[str, Node]) -> list[str]:
    """The keys of a section in the order of the schema; then the others as written."""
    kind = None if path.startswith("callbacks") else _class_of(path)
    known = [] if kind is None else [field.name for field in dataclasses.fields(kind)]
    return [
        *(name for name in known if name in keys),
        *(name for name in keys if name not in known),
    ]


def _value(node: Node, path: str) -> Any:
    """The value of a key; a text of the command line stays one where texts are allowed."""
    if node.is_text and str in members(place_of(path).annotation):
        return node.value if node.value not in ("null", "None") else None
    return plain_value(node)
