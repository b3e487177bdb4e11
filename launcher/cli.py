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

PEER_DELAY_SECONDS = 10.0
"""How long a rank whose peer is gone waits for the launcher: longer than a peer that tells why."""

_PEER_IS_GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("Connection refused", "remote process exited"),
)
"""What gloo and NCCL say when a process at the other end has ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code; mistakes of the user leave no traceback."""
    line = parse(sys.argv[1:] if argv is None else argv)
    if line.help:
        print(help_text())
        return EXIT_OK
    try:
        resolved = _checked(line)
    except UserError as error:
        _show(error.problems, tail=". Nothing was started.")
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
    except Exception as error:
        if _lost_a_peer(error):
            _wait_for_the_end()
        else:
            traceback.print_exc()
        return EXIT_INTERNAL


def _lost_a_peer(error: Exception) -> bool:
    """Whether this rank fails only because another one is gone, whose own words say why."""
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return not alone and any(words in str(error) for words in _PEER_IS_GONE)


def _wait_for_the_end() -> None:
    """Leave the word, and the exit code of the job, to the rank that failed: the launcher ends this
    one when it sees that. One line should nobody come."""
    time.sleep(PEER_DELAY_SECONDS)
    print(f"[rank {_rank()}] another rank has ended, see its log", file=sys.stderr)


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
