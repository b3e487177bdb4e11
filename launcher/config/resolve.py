"""A YAML file and a command line become one configuration.

The way of a value, each step once, and nothing changes a tree in between:

    parse   yaml_reader.py   text of a file       -> tree of nodes with file:line
    alias   aliases.py       second names of keys -> the keys
    merge   files.py         base_config chain    -> one tree
            assign.py        flags and overrides over it
    adopt   draft.py         keys of another program -> keys (`launcher.extensions.TRANSLATIONS`)
    imply   implied.py       keys that set other keys, such as run_mode: resume
    type    reader.py        tree                 -> Config
    check   rules.py         what fits together (launcher/config/checks/)

Owns the order of the steps. Problems of single keys are collected in `Resolved.problems`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.aliases import canonical
from launcher.config.assign import assigned, place_of
from launcher.config.command_line import Assignment, CommandLine, override_word, parse
from launcher.config.draft import Change, Draft, asks_for_nothing
from launcher.config.files import find_config, load_tree
from launcher.config.implied import IMPLIED
from launcher.config.nodes import Node
from launcher.config.provenance import Provenance
from launcher.config.reader import Reader
from launcher.config.schema import Config
from launcher.errors import Problem, UserError
from launcher.extensions import TRANSLATIONS, installed


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration with the place of every value, and the problems of single keys."""

    config: Config
    provenance: Provenance
    written: Node
    """The merged tree of what the user wrote."""
    tree: Node
    """The same in keys of this program: before implied keys and types."""
    problems: tuple[Problem, ...] = ()
    bad_keys: frozenset[str] = frozenset()
    """Keys that have a problem already: rules report nothing that follows from them."""
    no_effect: tuple[str, ...] = ()
    """Keys the user set that have no effect on PyTorch."""
    changes: tuple[Change, ...] = ()
    """What was translated from the keys of another program."""


def resolve(
    config_path: str,
    run_mode: str | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Resolved:
    """The configuration of `config_path` under these flags (name to value) and override words."""
    argv = ["--config", config_path]
    for name, value in {**({"run_mode": run_mode} if run_mode else {}), **(flags or {})}.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        argv += [f"--{name}", *map(str, values)]
    return resolve_command_line(parse([*argv, *overrides]))


def resolve_command_line(line: CommandLine) -> Resolved:
    """The configuration of a command line. Raises UserError when a file cannot be read."""
    problems: list[Problem] = list(line.problems)
    if line.config is None:
        raise UserError([*problems, _NO_FILE])
    try:
        tree = load_tree(find_config(line.config))
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    for assignment in _in_order(line):
        try:
            tree = assigned(tree, assignment)
        except UserError as error:
            problems += error.problems
    return read_tree(tree, problems)


def read_tree(tree: Node, problems: Sequence[Problem] = ()) -> Resolved:
    """The configuration of a merged tree, every key checked."""
    found: list[Problem] = list(problems)
    draft = Draft(tree)
    written = tree
    for translate in installed(TRANSLATIONS).values():
        translate(draft)
    tree = draft.tree
    for implied in IMPLIED:
        tree = implied(tree, found)
    reader = Reader(tree)
    names = _names(draft.changes, reader.places)
    provenance = Provenance(reader.places, reader.extra, names)
    dropped = [
        change.key
        for change in draft.changes
        if change.kind == "no effect" and not asks_for_nothing(change.value)
    ]
    wrong = [key for problem in draft.problems for key in (problem.key, *problem.also)]
    unread = [
        key for pattern in EVALUATION_READS_ALL for key in fnmatch.filter(reader.places, pattern)
    ]
    return Resolved(
        config=_without_tasks(reader.config),
        provenance=provenance,
        problems=(
            *found,
            *_in_place(draft.problems, [provenance.as_written(p) for p in reader.problems]),
        ),
        bad_keys=frozenset({*reader.bad_keys, *wrong} - {""}),
        no_effect=tuple(dict.fromkeys([*dropped, *reader.no_effect, *unread])),
        changes=tuple(draft.changes),
        tree=draft.tree,
        written=written,
    )


def _names(changes: Sequence[Change], places: Mapping[str, str]) -> dict[str, str]:
    """Keys that were renamed and nothing else, to the first name of each."""
    names: dict[str, str] = {}
    for change in changes:
        if change.kind == "renamed":
            (new,) = change.new_keys
            names[new] = names.get(change.key, change.key)
            if places.get(new, change.where) != change.where:  # the command line set it
                del names[new]
    return names


def _in_place(translated: Sequence[Problem], others: Sequence[Problem]) -> list[Problem]:
    """Problems of the translation among the others, which are in the order of the file."""
    listed = list(others)
    for problem in translated:
        line = _line(problem)
        after = (i for i, other in enumerate(listed) if _line(other) > line)
        listed.insert(next(after, len(listed)), problem)
    return listed


def _line(problem: Problem) -> int:
    """The line of a problem in its file; 0 for the command line."""
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdecimal() else 0


_NO_FILE = Problem(
    what="`--config` is required",
    where="command line",
    rule="it names the YAML file of the run",
    advice="Write `python run.py --config x.yaml --run_mode train`",
)
EVALUATION_READS_ALL = (
    "eval_dataset.seed",
    "eval_dataset.drop_remainder",
    "eval_dataset.data_loader.shuffle",
    "eval_dataset.data_loader.*.shuffle",
    "eval_datasets.*.seed",
    "eval_datasets.*.drop_remainder",
    "eval_datasets.*.data_loader.shuffle",
    "eval_datasets.*.data_loader.*.shuffle",
)
"""Keys of a data section that have no effect where every row is read once."""


def _in_order(line: CommandLine) -> list[Assignment]:
    """Flags, then overrides; among the prompts of --predict_data, words that set a key count as
    overrides: `--predict_data 'a' 'b' seed=3`."""
    flags, overrides = [], list(line.overrides)
    for flag in line.flags:
        if flag.key == "input_data" and isinstance(flag.text, list):
            found = [override_word(word) for word in flag.text[1:] if _sets_a_key(word)]
            prompts = [flag.text[0], *(word for word in flag.text[1:] if not _sets_a_key(word))]
            overrides += found
            flag = replace(flag, text=prompts if len(prompts) > 1 else prompts[0])
        flags.append(flag)
    return [*flags, *overrides]


_KEY_OF_SECTION = re.compile(r"\w+(?:\.\w+)*")


def _sets_a_key(word: str) -> bool:
    """Also where only the section of the key is known: a typing error is no prompt."""
    key, equals, _ = word.lstrip("+~").partition("=")
    section, dot, rest = key.partition(".")
    known = key if not (dot and _KEY_OF_SECTION.fullmatch(rest)) else section
    return bool(equals or word.startswith("~")) and place_of(canonical(known)).is_known


def _without_tasks(config: Config) -> Config:
    """The data of task sections has been moved to the data sections: drop what is left of it."""
    for name in ("train_dataset_task", "eval_dataset_task"):
        task = getattr(config, name)
        if task.dataset_config is not None:
            config = dataclasses.replace(config, **{name: replace(task, dataset_config=None)})
    return config
