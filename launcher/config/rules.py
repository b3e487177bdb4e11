"""The rules between the sections of a configuration.

Owns the list of them. Every rule is a small function that yields problems; all are run, and all
problems are reported together, apart from those that only follow from the problem of another key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.config.checks import (
    chat,
    evaluation,
    fp8,
    generation,
    memory,
    mixture,
    model,
    parallel,
    paths,
    pet,
    pipeline,
    placeholders,
    preference,
    profiling,
    prompts,
    records,
    registered,
    streaming,
    tokenizer,
    training,
    weights,
)
from launcher.config.checks.check import Check, Rule
from launcher.config.derived import global_batch_size, planned_world_size, world_size
from launcher.config.provenance import KeyProblem, Provenance
from launcher.config.schema import CALLBACKS, Config, EvalCallbackSection
from launcher.errors import Problem, path_problem

__all__ = [
    "RULES",
    "check",
    "global_batch_size",
    "planned_world_size",
    "warnings",
    "world_size",
]

_ABOUT_CHAT: tuple[Rule, ...] = (chat.templates, chat.arguments, chat.tools)

_ABOUT_DATA: tuple[Rule, ...] = (
    paths.datasets,
    streaming.streams,
    mixture.mixtures,
    records.places,
    records.tables,
    records.splits,
    records.columns,
    records.transforms,
    records.prompts,
    records.packing,
    chat.learnt_turns,
    *_ABOUT_CHAT,
    preference.loaders,
    preference.packing,
    paths.tokenizer,
    tokenizer.tokenizer_files,
    paths.named_paths,
    placeholders.hub_files,
    placeholders.data_files,
)

RULES: tuple[Rule, ...] = (
    paths.run_mode,
    parallel.processes,
    parallel.sharded_optimizer,
    parallel.own_decoder,
    parallel.tensor,
    parallel.ulysses,
    parallel.rows,
    parallel.attention_dropout,
    parallel.dynamic_rope,
    parallel.experts,
    pipeline.stages,
    pipeline.micro_batches,
    pipeline.accumulation,
    pipeline.interleaving,
    pipeline.split,
    pipeline.compiled,
    pipeline.recomputed,
    pet.adapters,
    pet.frozen,
    memory.recompute,
    memory.select_recompute,
    memory.by_operation,
    memory.swap,
    training.loss_chunks,
    fp8.exactness,
    fp8.patterns,
    fp8.installed,
    training.sinking,
    training.checkpoint_names,
    training.norm_checks,
    training.optimizer_arguments,
    training.optimizer_numbers,
    training.schedule_arguments,
    training.schedule_numbers,
    training.loss_scale,
    training.half_weights,
    training.evaluation_in_training,
    evaluation.named_sets,
    evaluation.early_stopping,
    evaluation.best_save,
    training.trackers_installed,
    profiling.steps,
    profiling.ranks,
    profiling.folder,
    preference.trainer,
    preference.arguments,
    preference.reference,
    generation.numbers,
    generation.generation_file,
    generation.lists,
    generation.model_tokens,
    generation.several_texts,
    prompts.messages,
    prompts.chat,
    *_ABOUT_DATA,
    weights.weights,
    weights.file_format,
    weights.damage,
    weights.cutting,
    weights.copies,
    registered.callbacks,
    model.model,
)

DATA_RULES: tuple[Rule, ...] = (
    paths.run_mode,
    parallel.rows,
    training.evaluation_in_training,
    evaluation.named_sets,
    *_ABOUT_DATA,
    model.model,
)
"""Those of jobs that only open the data: they need neither weights nor the processes of the run."""


@dataclass(frozen=True)
class _Known:
    """Keys that have a problem already."""

    keys: frozenset[str]

    def covers(self, key: str) -> bool:
        """Whether this key, or a section around it, is among them."""
        return any(key == known or key.startswith(f"{known}.") for known in self.keys)


def check(
    config: Config,
    provenance: Provenance,
    *,
    world: int | None,
    bad_keys: frozenset[str] = frozenset(),
    rules: tuple[Rule, ...] = RULES,
) -> list[Problem]:
    """Every problem that the rules find. `world`: number of processes, None before the start."""
    subject = Check(config=config, provenance=provenance, world_size=world)
    known = _Known(bad_keys)
    if with_nul := list(_nul_characters(subject)):
        return with_nul  # the system raises ValueError for such a path
    found: list[Problem] = []
    for rule in rules:
        try:
            found += [problem for problem in rule(subject) if not _follows(problem, known)]
        except OSError as error:
            found.append(_refused_path(subject, error))
    return list(dict.fromkeys(map(provenance.as_written, found)))


def _nul_characters(check: Check) -> Iterator[Problem]:
    """Strings with a NUL character, which no path, name or prompt can have."""
    for key in check.provenance.places:
        try:
            value = check.value(key)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and "\0" in text for text in texts):
            yield check.wrong(key, "must not contain a NUL character", advice="Remove it")


def _refused_path(check: Check, error: OSError) -> Problem:
    """The problem of a path that cannot be accessed, with the place of its key."""
    key = key_of_path(check, str(error.filename or ""))
    problem = path_problem(error, where=check.provenance.nearest(key))
    return replace(problem, what=f"{key}: {problem.what}") if key else problem


def key_of_path(check: Check, path: str) -> str:
    """The key whose value is `path` or a directory above it; empty where there is none."""
    best = ""
    for key in check.provenance.places:
        try:
            value = check.value(key)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue
        for text in value if isinstance(value, list) else [value]:
            is_above = isinstance(text, str) and text and (f"{path}/").startswith(f"{text}/")
            if is_above and len(str(text)) > len(best and str(check.value(best))):
                best = key
    return best


def _follows(problem: KeyProblem, known: _Known) -> bool:
    return any(known.covers(key) for key in (problem.key, *problem.also))


def warnings(config: Config, provenance: Provenance) -> list[str]:
    """Settings that are allowed and probably a mistake, one line each."""
    lines = []
    if isinstance(config.resume_training, str) and Path(config.load_checkpoint or ".").is_file():
        lines.append(
            f"resume_training = {config.resume_training!r}: not used, load_checkpoint is a file"
        )
    if config.context.device_target == "Ascend" and provenance.is_written("context.device_target"):
        where = provenance.where("context.device_target")
        lines.append(f"{where}: context.device_target = 'Ascend': runs on CUDA, else on the CPU")
    built_in = [entry.type for entry in config.callbacks if type(entry) in CALLBACKS.values()]
    lines += [
        f"callbacks: {kind} is listed {built_in.count(kind)} times: the last one is used"
        for kind in dict.fromkeys(built_in)
        if built_in.count(kind) > 1
    ]
    given = [config.lr_schedule.learning_rate, config.optimizer.learning_rate]
    if None not in given and given[0] != given[1]:
        where = provenance.where("optimizer.learning_rate")
        lines.append(f"{where}: optimizer.learning_rate: not used, lr_schedule has a learning_rate")
    if config.last_callback(EvalCallbackSection) is not None and not config.do_eval:
        lines.append("callbacks: EvalCallBack has no effect without do_eval: True")
    subject = Check(config=config, provenance=provenance, world_size=world_size())
    for room in (parallel, pipeline, memory, fp8, weights, generation, chat, profiling):
        lines += room.warnings(subject)
    return lines
