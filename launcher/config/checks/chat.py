"""Rules about how conversations are rendered, and which of their turns carry loss.

Templates are read as text: those of the tokenizer from its JSON and Jinja files. None is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.config.chat_template import RESERVED_ARGUMENTS, kind_of_template
from launcher.config.checks.check import Check
from launcher.config.checks.paths import nearest_path
from launcher.config.derived import read_json_object, tokenizer_dir, used_datasets
from launcher.config.provenance import KeyProblem
from launcher.config.schema import CONVERSATION_LOADERS, DataLoaderSection
from launcher.errors import UserError, did_you_mean
from launcher.json_text import NotJson, line_and_column, parse

_LARGEST_BYTES = 4 * 2**20
_NAMES = re.compile(r"[A-Za-z_]\w*")


def _conversation_loaders(check: Check) -> Iterator[tuple[str, DataLoaderSection]]:
    for name, section in used_datasets(check.config).items():
        for key, loader in section.loaders.items():
            if loader.type in CONVERSATION_LOADERS:
                yield f"{name}.{key}", loader


def templates(check: Check) -> Iterator[KeyProblem]:
    """chat_template is none, the name of a template, a file, or Jinja text that can be parsed."""
    value = check.config.chat_template
    kind = kind_of_template(value)
    if value is None or not check.mode or check.config.only_save_strategy:
        return
    if kind == "none":
        yield from _without_template(check)
    elif kind == "name":
        yield from _name_of_template(check, value)
    elif kind == "inline":
        yield from _syntax(check, value)
    elif not Path(value).is_file():
        yield check.wrong(
            "chat_template", "there is no such file", nearest=nearest_path(value),
            advice="Relative paths start at the current directory",
        )  # fmt: skip
    elif Path(value).stat().st_size <= _LARGEST_BYTES:
        yield from _syntax(check, Path(value).read_text(encoding="utf-8", errors="replace"), value)


def _without_template(check: Check) -> Iterator[KeyProblem]:
    for prefix, loader in _conversation_loaders(check):
        if not loader.prompt_template:
            yield check.wrong(
                "chat_template", "conversations become text by a template; none is for predict",
                nearest=f"{prefix} has conversations",
                advice="Leave it out to use the template of the tokenizer",
            )  # fmt: skip
            return


def _name_of_template(check: Check, value: str) -> Iterator[KeyProblem]:
    found = tokenizer_templates(tokenizer_dir(check.config))
    if found is None or value in found or (value == "default" and "" in found):
        return
    names = [name for name in found if name]
    shown = f"Its templates: {', '.join(names)}" if names else ""
    if not found:
        shown = "The tokenizer has no template"
    yield check.wrong(
        "chat_template", "is neither a template of the tokenizer nor a file",
        nearest=did_you_mean(value, names) or shown or "It has one template, without a name",
        advice="Leave it out to use the template of the tokenizer, or give a .jinja file",
    )  # fmt: skip


def _syntax(check: Check, text: str, path: str = "") -> Iterator[KeyProblem]:
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], autoescape=True
    )
    try:
        environment.parse(text)
    except TemplateSyntaxError as error:
        what = f"chat_template = {path!r}" if path else "chat_template"
        yield check.wrong(
            "chat_template", f"is not a Jinja template: {error.message}",
            what=f"{what}, line {error.lineno}",
            nearest=text.splitlines()[error.lineno - 1].strip()[:80] if text.strip() else "",
            advice="Fix it, or leave it out to use the template of the tokenizer",
        )  # fmt: skip


def tokenizer_templates(folder: str) -> dict[str, str] | None:
    """The templates in the files of a tokenizer by name, the only one of a tokenizer under the
    empty name; None where that is not known."""
    path = Path(folder)
    if not folder or not path.is_dir():
        return None
    found = _in_json(path / "tokenizer_config.json")
    named = sorted(path.glob("additional_chat_templates/*.jinja"))
    texts = {file.stem: file for file in named}
    if (main := path / "chat_template.jinja").is_file():
        texts["default" if named else ""] = main
    if texts:
        found = {name: _text_of(file) for name, file in texts.items()}
    return found


def _in_json(path: Path) -> dict[str, str]:
    if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
        return {}
    try:
        value: Any = read_json_object(path).get("chat_template")
    except UserError:
        return {}  # reported by another rule
    if isinstance(value, str):
        return {"": value}
    pairs: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        pairs = [(one.get("name"), one.get("template")) for one in value if isinstance(one, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def arguments(check: Check) -> Iterator[KeyProblem]:
    """chat_template_kwargs has arguments of templates, not of the launcher."""
    for name in check.config.chat_template_kwargs:
        if name in RESERVED_ARGUMENTS:
            own = "Set the key `tools`" if name == "tools" else "Set the key `chat_template`"
            yield check.wrong(
                f"chat_template_kwargs.{name}", "the launcher sets this argument itself",
                advice=own if name in ("tools", "chat_template") else "Remove it",
            )  # fmt: skip


def tools(check: Check) -> Iterator[KeyProblem]:
    """tools is a list of objects, or a JSON file with one."""
    value = check.config.tools
    if not isinstance(value, str):
        for index, tool in enumerate(value or ()):
            if not isinstance(tool, dict):
                yield check.wrong(f"tools.{index}", "a tool is an object")
        return
    path = Path(value)
    if not path.is_file():
        yield check.wrong(
            "tools", "there is no such file", nearest=nearest_path(value),
            advice="Give a JSON file with a list of tools, or the list itself",
        )  # fmt: skip
        return
    place = ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = parse(text)
    except NotJson as error:
        reason = error.reason
        if error.position is not None:
            place = f", line {line_and_column(text, error.position)[0]}"
    else:
        if isinstance(content, list) and all(isinstance(tool, dict) for tool in content):
            return
        reason = "it is not a list of objects"
    yield check.wrong(
        "tools", f"must be a JSON file with a list of tools: {reason}{place}",
        advice='Write [{"type": "function", "function": {"name": ...}}]',
    )  # fmt: skip


def learnt_turns(check: Check) -> Iterator[KeyProblem]:
    """Some role carries loss; a prompt of fixed text has its answer alone."""
    for prefix, loader in _conversation_loaders(check):
        if not loader.train_on_roles:
            yield check.wrong(
                f"{prefix}.train_on_roles", "nothing would carry loss",
                nearest="Nearest: [assistant]",
            )  # fmt: skip
        if not loader.prompt_template:
            continue
        for key in ("train_on_roles", "train_on_turns"):
            if getattr(loader, key) != getattr(DataLoaderSection(), key):
                yield check.wrong(
                    f"{prefix}.{key}", "with prompt_template the answer alone carries loss",
                    advice="Remove one of the two", also=(f"{prefix}.prompt_template",),
                )  # fmt: skip


def warnings(check: Check) -> Iterator[str]:
    """Arguments that no template mentions, and a template that a data set does not use."""
    config, provenance = check.config, check.provenance
    kind = kind_of_template(config.chat_template)
    if kind == "none" or not check.mode:
        return
    if config.chat_template is not None:
        for prefix, loader in _conversation_loaders(check):
            if loader.prompt_template:
                yield (
                    f"{provenance.nearest('chat_template')}: chat_template: not used by {prefix}, "
                    f"which has prompt_template = {loader.prompt_template!r}"
                )
    known = _mentioned(check)
    for name in config.chat_template_kwargs if known else ():
        if name not in known:
            near = did_you_mean(name, [word for word in known if "_" in word])
            key = f"chat_template_kwargs.{name}"
            yield (
                f"{provenance.nearest(key)}: {key}: the chat template does not use an argument of "
                f"this name{f': {near}' if near else ''}"
            )


def _mentioned(check: Check) -> set[str]:
    """The words of the templates that may be used; empty where they are not known."""
    value = check.config.chat_template
    kind = kind_of_template(value)
    if value is not None and kind == "inline":
        texts = [value]
    elif value is not None and kind == "file":
        texts = [_text_of(Path(value))] if Path(value).is_file() else []
    else:
        found = tokenizer_templates(tokenizer_dir(check.config)) or {}
        texts = [found[value]] if value in found else list(found.values())
    return {word for text in texts for word in _NAMES.findall(text)}
