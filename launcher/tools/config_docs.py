"""docs/configuration.md, written from the schema: `python -m launcher.tools.config_docs`.

Owns the form of that page. Everything it says about a key comes from the schema: type, default,
status and the docstring under the field.
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
from launcher.config.files import ALIASES
from launcher.config.schema import (
    CALLBACKS,
    PLANNED_CALLBACKS,
    SCHEDULE_ARGUMENTS,
    Config,
    info_of,
)
from launcher.config.suggest import section_of
from launcher.config.typing_rules import hints, members
from launcher.tools import model_docs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"

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
combination ends the run with exit code 2 before anything heavy is loaded; all mistakes are told at
once.

`base_config` names one YAML file or a list of them, relative to the file that names it. Sections
are merged key by key, lists and single values are replaced.

**Status.** *effective*: does what it says. *not built yet*: refused, unless the value asks for
nothing. *no effect*: accepted because MindFormers files have it, and reported once.
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
| `~a.b` | Forget what the file and the flags say. |
"""


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line."""
    tree = ast.parse(inspect.getsource(kind))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
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
        if inner is not None and key.name not in ("dataset_config", "callbacks"):
            yield from sections(inner, f"{path}.{key.name}" if path else key.name)
    if kind is Config:
        for name, callback in CALLBACKS.items():
            yield f"callbacks: {name}", callback


def render() -> str:
    """The whole page."""
    parts = [_INTRODUCTION, _flags(), _OVERRIDES, _aliases()]
    seen: dict[type, str] = {}
    for path, kind in sections():
        if kind in seen:
            parts.append(f"## `{path}`\n\nThe same keys as `{seen[kind]}`.\n")
            continue
        seen[kind] = path
        parts.append(_section(path, kind))
    parts.append(_types())
    return "\n".join(parts)


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
        "where that says nothing |"
    )
    return "\n".join(lines) + "\n"


def _section(path: str, kind: type) -> str:
    title = f"`{path}`" if path else "General keys"
    summary = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
    lines = [f"## {title}\n", summary + "\n"]
    lines += ["| Key | Type | Default | Status | Meaning |", "|---|---|---|---|---|"]
    rows = [(_rank(key), index, key) for index, key in enumerate(dataclasses.fields(kind))]
    for _, _, key in sorted(rows, key=lambda row: row[:2]):
        lines.append(_row(kind, key))
    return "\n".join(lines) + "\n"


def _rank(key: dataclasses.Field[Any]) -> int:
    return ("effective", "not built yet", "no effect").index(info_of(key).status)


def _row(kind: type, key: dataclasses.Field[Any]) -> str:
    info, annotation = info_of(key), hints(kind)[key.name]
    name = "any other key" if info.open_keys else f"`{key.name}`"
    inner = section_of(annotation)
    is_list = key.name == "callbacks"
    shown = "list of callbacks" if is_list else "section" if inner else _type(annotation)
    default = "" if inner and not info.none_means_absent else _default(key)
    meaning = field_docs(kind).get(key.name, "")
    if info.status != "effective" and info.why:
        meaning += f" {info.why[0].upper()}{info.why[1:]}."
    if info.choices and info.status == "effective":
        meaning += f" One of: {', '.join(f'`{choice}`' for choice in info.choices)}."
    if info.planned:
        meaning += f" Not built yet: {', '.join(info.planned)}."
    bounds = _bounds(info)
    status = "" if inner else info.status
    cells = (name, shown, default, status, f"{meaning}{bounds}")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


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
    """Write the page, and that of the models."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE.name}: {len(PAGE.read_text(encoding='utf-8').splitlines())} lines")
    return model_docs.main()


if __name__ == "__main__":
    sys.exit(main())
