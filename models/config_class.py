"""The configuration class of a model type: its keys, their defaults and aliases.

Owns the parsing of those classes from the source of the installed transformers, without importing
it: the configuration is checked before anything heavy is loaded, against the version that will run.
The source is not executed; defaults that are not literals are unknown.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

COMMON_KEYS = frozenset({
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "is_encoder_decoder",
    "label2id", "model_type", "name_or_path", "num_labels", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Keys that config.json of any model type may contain."""


@dataclass(frozen=True, kw_only=True)
class ConfigClass:
    """A configuration class of transformers."""

    name: str
    """`GPT2Config`"""
    defaults: Mapping[str, Any]
    """Every key, with its default; None also if that is not a literal."""
    synonyms: Mapping[str, str]
    """Alias -> key: `hidden_size` -> `n_embd`."""
    derived: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Key that is derived if it is None -> the keys that it is derived from."""
    sections: Mapping[str, ConfigClass] = field(default_factory=dict)
    """Keys whose values have their own configuration class."""
    old_keys: frozenset[str] = frozenset()
    """Keys of older config.json that the class still reads if a newer one is missing."""
    rope_kinds: tuple[str, ...] = ()
    """Layer types with separate rope settings; empty if all layers share them."""

    def key(self, name: str) -> str:
        """The key of the alias `name`, or `name` itself."""
        return self.synonyms.get(name, name)

    def has(self, name: str) -> bool:
        """Whether `name` is a key of the class, by any of its names."""
        return name in self.defaults or len(self.names_of(name)) > 1

    def names_of(self, name: str) -> list[str]:
        """All names of the key `name`, the key itself first."""
        key = self.key(name)
        return [key, *(second for second, target in self.synonyms.items() if target == key)]

    def default(self, name: str) -> Any:
        """The default of a key by any of its names; None if it is not a literal."""
        return next((self.defaults[n] for n in self.names_of(name) if n in self.defaults), None)

    @property
    def has_rope(self) -> bool:
        """Whether the model has rotary embeddings, set by `rope_parameters`."""
        return "rope_parameters" in self.defaults


@cache
def config_class(model_type: str) -> ConfigClass | None:
    """The configuration class of `model_type`; None if the installed transformers has none."""
    name = class_names().get(model_type)
    folder = _folder_of(model_type)
    if name is None or folder is None:
        return None
    return _read(name, folder)


@cache
def class_names() -> dict[str, str]:
    """Every model type of the installed transformers -> its configuration class."""
    return {"gpt-sw3": "GPT2Config"} | dict(_pairs("CONFIG_MAPPING_NAMES"))


@cache
def is_causal_type(model_type: str) -> bool:
    """Whether the installed transformers has a causal language model of `model_type`; also True if
    its list of them cannot be read."""
    types = dict(_pairs("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "modeling_auto.py"))
    return model_type in types or not types


@cache
def causal_classes() -> dict[str, str]:
    """Every causal language model of the installed transformers -> its model type."""
    pairs = _pairs("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "modeling_auto.py")
    return {name: model_type for model_type, name in reversed(pairs)}


def mentioned(model_type: str, key: str) -> bool:
    """Whether the source of the model of `model_type` mentions `key`; True if it cannot be read."""
    folder = _folder_of(model_type)
    sources = list(folder.glob("modeling_*.py")) if folder else []
    return not sources or any(re.search(rf"\b{re.escape(key)}\b", _text(path)) for path in sources)


def _models() -> Path | None:
    """Folder of the models of the installed transformers."""
    found = find_spec("transformers")
    folders = found.submodule_search_locations if found else None
    return Path(folders[0], "models") if folders else None


@cache
def _pairs(table: str, file: str = "auto_mappings.py") -> list[tuple[str, str]]:
    """The entries of one of transformers' tables of model types."""
    models = _models()
    text = _text(models / "auto" / file) if models else ""
    body = re.search(rf"^{table} = .*?^\)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r'\("([^"]+)", "([^"]+)"\)', body[0]) if body else []


def _folder_of(model_type: str) -> Path | None:
    models = _models()
    special = dict(_pairs("SPECIAL_MODEL_TYPE_TO_MODULE_NAME"))
    name = "gpt2" if model_type == "gpt-sw3" else special.get(model_type, model_type)
    return models / name.replace("-", "_") if models else None


@cache
def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _read(name: str, folder: Path) -> ConfigClass | None:
    """The class `name` of the configuration file of `folder`, with its bases in that file."""
    for path in sorted(folder.glob("configuration_*.py")):
        classes = {node.name: node for node in _tree(path).body if isinstance(node, ast.ClassDef)}
        if name in classes:
            return _parsed(name, classes)
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(_text(path))


def _parsed(name: str, classes: Mapping[str, ast.ClassDef]) -> ConfigClass:
    node = classes[name]
    bases = [_parsed(b.id, classes) for b in node.bases if getattr(b, "id", "") in classes]  # type: ignore[attr-defined]
    defaults = {key: value for base in bases for key, value in base.defaults.items()}
    synonyms = {key: value for base in bases for key, value in base.synonyms.items()}
    derived = {key: value for base in bases for key, value in base.derived.items()}
    sections = {key: value for base in bases for key, value in base.sections.items()}
    kinds = [kind for base in bases for kind in base.rope_kinds] + _rope_kinds(node)
    old_keys = frozenset(_old_keys(node)).union(*(base.old_keys for base in bases))
    for statement in node.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=key)) if "ClassVar" not in ast.unparse(
                statement.annotation
            ):
                defaults[key] = _plain(statement.value)
            case ast.Assign(targets=[ast.Name(id="attribute_map")]):
                synonyms |= _plain(statement.value) or {}
            case ast.Assign(targets=[ast.Name(id="sub_configs" | "sub_configs_defaults")]):
                sections |= _sections(statement.value, classes)
            case ast.FunctionDef(name="__post_init__"):
                derived |= dict(_derived(statement))
    return ConfigClass(
        name=name, defaults=defaults, synonyms=synonyms, derived=derived, sections=sections,
        old_keys=old_keys, rope_kinds=tuple(dict.fromkeys(kinds)),
    )  # fmt: skip


