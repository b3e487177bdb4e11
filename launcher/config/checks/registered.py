"""Rules about your own callbacks: their files are valid Python and define what is listed.

The files are parsed, never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.provenance import KeyProblem
from launcher.config.schema import RegisteredCallbackSection
from launcher.errors import did_you_mean


def callbacks(check: Check) -> Iterator[KeyProblem]:
    """Every entry of `callbacks` that is not built in names a class of `register_path`."""
    place = check.config.register_path
    if not place or not Path(place).exists():
        return
    root = Path(place)
    names: set[str] = set()
    for file in sorted(root.glob("*.py")) if root.is_dir() else [root]:
        try:
            names |= _defined(ast.parse(file.read_bytes()))
        except (SyntaxError, ValueError, OSError) as error:
            line = getattr(error, "lineno", None)
            yield KeyProblem(
                key="register_path",
                where=f"{file}:{line}" if line else str(file),
                what=f"register_path = {place!r}",
                rule=f"this is not valid Python: {getattr(error, 'msg', error)}",
            )
            return
    for index, entry in enumerate(check.config.callbacks):
        if isinstance(entry, RegisteredCallbackSection) and entry.type not in names:
            yield check.wrong(
                f"callbacks.{index}.type",
                f"{place} does not define it, but {', '.join(sorted(names)) or 'no class'}",
                nearest=did_you_mean(entry.type, names),
            )


def _defined(tree: ast.Module) -> set[str]:
    """Names of classes, and of what is imported, anywhere in a file."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {(alias.asname or alias.name) for alias in node.names}
    return names - {"annotations"}
