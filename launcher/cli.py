"""From argv to a checked configuration to a run mode, and the exit code at the end.

Owns the order (parse, resolve, rules, run) and how mistakes are shown. Nothing heavy is imported
before the configuration is right: torch first comes in with launcher.modes.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from launcher.config.command_line import CommandLine, help_text, parse
from launcher.errors import EXIT_INTERNAL, EXIT_OK, EXIT_SIGINT, EXIT_USER, Problem, UserError

if TYPE_CHECKING:
    from launcher.config.resolve import Resolved

ECHO_DELAY_SECONDS = 5.0
"""How long a rank other than 0 waits before it tells its error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code; mistakes of the user leave no traceback."""
    line = parse(sys.argv[1:] if argv is None else argv)
    if line.help:
        print(help_text())
        return EXIT_OK
    try:
        resolved = _checked(line)
    except UserError as error:
        if _rank() == 0:
            _show(error.problems, tail=". Nothing was started.")
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(1)  # torchrun ends all ranks at the first exit: let rank 0 speak before
        return EXIT_USER
    except Exception:
        traceback.print_exc()
        return EXIT_INTERNAL
    try:
        return _run(line, resolved)
    except UserError as error:
        _show(error.problems)
        return EXIT_USER
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return EXIT_SIGINT
    except Exception:
        traceback.print_exc()
        return EXIT_INTERNAL


def leave(code: int) -> NoReturn:
    """End this process with `code`.

    One rank of several leaves at once: threads of gloo that outlive the interpreter abort it now
    and then, and a job that has succeeded would be reported as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)


def _checked(line: CommandLine) -> Resolved:
    """The resolved configuration. Raises UserError with every problem of keys and rules."""
    from launcher.config import rules
    from launcher.config.resolve import resolve_command_line

    resolved = resolve_command_line(line)
    config, provenance = resolved.config, resolved.provenance
    only_looks = line.check_config or line.print_config
    started = "WORLD_SIZE" in os.environ or not only_looks
    found = rules.check(
        config,
        provenance,
        world=rules.world_size() if started else rules.planned_world_size(),
        bad_keys=resolved.bad_keys,
    )
    problems = (*resolved.problems, *found)
    if problems:
        raise UserError(problems)
    if _rank() == 0:
        _say_what_is_ignored(resolved.no_effect)
        for warning in rules.warnings(config, provenance):
            print(f"warning: {warning}", file=sys.stderr)
    return resolved


def _run(line: CommandLine, resolved: Resolved) -> int:
    from launcher.config.printing import to_yaml

    text = to_yaml(resolved.config, resolved.provenance)
    if line.print_config:
        if _rank() == 0:
            print(text, end="")
        return EXIT_OK
    if line.check_config:
        if _rank() == 0:
            print(f"{line.config}: the configuration is right")
        return EXIT_OK
    from launcher import modes

    return modes.run(resolved.config, resolved.provenance, text)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _show(problems: Iterable[Problem], *, tail: str = ".") -> None:
    """One `error:` line a problem, and how many there are.

    What goes wrong on all ranks goes wrong on rank 0 too: the others wait a little, and are usually
    ended by the launcher before they would say the same again.
    """
    if _rank():
        time.sleep(ECHO_DELAY_SECONDS)
    found = list(problems)
    mark = f"[rank {_rank()}] " if _rank() else ""
    for problem in found:
        print(f"{mark}error: {problem}", file=sys.stderr)
    count = len(found)
    if count > 1:
        print(f"{mark}{count} errors{tail}", file=sys.stderr)


def _say_what_is_ignored(keys: Sequence[str]) -> None:
    if keys:
        text = f"accepted, no effect on PyTorch: {', '.join(keys)}"
        lines = textwrap.wrap(text, width=100, subsequent_indent="  ", break_long_words=False)
        print("\n".join(lines), file=sys.stderr)
