"""Errors that are shown to the user, and their exit codes.

Owns the form of an error. Every error that a user can cause has four parts: what is wrong (with the
value and file:line), the rule, the nearest right value, and how to continue. Imports nothing of the
project.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_SIGINT = 130


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One error with its four parts. Only `what` is required; empty parts are left out. URLs are
    shown by `shown_url`, whoever wrote them into the parts."""

    what: str
    """What is wrong, with the offending value: `runner_config.batch_size = -1`."""
    where: str = ""
    """`x.yaml:14`, `command line: --epochs`, or a path."""
    rule: str = ""
    """The rule that is violated, without a final stop."""
    nearest: str = ""
    """The nearest right value: `did you mean `optimizer.lr`?` or `Nearest: 2 or 4`."""
    advice: str = ""
    """How to continue, as a sentence."""

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        if self.rule:
            head += f": {self.rule}"
        tail = [
            part if part[-1] in ".?!\n" else part + "."
            for part in (head, self.nearest, self.advice)
            if part
        ]
        return _with_shown_urls(" ".join(tail).rstrip("\n"))


class UserError(Exception):
    """An error of the user: the run ends with exit code 2 and prints all problems, no traceback."""

    def __init__(
        self,
        problems: Problem | str | Iterable[Problem],
        *,
        where: str = "",
        rule: str = "",
        nearest: str = "",
        advice: str = "",
    ) -> None:
        if isinstance(problems, str):
            problems = Problem(
                what=problems, where=where, rule=rule, nearest=nearest, advice=advice
            )
        self.problems: tuple[Problem, ...] = (
            (problems,) if isinstance(problems, Problem) else tuple(problems)
        )
        super().__init__("\n".join(map(str, self.problems)))


def path_problem(error: OSError | ValueError | RuntimeError, *, where: str = "") -> Problem:
    """The problem of a path that the system cannot access: without permission, too long, in a loop
    of links, or with a NUL character."""
    name = str(getattr(error, "filename", None) or "")
    number = getattr(error, "errno", None) or 0
    reason = getattr(error, "strerror", None) or str(error)
    return Problem(
        what=f"{_short(name)!r}: {reason}" if name else reason,
        where=where,
        rule=_PATH_RULES.get(number, "the path must be one that the system can open"),
        advice=_PATH_ADVICE.get(number, "Check the path"),
    )


def _short(path: str) -> str:
    return path if len(path) <= 80 else f"{path[:60]}...{path[-17:]}"


_PATH_RULES = {
    errno.EACCES: "this user has no permission for the path or a directory above it",
    errno.EPERM: "this user has no permission for the path or a directory above it",
    errno.ENAMETOOLONG: "the file system limits the length of names and paths",
    errno.ELOOP: "its symbolic links form a loop",
}
_PATH_ADVICE = {
    errno.EACCES: "Grant read and execute permission (chmod), or use another path",
    errno.EPERM: "Grant read and execute permission (chmod), or use another path",
    errno.ENAMETOOLONG: "Use a shorter path",
    errno.ELOOP: "Fix the links",
}


def shown_url(url: str) -> str:
    """A URL for a message: without user, password, query and fragment, which may be credentials."""
    protocol, _, rest = url.partition("://")
    server, slash, path = rest.partition("/")
    path = path.partition("?")[0].partition("#")[0]
    return f"{protocol}://{server.rpartition('@')[2].partition('?')[0]}{slash}{path}"


def _with_shown_urls(text: str) -> str:
    """A text with each URL in it as `shown_url` gives it."""
    return _URL.sub(lambda found: shown_url(found[0]), text)


_URL = re.compile(r"""\w+://(?:(?!,\w+://|::\w+://)[^\s'"`])*""")
"""A URL in a text, up to a space or a quote, or the next one of a list or a chain."""


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`did you mean `x`?` for the nearest of `known`, or an empty string when none is similar."""
    matches = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean `{matches[0]}`?" if matches else ""
