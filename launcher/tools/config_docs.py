"""The pages about the configuration, written by `python -m launcher.tools.config_docs`.

Owns their form. docs/configuration.md has the keys that act, with type, default and the docstring
under the field; docs/configuration-no-effect.md has all other keys, each with its reason.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.config.command_line import FLAGS, SHORT_NAMES
from launcher.config.extra_keys import ALIASES, ANY_OTHER, EXTRA_KEYS, PLANNED_CALLBACKS
from launcher.config.schema import (
    CALLBACKS,
    SCHEDULE_ARGUMENTS,
    Config,
    FieldInfo,
    info_of,
)
from launcher.config.suggest import list_section_of, section_of
from launcher.config.typing_rules import hints, members
from launcher.tools import model_docs

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "configuration.md"
OTHER_PAGE = DOCS / "configuration-no-effect.md"

_INTRODUCTION = """\
# Configuration

Written by `python -m launcher.tools.config_docs` from the schema in `launcher/config/schema/`;
do not edit it by hand.

A run is one YAML file and a command line:

```
python run.py --config x.yaml --run_mode train [--flag value ...] [key.path=value ...]
```

Low to high, these give a key its value: the default, the chain of `base_config`, the YAML file,
named flags (and `--options k=v ...`), dotted keys. `--print_config` shows the result with the
origin of every value, `--check_config` only checks. An unknown key, a wrong type or an impossible
combination ends the run with exit code 2 before the model or torch is loaded; all errors are
reported at once.

`base_config` names one YAML file or a list of them, relative to the file that names it. Sections
are merged key by key, lists and single values are replaced.

Keys that have no effect on PyTorch, or are not built yet, are in
[configuration-no-effect.md](configuration-no-effect.md).
"""

_OTHER_INTRODUCTION = """\
# Keys without effect

Written by `python -m launcher.tools.config_docs` from the tables in `launcher/mindspore/` and the
schema in `launcher/config/schema/`; do not edit it by hand.

These keys are accepted so that the YAML files of MindFormers can be used unchanged. The keys that
act are in [configuration.md](configuration.md).

**Status.** *no effect*: the type is checked, and the key is listed once at the start of a run.
*not built yet*: an error, unless the value is the one that asks for nothing.
"""

_OVERRIDES = """\
## Overrides

