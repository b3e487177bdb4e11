"""From the text of a YAML file to a tree of nodes that know their file and line.

Owns reading: places survive anchors, aliases and merge keys. Invariants: reading never runs code
and makes only maps, lists, strings, numbers, booleans and null; a duplicate key is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from launcher.config.nodes import Node
from launcher.errors import Problem, UserError

MAX_DEPTH = 20
MAX_NODES = 100_000
"""Aliases can multiply: a file of a few lines must not grow without bounds."""

_SCALAR_TAGS = tuple(
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")
)
_STANDARD_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Loader(yaml.SafeLoader):
    """A safe loader that reads `1e-4` as a float (YAML 1.1: only `1.0e-4`) and dates as strings."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":timestamp", ":float", ":int"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
             |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
             |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
             |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(  # without the base 60 of YAML 1.1: 12:30 is a string
    "tag:yaml.org,2002:int",
    re.compile(r"^(?:[-+]?0b[0-1_]+|[-+]?0x[0-9a-fA-F_]+|[-+]?(?:0|[1-9][0-9_]*))$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """The plain value of one YAML scalar, list or map written on a command line."""
    try:
        return read_text(text, "command line").plain()
    except UserError:
        return text


def read_text(text: str, name: str) -> Node:
    """The tree of a YAML text; `name` is shown as the file. Raises UserError for bad YAML."""
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return Node(value={}, where=f"{name}:1")
            return _Reader(loader, name).node(root)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        what = (error.problem or error.context or "not YAML").replace("\n", " ")
        raise UserError(
            f"this is not valid YAML: {what}",
            where=f"{name}{line}",
            rule="keys of one section have the same indentation, and a space follows the colon",
            advice=_yaml_advice(text, mark.line if mark else None),
        ) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"this is not valid YAML: {first_line}", where=name, advice="Save it as UTF-8 text"
        ) from None
    except RecursionError:
        raise UserError(
            "the file is nested too deeply", where=name, rule=f"at most {MAX_DEPTH} levels"
        ) from None


def _yaml_advice(text: str, line: int | None) -> str:
    lines = text.splitlines()
    if line is not None and line < len(lines) and "\t" in lines[line]:
        return "Replace the tab with spaces"
    return "Fix this line or the one above it"


def _refused_tag(node: yaml.Node, where: str) -> UserError:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    return UserError(
        f"the tag `{tag}` is not allowed",
        where=where,
        rule="a configuration file holds plain values only",
        advice="Remove the tag; set register_path for code of your own",
    )


class _Reader:
    """Turns the nodes of PyYAML in one file into `Node`."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader = loader
        self.name = name
        self.problems: list[Problem] = []
        self.open: set[int] = set()
        self.count = 0

    def node(self, root: yaml.Node) -> Node:
        """The tree below `root`; raises every problem of the file at once."""
        tree = self._node(root, self._where(root))
        if self.problems:
            raise UserError(self.problems)
        return tree

    def _where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _node(self, node: yaml.Node, where: str) -> Node:
        self.count += 1
        if self.count > MAX_NODES:
            raise UserError(
                f"the aliases of this file expand to more than {MAX_NODES} values", where=where
            )
        if isinstance(node, yaml.ScalarNode):
            if node.tag not in _SCALAR_TAGS:
                raise _refused_tag(node, where)
            return Node(value=self.loader.construct_object(node), where=where)
        if node.tag not in _STANDARD_TAGS:
            raise _refused_tag(node, where)
        if id(node) in self.open:
            raise UserError("this alias contains itself", where=where)
        if len(self.open) >= MAX_DEPTH:
            raise UserError(
                "this is nested too deeply", where=where, rule=f"at most {MAX_DEPTH} levels"
            )
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return Node(value=self._map(node), where=where)
            items = [self._node(item, self._where(item)) for item in node.value]
            return Node(value=items, where=where)
        finally:
            self.open.discard(id(node))

    def _map(self, node: yaml.MappingNode) -> dict[str, Node]:
        merged: dict[str, Node] = {}
        own: dict[str, Node] = {}
        for key_node, value_node in node.value:
            where = self._where(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                for source in self._merge_sources(value_node, where):
                    merged = {
                        **source,
                        **merged,
                    }  # earlier sources win, as in the YAML specification
                continue
            key = self._key(key_node, where)
            if key in own:
                self.problems.append(
                    Problem(
                        what=f"duplicate key `{key}`",
                        where=where,
                        rule="a section can have a key only once",
                        advice=f"Remove one; the other is at {own[key].where}",
                    )
                )
            own[key] = self._node(value_node, where)
        return {**merged, **own}

    def _key(self, node: yaml.Node, where: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise UserError("this key is not a string", where=where)
        key: str = node.value
        return key

    def _merge_sources(self, node: yaml.Node, where: str) -> list[dict[str, Node]]:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        sources = [self._node(item, where).value for item in items]
        if not all(isinstance(source, dict) for source in sources):
            raise UserError("`<<` must be followed by the alias of a section", where=where)
        return sources
