"""From argv to a checked configuration to a run mode, and the exit code at the end.

Owns the order (parse, resolve, rules, run) and how errors are printed. The configuration is checked
before torch is imported, which launcher.modes does.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from launcher.config.command_line import CommandLine, help_text, parse
from launcher.environment import check_rendezvous, has_own_log, process_environment, rank_or_zero
from launcher.errors import EXIT_INTERNAL, EXIT_OK, EXIT_SIGINT, EXIT_USER, Problem, UserError

if TYPE_CHECKING:
    from launcher.config.resolve import Resolved

ECHO_DELAY_SECONDS = 5.0
"""How long a rank other than 0 waits before it prints its error."""

REPORT_SECONDS = 5.0
"""How long a rank that fails before it joined the job tries to reach the store of the job."""

PEER_DELAY_SECONDS = 10.0
"""How long a rank whose peer is gone waits for the launcher: longer than a peer takes to report."""

_PEER_IS_GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("Connection refused", "remote process exited"),
)
"""Messages of gloo and NCCL when the process at the other end has ended."""


def main(argv: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """Run one command line. Returns the exit code; errors of the user have no traceback.

    `owns_process`: the process ends with this command. As one rank of several it then reports a
    failure to the others, and is ended when another one fails.
    """
    line = parse(sys.argv[1:] if argv is None else argv)
    if line.help:
        print(help_text())
        return EXIT_OK
    report = _report_failure if owns_process else _report_nothing
    try:
        if line.migrate:
            return _migrate(line)
        resolved = _checked(line)
    except UserError as error:
        report(EXIT_USER, str(error))
        _print_problems(error.problems, tail=". Nothing was started.")
        return EXIT_USER
    except Exception as error:
        report(EXIT_INTERNAL, repr(error))
        traceback.print_exc()
        return EXIT_INTERNAL
    try:
        return _run(line, resolved, ends_with_peers=owns_process)
    except UserError as error:
        report(EXIT_USER, str(error))
        _print_problems(error.problems)
        return EXIT_USER
    except KeyboardInterrupt:
        report(EXIT_SIGINT, "stopped by SIGINT")
        print("interrupted", file=sys.stderr)
        return EXIT_SIGINT
    except Exception as error:
        if _lost_a_peer(error):
            _wait_for_the_end()
        else:
            report(EXIT_INTERNAL, repr(error))
            traceback.print_exc()
        return EXIT_INTERNAL


def _report_nothing(code: int, reason: str) -> None:
    """For commands that run inside another program."""


def _report_failure(code: int, reason: str) -> None:
    """Report to the other ranks that this one fails, so that none waits for it."""
    try:
        environment = process_environment()
    except UserError:
        return
    if not environment.is_launched:
        return
    peers = sys.modules.get("launcher.parallel.peers")
    watching = peers.watching() if peers is not None else None
    if watching is not None:
        watching.fail(code, reason)
    elif environment.has_several_machines:  # the launcher ends the ranks of this one
        from launcher.parallel.failure import Failure, report_failure

        failure = Failure.of_this_host(environment.rank, code, reason)
        report_failure(environment, failure, timedelta(seconds=REPORT_SECONDS))


def _lost_a_peer(error: Exception) -> bool:
    """Whether this rank fails only because another one is gone, which reports the reason."""
    launched = process_environment().is_launched
    return launched and any(words in str(error) for words in _PEER_IS_GONE)


def _wait_for_the_end() -> None:
    """Leave the report and the exit code of the job to the rank that failed: the launcher then ends
    this one. Print one line in case it does not."""
    time.sleep(PEER_DELAY_SECONDS)
    print(f"[rank {rank_or_zero()}] another rank failed, see its log", file=sys.stderr)


def leave(code: int) -> NoReturn:
    """End this process with `code`.

    One rank of several exits at once: threads of gloo that outlive the interpreter sometimes abort
    it, and a job that succeeded would be reported as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE"):
        os._exit(code)
    sys.exit(code)


