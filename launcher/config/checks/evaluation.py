"""Rules about evaluation: named sets, early stopping, and the best save."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.config.checks.check import Check
from launcher.config.evaluation import is_contradiction, metric_names, mode_of
from launcher.config.mixture import NAME
from launcher.config.provenance import KeyProblem
from launcher.config.schema import CheckpointMonitorSection, EarlyStoppingSection
from launcher.errors import did_you_mean


def named_sets(check: Check) -> Iterator[KeyProblem]:
    """Evaluation sets have names of their own, and are not given in two places."""
    sets = check.config.eval_datasets
    if sets and check.config.eval_dataset is not None:
        yield check.wrong(
            "eval_dataset",
            "eval_datasets has the evaluation data",
            what="eval_dataset and eval_datasets are both set",
            advice="Add the section to eval_datasets with a `name`, or remove one of the two",
            also=("eval_datasets",),
        )
    names = [section.name for section in sets]
    for index, name in enumerate(names):
        key = f"eval_datasets.{index}.name"
        if not name:
            yield check.wrong(
                key,
                "every evaluation set has one: it is a part of the keys of metrics",
                what=f"{key} is missing",
                advice=f"Add `name: {_free(names)}`",
            )
        elif not NAME.fullmatch(name):
            yield check.wrong(
                key,
                "a name has letters, digits, `.`, `_` and `-`: it is a part of the keys of metrics",
            )
        elif (first := names.index(name)) != index:
            yield check.wrong(
                key,
                f"eval_datasets.{first} has this name too",
                nearest=f"Nearest: {_free(names, name)}",
                advice="Give every set a name of its own",
            )


def _free(names: list[str], stem: str = "heldout") -> str:
    number = 2
    while stem in names and f"{stem}-{number}" in names:
        number += 1
    return f"{stem}-{number}" if stem in names else stem


def early_stopping(check: Check) -> Iterator[KeyProblem]:
    """EarlyStopping follows a metric that is computed during training."""
    for index, entry in enumerate(check.config.callbacks):
        if isinstance(entry, EarlyStoppingSection):
            yield from _metric(check, f"callbacks.{index}", "metric", entry.metric)
            yield from _mode(check, f"callbacks.{index}", "mode", entry.metric, entry.mode)


def best_save(check: Check) -> Iterator[KeyProblem]:
    """keep_best follows a metric that saves have: the steps of saves are evaluated."""
    for index, entry in enumerate(check.config.callbacks):
        if isinstance(entry, CheckpointMonitorSection) and entry.keep_best:
            key = f"callbacks.{index}"
            found = list(_metric(check, key, "best_metric", entry.best_metric))
            yield from found or _intervals(check, key, entry)
            yield from _mode(check, key, "best_mode", entry.best_metric, entry.best_mode)


def _mode(
    check: Check, entry: str, name: str, metric: str, mode: str | None
) -> Iterator[KeyProblem]:
    if is_contradiction(metric, mode):
        right = mode_of(metric, None)
        better = "lower" if right == "min" else "higher"
        yield check.wrong(
            f"{entry}.{name}", f"{better} values of {metric} are better",
            nearest=f"Nearest: {right}", advice=f"Remove {entry}.{name}",
            also=(f"{entry}.{name.removesuffix('mode')}metric",),
        )  # fmt: skip


def _metric(check: Check, entry: str, name: str, metric: str) -> Iterator[KeyProblem]:
    if not check.trains:
        return
    kind = "keep_best" if name == "best_metric" else "EarlyStopping"
    if not check.config.do_eval:
        key = f"{entry}.keep_best" if name == "best_metric" else f"{entry}.type"
        yield check.wrong(
            key,
            f"{kind} needs evaluations during training",
            nearest="Nearest: do_eval: True, with an eval_dataset",
            also=("do_eval", entry),
        )
        return
    known = metric_names(check.config)
    if metric not in known:
        yield check.wrong(
            f"{entry}.{name}",
            f"evaluations have {', '.join(known)}",
            nearest=did_you_mean(metric, known) or f"Nearest: {known[0]}",
            also=("eval_dataset", "eval_datasets"),
        )


def _intervals(check: Check, entry: str, monitor: CheckpointMonitorSection) -> Iterator[KeyProblem]:
    steps, evaluated = monitor.save_checkpoint_steps, check.config.eval_step_interval
    if not steps:
        yield check.wrong(
            f"{entry}.keep_best",
            "saves by time fall on steps that are not evaluated",
            nearest=f"Nearest: save_checkpoint_steps: {max(evaluated, 1)}",
            also=(f"{entry}.save_checkpoint_steps", "eval_step_interval"),
        )
        return
    if evaluated < 1 or steps % evaluated == 0 or evaluated % steps == 0:
        return
    below, above = steps // evaluated * evaluated, -(-steps // evaluated) * evaluated
    yield check.wrong(
        f"{entry}.save_checkpoint_steps",
        f"with keep_best steps are saved that are evaluated (eval_step_interval {evaluated})",
        nearest=f"Nearest: {f'{below} or ' if below else ''}{above}",
        also=("eval_step_interval", f"{entry}.keep_best"),
    )