| Form | Meaning |
|---|---|
| `--a.b.c value`, `--a.b.c=value` | The value is taken literally, typed by the schema. |
| `--options a.b=1 c=x,y` | Several at once; a comma makes a list where the key takes one. |
| `a.b.c=value` | Hydra's grammar: `[1,2]`, `{a: 1}`, `'quoted text'`, `null`. |
| `callbacks.0.prefix=x` | An entry of a list, counted from 0. |
| `+a.b=1` | A new key of an open section, or a new entry of a list (`+trackers=wandb`). |
| `~a.b` | Remove what the file and the flags set. |
"""


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    tree = ast.parse(inspect.getsource(kind))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    bases = (base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base))
    docs = {name: text for base in bases for name, text in field_docs(base).items()}
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def sections(kind: type = Config, path: str = "") -> Iterator[tuple[str, type]]:
    """Every section with its dotted path, the root first; callbacks last."""
    yield path, kind
    for key in dataclasses.fields(kind):
        inner = section_of(hints(kind)[key.name])
        if key.name in ("dataset_config", "callbacks"):
            continue
        inner_path = f"{path}.{key.name}" if path else key.name
        if inner is not None:
            yield from sections(inner, inner_path)
        entry = list_section_of(hints(kind)[key.name])
        if entry is not None:
            yield f"{inner_path}[]", entry
    if kind is Config:
        for name, callback in CALLBACKS.items():
            yield f"callbacks: {name}", callback


def render() -> str:
    """The page of the keys that act."""
    parts = [_INTRODUCTION, _flags(), _OVERRIDES, _aliases()]
    seen: dict[type, str] = {}
    for path, kind in sections():
        inherited = {key.name for base in kind.__mro__[1:] if base in seen
                     for key in dataclasses.fields(base)}  # fmt: skip
        acting = [key for key in dataclasses.fields(kind)
                  if info_of(key).status == "effective" and key.name not in inherited]  # fmt: skip
        if kind in seen:
            parts.append(f"## `{path}`\n\nThe same keys as `{seen[kind]}`.\n")
        elif acting:
            seen[kind] = path
            parts.append(_section(path, kind, acting))
    parts.append(_types())
    return "\n".join(parts)


def render_others() -> str:
    """The page of all other keys."""
    rows: dict[str, list[str]] = {}
    for kind, path in {kind: path for path, kind in reversed(list(sections()))}.items():
        for key in dataclasses.fields(kind):
            if info_of(key).status != "effective":
                name = ANY_OTHER if info_of(key).open_keys else key.name
                row = _other_row(name, hints(kind)[key.name], info_of(key))
                rows.setdefault(path.replace(": ", "[") + "]" * (": " in path), []).append(row)
    for path, extra in EXTRA_KEYS.items():
        section, _, name = path.rpartition(".")
        rows.setdefault(section, []).append(_other_row(name, extra.annotation, extra.info))
    parts = [_OTHER_INTRODUCTION]
    for section in sorted(rows):
        title = f"`{section}`" if section else "Top level"
        head = ["| Key | Type | Status | Reason, or what to do |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {title}\n", *head, *rows[section]]) + "\n")
    return "\n".join(parts)


def _other_row(name: str, annotation: Any, info: FieldInfo) -> str:
    shown = "any other key" if name == ANY_OTHER else f"`{name}`"
    return _cells(shown, _type(annotation), info.status, f"{info.why[:1].upper()}{info.why[1:]}.")


def _cells(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _flags() -> str:
    lines = ["## Flags\n", "| Flag | Writes to | Meaning |", "|---|---|---|"]
    lines += [
        f"| `--{flag.name}` | {', '.join(f'`{target}`' for target in flag.targets)} | {flag.help} |"
        for flag in FLAGS.values()
    ]
    short = ", ".join(f"`--{name}`" for name in SHORT_NAMES)
    lines.append(f"\n{short} are short for `--train_dataset_dir`.\n")
    return "\n".join(lines)


def _aliases() -> str:
    lines = ["## Second names\n", "| Written | Means |", "|---|---|"]
    lines += [f"| `{alias}` | `{key}` |" for alias, key in ALIASES.items()]
    lines.append(
        "| generation keys in `model.model_config` | the same in `generation_config`, "
        "where that does not set them |"
    )
    return "\n".join(lines) + "\n"


def _section(path: str, kind: type, keys: list[dataclasses.Field[Any]]) -> str:
    title = f"`{path}`" if path else "General keys"
    summary = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    head = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    return (
        "\n".join([f"## {title}\n", f"{summary}\n", *head, *(_row(kind, k) for k in keys)]) + "\n"
    )


def _row(kind: type, key: dataclasses.Field[Any]) -> str:
    info, annotation = info_of(key), hints(kind)[key.name]
    name = "any other key" if info.open_keys else f"`{key.name}`"
    inner = section_of(annotation)
    is_list = key.name == "callbacks"
    shown = "list of callbacks" if is_list else "section" if inner else _type(annotation)
    default = "" if inner and not info.none_means_absent else _default(key)
    meaning = field_docs(kind).get(key.name, "")
    if info.choices:
        meaning += f" One of: {', '.join(f'`{choice}`' for choice in info.choices)}."
    if info.planned:
        meaning += f" Not built yet: {', '.join(info.planned)}."
    return _cells(name, shown, default, f"{meaning}{_bounds(info)}")


def _bounds(info: Any) -> str:
    parts = [
        f"{word} {bound:g}"
        for word, bound in (
            ("at least", info.minimum),
            ("above", info.above),
            ("at most", info.maximum),
        )
        if bound is not None and abs(bound) < 2**32
    ]
    text = ", ".join(parts)
    return f" ({text})" if text else ""


def _type(annotation: Any) -> str:
    names = []
    for member in members(annotation):
        text = getattr(member, "__name__", str(member)) if isinstance(member, type) else str(member)
        if typing.get_origin(member) is not None:
            text = str(member).replace("typing.", "")
        names.append({"NoneType": "null"}.get(text, text.replace("typing.", "")))
    return " or ".join(names)


def _default(key: dataclasses.Field[Any]) -> str:
    if key.default is not dataclasses.MISSING:
        return f"`{key.default!r}`" if key.default is not None else "left out"
    if key.default_factory is not dataclasses.MISSING:
        return f"`{key.default_factory()!r}`"
    return ""


def _types() -> str:
    lines = ["## Arguments of the learning-rate curves\n"]
    lines.append("All take `learning_rate` and `total_steps`; all but the annealing ones take the")
    lines.append("warm-up arguments. Beside them:\n")
    lines += ["| Type | Arguments |", "|---|---|"]
    for name, arguments in SCHEDULE_ARGUMENTS.items():
        lines.append(f"| {name} | {', '.join(f'`{argument}`' for argument in arguments)} |")
    lines.append(f"\nCallbacks not built yet: {', '.join(PLANNED_CALLBACKS)}.\n")
    return "\n".join(lines)


def main() -> int:
    """Write the pages, and that of the models."""
    for page, text in ((PAGE, render()), (OTHER_PAGE, render_others())):
        page.write_text(text, encoding="utf-8")
        print(f"wrote {page.name}: {len(text.splitlines())} lines")
    return model_docs.main()


if __name__ == "__main__":
    sys.exit(main())