def _plain(value: ast.expr | None) -> Any:
    """The value of a literal; None for everything else."""
    try:
        return ast.literal_eval(value) if value is not None else None
    except ValueError:
        return None


def _sections(value: ast.expr, classes: Mapping[str, ast.ClassDef]) -> dict[str, ConfigClass]:
    found: dict[str, ConfigClass] = {}
    if isinstance(value, ast.Dict):
        for key, named in zip(value.keys, value.values, strict=True):
            inside = {node.id for node in ast.walk(named) if isinstance(node, ast.Name)}
            for name in inside & classes.keys():
                found[str(_plain(key))] = _parsed(name, classes)
    return found


def _derived(function: ast.FunctionDef) -> Iterator[tuple[str, frozenset[str]]]:
    """`if self.a is None: self.a = f(self.b)` yields `a` and its source `b`."""
    for node in ast.walk(function):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Compare)):
            continue
        test, of = node.test, _self_attributes(node.test.left)
        if len(of) == 1 and isinstance(test.ops[0], ast.Is) and _is_none(test.comparators[0]):
            inside = {name for part in node.body for name in _self_attributes(part)}
            yield next(iter(of)), frozenset(inside - of)


def _old_keys(node: ast.ClassDef) -> Iterator[str]:
    """The keys of `kwargs.pop("key", ...)` in the methods of a class."""
    for tree in ast.walk(node):
        match tree:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get"),
                args=[ast.Constant(value=str(key)), *_],
            ):
                yield key


def _rope_kinds(node: ast.ClassDef) -> list[str]:
    """The keys of a map `{"full_attention": {"rope_type": ...}, ...}` in the methods of a class."""
    kinds: list[str] = []
    for tree in ast.walk(node):
        if isinstance(tree, ast.Dict):
            for key, value in zip(tree.keys, tree.values, strict=True):
                inner = value.keys if isinstance(value, ast.Dict) else []
                if any(_plain(name) == "rope_type" for name in inner if name is not None):
                    kinds.append(str(_plain(key)))
    return kinds


def _self_attributes(tree: ast.AST) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
