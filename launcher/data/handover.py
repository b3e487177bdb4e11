"""One rank works, all ranks get the outcome: a folder, or the same error.

Owns the small file through which the main rank tells the others what came of its work. Invariants:
the main rank reaches the barrier whatever happens to it, so no rank waits for ever; the file is
written before the barrier and read behind it, so an old one is never taken for the new one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any
from uuid import uuid4

from launcher.errors import Problem, UserError


def hand_over(
    make: Callable[[], Path],
    *,
    name: str,
    cache_dir: Path,
    is_main: bool,
    wait: Callable[[], None],
) -> Path:
    """The folder below `cache_dir` that `make` returned on the main rank.

    Every rank calls this with the same `name`; `wait` is a barrier and is called once. What `make`
    raised is raised on the main rank; the others raise a UserError with the same problems.
    """
    path = cache_dir / f"outcome-{name}.json"
    if is_main:
        try:
            folder = make()
            _write(path, {"folder": folder.name})
        except Exception as error:
            with suppress(OSError):
                _write(path, {"problems": _problems(error)})
            wait()
            raise
        wait()
        return folder
    wait()
    return cache_dir / _read(path)


def _write(path: Path, outcome: dict[str, Any]) -> None:
    scratch = path.with_suffix(f".{uuid4().hex}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(outcome))
    scratch.replace(path)


def _read(path: Path) -> str:
    try:
        outcome = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            "the main rank left no word about the data",
            where=str(path.parent),
            rule="all ranks must see the same data cache",
            advice="Put output_dir on a file system that all machines share",
        ) from None
    if "problems" in outcome:
        raise UserError([Problem(**problem) for problem in outcome["problems"]])
    return str(outcome["folder"])


def _problems(error: Exception) -> list[dict[str, str]]:
    if not isinstance(error, UserError):
        return [{"what": f"the main rank could not read the data ({error!r})"}]
    names = [field.name for field in fields(Problem)]
    return [{name: getattr(problem, name) for name in names} for problem in error.problems]
