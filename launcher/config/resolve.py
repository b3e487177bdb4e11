"""A YAML file and a command line become one configuration.

Owns the precedence (defaults, base_config, the YAML, named flags, dotted overrides), the folding of
keys that say the same, and what is reported about keys without effect. Every problem of single
keys is gathered in `Resolved.problems`; the rules between sections are in launcher/config/rules.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.config import assign
from launcher.config.command_line import Assignment, CommandLine, override_word, parse
from launcher.config.files import canonical, find_config, fold, load_tree, take
from launcher.config.nodes import Node
from launcher.config.provenance import KeyProblem, Provenance
from launcher.config.reader import Reader
from launcher.config.schema import Config
from launcher.errors import Problem, UserError

_MOVED_GENERATION_KEYS = (
    *("max_length", "max_decode_length", "max_new_tokens", "min_length", "min_new_tokens"),
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "use_past"),
)
_SHARED_GENERATION_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
"""Keys of config.json too, so they stay in model_config."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A configuration with the place of every value, and what is wrong with single keys."""

    config: Config
    provenance: Provenance
    problems: tuple[Problem, ...] = ()
    bad_keys: frozenset[str] = frozenset()
    """Keys that have a problem already: rules stay silent about what follows from them."""
    no_effect: tuple[str, ...] = ()
    """Keys the user wrote that have no effect on PyTorch."""


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
    """The configuration a command line asks for. Raises UserError when a file cannot be read."""
    problems: list[Problem] = list(line.problems)
    if line.config is None:
        problems.append(
            Problem(
                what="`--config` is required",
                where="command line",
                rule="it names the YAML file of the run",
                advice="Write `python run.py --config x.yaml --run_mode train`",
            )
        )
        raise UserError(problems)
    try:
        tree = load_tree(find_config(line.config))
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    for assignment in _in_order(line):
        try:
            assign.apply(tree, assignment)
        except UserError as error:
            problems += error.problems
    return read_tree(tree, problems)


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


def _sets_a_key(word: str) -> bool:
    key, equals, _ = word.lstrip("+~").partition("=")
    return bool(equals or word.startswith("~")) and assign.place_of(canonical(key)).is_known


EVALUATION_READS_ALL = (
    "eval_dataset.seed",
    "eval_dataset.drop_remainder",
    "eval_dataset.data_loader.shuffle",
)
"""Keys of a data section that say nothing where every row is read once."""


def read_tree(tree: Node, problems: Sequence[Problem] = ()) -> Resolved:
    """Check every key of a merged tree and build the configuration."""
    found: list[Problem] = list(problems)
    _fold_trust(tree, found)
    _fold_run_mode(tree, found)
    _fold_generation(tree, found)
    _fold_dataset_tasks(tree)
    reader = Reader(tree)
    config = _finish(reader.config())
    unread = [key for key in EVALUATION_READS_ALL if key in reader.places]
    return Resolved(
        config=config,
        provenance=Provenance(reader.places),
        problems=(*found, *reader.problems),
        bad_keys=frozenset(reader.bad - {""}),
        no_effect=tuple(dict.fromkeys([*reader.no_effect, *unread])),
    )


def _from_command_line(node: Node) -> bool:
    return node.where.startswith("command line")


def _fold_trust(tree: Node, problems: list[Problem]) -> None:
    node = tree.value.get("trust_remote_code")
    if node is None or _from_command_line(node) or node.value in (False, None):
        return
    del tree.value["trust_remote_code"]
    problems.append(
        KeyProblem(
            what=f"trust_remote_code = {node.plain()!r}",
            where=node.where,
            rule="remote code can be allowed on the command line only",
            advice="Remove it, and pass `--trust_remote_code true`",
            key="trust_remote_code",
        )
    )


def _fold_run_mode(tree: Node, problems: list[Problem]) -> None:
    """`resume` is train with resume_training; `predict_with_train_model` is predict."""
    mode = tree.value.get("run_mode")
    if mode is None or mode.value not in ("resume", "predict_with_train_model"):
        return
    where = f"{mode.where} resume" if _from_command_line(mode) else mode.where
    if mode.value == "predict_with_train_model":
        tree.value["run_mode"] = Node(value="predict", where=mode.where)
        return
    tree.value["run_mode"] = Node(value="train", where=where)
    resume = tree.value.get("resume_training")
    refused = resume is not None and str(resume.value).lower() == "false"
    if resume is not None and refused and _from_command_line(mode) == _from_command_line(resume):
        problems.append(
            KeyProblem(
                what=f"run_mode = 'resume', but resume_training = {resume.value!r}",
                where=resume.where,
                rule="run_mode resume means train with resume_training: True",
                advice="Remove resume_training, or set run_mode to train",
                key="resume_training",
            )
        )
    elif resume is None or resume.value is None or refused:
        tree.value["resume_training"] = Node(value=True, where=where)


def _fold_generation(tree: Node, problems: list[Problem]) -> None:
    """Generation settings in model_config count where generation_config says nothing."""
    if any(
        not isinstance(node.value, dict)
        for node in (assign.find(tree, "model"), assign.find(tree, "model.model_config"))
        if node is not None
    ):
        return
    generation = assign.find(tree, "generation_config")
    if generation is not None and generation.value is None:
        generation.value = {}
    if generation is not None and not isinstance(generation.value, dict):
        return
    for key in (*_MOVED_GENERATION_KEYS, *_SHARED_GENERATION_KEYS):
        written = f"model.model_config.{key}"
        node = assign.find(tree, written)
        if node is None:
            continue
        target = "max_length" if key == "max_decode_length" else key
        given = assign.find(tree, f"generation_config.{target}")
        if key in _MOVED_GENERATION_KEYS:
            take(tree, written)
        if given is None and node.value is not None:
            tree.value.setdefault("generation_config", Node(value={}, where=node.where))
            tree.value["generation_config"].value[target] = node


def _fold_dataset_tasks(tree: Node) -> None:
    """`train_dataset_task.dataset_config` is usually the alias of train_dataset, which counts."""
    for name in ("train_dataset", "eval_dataset"):
        inner = assign.find(tree, f"{name}_task.dataset_config")
        if inner is None:
            continue
        outer = tree.value.get(name)
        if outer is None or outer.value is None:
            fold(tree, f"{name}_task.dataset_config", name, [])
        elif outer.plain() == inner.plain():
            take(tree, f"{name}_task.dataset_config")


def _finish(config: Config) -> Config:
    """Task sections have been folded into the data sections: drop what is left of them."""
    for name in ("train_dataset_task", "eval_dataset_task"):
        task = getattr(config, name)
        if task.dataset_config is not None:
            config = dataclasses.replace(config, **{name: replace(task, dataset_config=None)})
    return config