def _checked(line: CommandLine) -> Resolved:
    """The resolved configuration. Raises UserError with every problem of keys and rules."""
    from launcher.config import rules
    from launcher.config.resolve import resolve_command_line

    resolved = resolve_command_line(line)
    if line.opens_data_alone:
        resolved = _for_its_data(resolved)
    config, provenance = resolved.config, resolved.provenance
    only_checks = line.check_config or line.print_config or line.opens_data_alone
    started = "WORLD_SIZE" in os.environ or not only_checks
    found = rules.check(
        config,
        provenance,
        world=rules.world_size() if started else rules.planned_world_size(),
        bad_keys=resolved.bad_keys,
        rules=rules.DATA_RULES if line.opens_data_alone else rules.RULES,
    )
    problems = (*resolved.problems, *found)
    if problems:
        raise UserError(problems)
    if not only_checks and not config.only_save_strategy:
        check_rendezvous()
    if rank_or_zero() == 0:
        _log_ignored(resolved.no_effect)
        _log_replaced(resolved)
        for warning in rules.warnings(config, provenance):
            print(f"warning: {warning}", file=sys.stderr)
    return resolved


def _for_its_data(resolved: Resolved) -> Resolved:
    """The configuration in the mode that reads its data: its own, else training or evaluation by
    the section it has."""
    from launcher.config.derived import evaluation_datasets

    config = resolved.config
    if config.run_mode in ("train", "finetune", "eval"):
        return resolved
    evaluates = config.train_dataset is None and bool(evaluation_datasets(config))
    mode = "eval" if evaluates else "train"
    return replace(resolved, config=replace(config, run_mode=mode, only_save_strategy=False))


def _migrate(line: CommandLine) -> int:
    """Print the configuration in the keys of this launcher, and the problems that stay."""
    from launcher.config import rules
    from launcher.config.files import second_names
    from launcher.config.migrate import migrate
    from launcher.config.resolve import resolve_command_line

    resolved = resolve_command_line(line)
    found = rules.check(
        resolved.config, resolved.provenance, world=rules.planned_world_size(),
        bad_keys=resolved.bad_keys,
    )  # fmt: skip
    source = str(line.config)
    migration = migrate(resolved, found, source, second_names(source))
    print(migration.text, end="")
    if migration.problems:
        _print_problems(migration.problems)
    return EXIT_USER if migration.problems else EXIT_OK


def _run(line: CommandLine, resolved: Resolved, *, ends_with_peers: bool) -> int:
    from launcher.config.printing import to_yaml

    text = to_yaml(resolved.config, resolved.provenance)
    if line.print_config:
        if rank_or_zero() == 0:
            print(text, end="")
        return EXIT_OK
    if line.check_config:
        if rank_or_zero() == 0:
            print(f"{line.config}: the configuration is valid")
        return EXIT_OK
    from launcher import modes

    if line.prepare_data:
        return modes.prepare(resolved.config, resolved.provenance)
    if line.show_data:
        return modes.show(resolved.config, resolved.provenance, line.show_data)
    return modes.run(resolved.config, resolved.provenance, text, ends_with_peers=ends_with_peers)


def _print_problems(problems: Iterable[Problem], *, tail: str = ".") -> None:
    """One `error:` line a problem, and how many there are.

    An error of all ranks is an error of rank 0 too: where ranks share a console the others wait
    first, and the launcher usually ends them before they would repeat it.
    """
    rank, found = rank_or_zero(), list(problems)
    if rank and not has_own_log():
        time.sleep(ECHO_DELAY_SECONDS)
    mark = f"[rank {rank}] " if rank else ""
    for problem in found:
        print(f"{mark}error: {problem}", file=sys.stderr)
    count = len(found)
    if count > 1:
        print(f"{mark}{count} errors{tail}", file=sys.stderr)
    if rank and has_own_log():  # rank 0, whose log is the console, ends first
        time.sleep(ECHO_DELAY_SECONDS)


def _log_replaced(resolved: Resolved) -> None:
    """One line for each value of another program that is replaced by another value."""
    for change in resolved.changes:
        if change.kind == "replaced" and change.new_keys == (change.key,):
            why = f": {change.why}" if change.why else ""
            print(f"{change.where}: {change.key} = {change.value!r} is another value here{why}",
                  file=sys.stderr)  # fmt: skip


def _log_ignored(keys: Sequence[str]) -> None:
    if keys:
        text = f"accepted, no effect on PyTorch: {', '.join(keys)}"
        lines = textwrap.wrap(text, width=100, subsequent_indent="  ", break_long_words=False)
        print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    leave(main(owns_process=True))
