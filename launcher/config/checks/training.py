"""Rules about a training run: sinking, optimizer, schedule, saving, evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.derived import evaluation_datasets
from launcher.config.provenance import KeyProblem
from launcher.config.schema import (
    DYNAMIC_LOSS_SCALE,
    LARGEST_LOSS_SCALE,
    LOSS_SCALES,
    OPTIMIZER_ARGUMENTS,
    SCHEDULE_ARGUMENTS,
    SCHEDULES_WITHOUT_WARMUP,
    WARMUP_ARGUMENTS,
    CheckpointMonitorSection,
)
from launcher.errors import did_you_mean
from models.keys import DTYPES, PRECISIONS

_SCALE_SENSE = "runner_wrapper.scale_sense"
_POSITIVE = "must be a number above 0 and at most 2**64"
_ALWAYS_TAKEN = ("type", "learning_rate", "total_steps", *WARMUP_ARGUMENTS)
_TRACKER_MODULES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "aim": ("aim",),
    "swanlab": ("swanlab",),
    "trackio": ("trackio",),
    "clearml": ("clearml",),
    "dvclive": ("dvclive",),
}


def loss_chunks(check: Check) -> Iterator[KeyProblem]:
    """The loss applies the head only of Slipway's decoder."""
    spec, chunk = check.spec, check.config.loss_chunk_tokens
    if check.trains and spec is not None and spec.decoder is None and chunk:
        yield check.wrong(
            "loss_chunk_tokens",
            f"the transformers implementation of {spec.family} computes all logits at once",
            nearest="Nearest: 0",
            also=("model.model_config",),
        )


def sinking(check: Check) -> Iterator[KeyProblem]:
    """sink_size is -1 or positive, and checkpoints fall on the end of a sink."""
    runner = check.config.runner_config
    size = runner.sink_size
    if size == 0 or size < -1:
        yield check.wrong(
            "runner_config.sink_size",
            "must be a number of steps, or -1 for an epoch",
            nearest="Nearest: 1" if size == 0 else "Nearest: -1",
        )
        return
    found = _monitor(check)
    if not runner.sink_mode or size <= 1 or found is None:
        return
    key, monitor = f"{found[0]}.save_checkpoint_steps", found[1]
    steps = monitor.save_checkpoint_steps
    if steps and steps % size:
        below, above = steps // size * size, (steps // size + 1) * size
        near = f"{below} or {above}" if below else f"{above}"
        yield check.wrong(
            key,
            f"must be a multiple of sink_size ({size})",
            nearest=f"Nearest: {near}",
            advice="Or set sink_mode to False to save at any step",
            also=("runner_config.sink_size", "runner_config.sink_mode", "callbacks"),
        )


def _monitor(check: Check) -> tuple[str, CheckpointMonitorSection] | None:
    for index, callback in reversed(list(enumerate(check.config.callbacks))):
        if isinstance(callback, CheckpointMonitorSection):
            return f"callbacks.{index}", callback
    return None


def checkpoint_names(check: Check) -> Iterator[KeyProblem]:
    """The prefix gives file names that can be parsed."""
    found = _monitor(check)
    if found is None:
        return
    key, prefix = f"{found[0]}.prefix", found[1].prefix
    bad = next((part for part in ("/", "\\", "rank") if part in prefix), None)
    if bad or not prefix.strip():
        cleaned = prefix.replace("\\", "/").rpartition("/")[2].replace("rank", "").strip("_-")
        yield check.wrong(
            key,
            f'must not contain "{bad}"' if bad else "must not be empty",
            nearest=f"Nearest: {cleaned or 'CKP'}",
            advice="Use `directory` to save elsewhere" if bad in ("/", "\\") else "",
        )


def norm_checks(check: Check) -> Iterator[KeyProblem]:
    """A step with too large a norm is skipped or ends the run, not both."""
    config, key = check.config, "monitor_config.check_for_global_norm"
    if config.use_skip_data_by_global_norm and config.monitor_config.check_for_global_norm:
        yield check.wrong(
            key,
            "not supported with use_skip_data_by_global_norm, which skips such steps",
            advice="Set one of them to False",
            also=("use_skip_data_by_global_norm",),
        )


def optimizer_numbers(check: Check) -> Iterator[KeyProblem]:
    """Betas and momentum are in [0, 1), there are as many numbers as an algorithm takes, and
    Nesterov momentum has what it needs."""
    optimizer = check.config.optimizer
    for name, usual in {"betas": [0.9, 0.999], "adamw_betas": [0.9, 0.95]}.items():
        betas = getattr(optimizer, name)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            rule = "must be two numbers in [0, 1)"
            yield check.wrong(f"optimizer.{name}", rule, nearest=f"Nearest: {usual}")
    if len(optimizer.ns_coefficients) != 3:
        near = "Nearest: [3.4445, -4.775, 2.0315]"
        yield check.wrong("optimizer.ns_coefficients", "must be three numbers", nearest=near)
    if optimizer.momentum is not None and optimizer.momentum >= 1:
        yield check.wrong("optimizer.momentum", "must be below 1", nearest="Nearest: 0.9")
    damped = not optimizer.momentum or optimizer.dampening
    if optimizer.type == "SGD" and optimizer.nesterov and damped:
        yield check.wrong(
            "optimizer.nesterov",
            "Nesterov momentum needs a momentum above 0 and a dampening of 0",
            nearest="Nearest: momentum: 0.9, dampening: 0",
            also=("optimizer.momentum", "optimizer.dampening"),
        )


def optimizer_arguments(check: Check) -> Iterator[KeyProblem]:
    """Every argument written belongs to the optimizer's type."""
    always = ("type", "weight_decay", "learning_rate", "state_dtype")
    taken = [*always, *OPTIMIZER_ARGUMENTS.get(check.config.optimizer.type, ())]
    yield from _unsuited(check, "optimizer", taken, OPTIMIZER_ARGUMENTS)


def schedule_arguments(check: Check) -> Iterator[KeyProblem]:
    """Every argument written belongs to the schedule's type."""
    kind = check.config.lr_schedule.type
    taken = [*_ALWAYS_TAKEN, *SCHEDULE_ARGUMENTS.get(kind, ())]
    if kind in SCHEDULES_WITHOUT_WARMUP:
        taken = [name for name in taken if name not in WARMUP_ARGUMENTS]
    yield from _unsuited(check, "lr_schedule", taken, SCHEDULE_ARGUMENTS)


def _unsuited(
    check: Check, section: str, taken: Sequence[str], arguments: Mapping[str, Sequence[str]]
) -> Iterator[KeyProblem]:
    """The keys written in `section` that its type does not take, unless they have the default
    value, as in a configuration that was printed. `arguments`: type to its own."""
    kind, defaults = check.value(f"{section}.type"), type(check.value(section))()
    for name in defaults.__dataclass_fields__:
        key = f"{section}.{name}"
        if name in taken or check.value(key) in (None, getattr(defaults, name)):
            continue
        owners = [other for other, names in arguments.items() if name in names]
        yield check.wrong(
            key,
            f"not an argument of {kind}",
            nearest=f"It belongs to {', '.join(owners)}" if owners else "",
            advice=f"{kind} takes {', '.join(taken[1:])}",
            also=(f"{section}.type",),
        )


def schedule_numbers(check: Check) -> Iterator[KeyProblem]:
    """The numbers of the schedule fit together."""
    schedule = check.config.lr_schedule
    base = schedule.learning_rate or check.config.optimizer.learning_rate or 5e-5
    end = 1e-7 if schedule.lr_end is None else schedule.lr_end
    rate = ("lr_schedule.learning_rate", "optimizer.learning_rate", "lr_schedule.type")
    if schedule.type == "PolynomialWithWarmUpLR" and end >= base:
        yield check.wrong(
            "lr_schedule.lr_end",
            f"must be below the learning rate ({base:g}) for {schedule.type}",
            what=f"lr_schedule.lr_end = {end:g}",
            advice="Lower lr_end or raise learning_rate",
            also=rate,
        )
    total, warmup = schedule.total_steps, schedule.warmup_steps
    by_ratio = schedule.warmup_ratio is not None or schedule.warmup_epochs is not None
    if total and total > 0 and warmup and warmup >= total and not by_ratio:
        yield check.wrong(
            "lr_schedule.warmup_steps",
            f"must be below total_steps ({total})",
            nearest=f"Nearest: {total - 1}",
            also=("lr_schedule.total_steps",),
        )
    if schedule.total_steps == 0:
        yield check.wrong(
            "lr_schedule.total_steps", "must be a number of steps, or -1 for the length of the run"
        )


def loss_scale(check: Check) -> Iterator[KeyProblem]:
    """A loss scale is a positive number, or a map of one of the known types."""
    written = check.value(_SCALE_SENSE)
    if isinstance(written, Mapping):
        yield from _scale_type(check, written)
    elif written is not None and not _is_number(written, above=0):
        yield check.wrong(_SCALE_SENSE, _POSITIVE, nearest="Nearest: 1.0")


def _scale_type(check: Check, written: Mapping[str, Any]) -> Iterator[KeyProblem]:
    kind = written.get("type")
    arguments = LOSS_SCALES.get(kind) if isinstance(kind, str) else None
    if arguments is None:
        yield check.wrong(
            f"{_SCALE_SENSE}.type" if "type" in written else _SCALE_SENSE,
            f"its type must be {' or '.join(LOSS_SCALES)}",
            nearest=did_you_mean(str(kind), LOSS_SCALES) or f"Nearest: {DYNAMIC_LOSS_SCALE}",
            advice="A fixed loss scale can also be written as a number",
        )
        return
    for name, value in written.items():
        if name == "type" or name in arguments:
            continue
        yield check.wrong(
            f"{_SCALE_SENSE}.{name}",
            f"not an argument of {kind}",
            what=f"{_SCALE_SENSE}.{name} = {value!r}",
            nearest=did_you_mean(str(name), arguments) or f"It takes {', '.join(arguments)}",
        )
    for name, default in arguments.items():
        yield from _scale_number(check, kind, name, written.get(name, default))


def _scale_number(check: Check, kind: Any, name: str, value: Any) -> Iterator[KeyProblem]:
    """One argument of a loss scale."""
    least = 1 if kind == DYNAMIC_LOSS_SCALE else 0
    rules: dict[str, tuple[bool, str, int]] = {
        "loss_scale_value": (
            _is_number(value, above=0) and value >= least,
            f"{_POSITIVE}, a dynamic one at least 1", 65536,
        ),
        "scale_factor": (
            _is_number(value, above=1), "must be a number above 1", 2,
        ),
        "scale_window": (
            _is_number(value, above=0) and value % 1 == 0,
            "must be an integer of at least 1", 1000,
        ),
    }  # fmt: skip
    is_right, rule, nearest = rules[name]
    if not is_right:
        key = f"{_SCALE_SENSE}.{name}"
        what = f"{key} is missing" if value is None else f"{key} = {value!r}"
        yield check.wrong(key, rule, what=what, nearest=f"Nearest: {nearest}")


def _is_number(value: Any, *, above: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and above < value <= LARGEST_LOSS_SCALE


def half_weights(check: Check) -> Iterator[KeyProblem]:
    """Trained weights have a dtype in which small updates of the optimizer do not underflow."""
    if not check.trains:
        return
    for name, value in check.config.model.model_config.items():
        dtype = DTYPES.get(str(value).removeprefix("torch."))
        if PRECISIONS.get(name) == "params_dtype" and dtype == "float16":
            yield check.wrong(
                f"model.model_config.{name}",
                "trained weights must be float32 or bfloat16: Adam's second moment underflows in "
                "float16",
                nearest="Nearest: float32",
                advice="Set compute_dtype to float16 to compute in float16",
                also=("model.model_config",),
            )


def evaluation_in_training(check: Check) -> Iterator[KeyProblem]:
    """do_eval has data and an interval."""
    config = check.config
    if not (check.trains and config.do_eval):
        return
    if not evaluation_datasets(config):
        yield check.wrong(
            "do_eval",
            "requires eval_dataset",
            advice="Add an eval_dataset section, or set do_eval to False",
            also=("eval_dataset", "eval_datasets"),
        )
    if config.eval_step_interval < 1 and config.eval_epoch_interval < 1:
        yield check.wrong(
            "do_eval",
            "eval_step_interval and eval_epoch_interval are both off",
            advice="Set eval_step_interval to a number of steps",
            also=("eval_step_interval", "eval_epoch_interval"),
        )


def trackers_installed(check: Check) -> Iterator[KeyProblem]:
    """A requested tracker can be imported."""
    names = list(check.config.trackers)
    key = "trackers"
    if check.config.tensorboard.tensorboard_dir and "tensorboard" not in names:
        names.append("tensorboard")
        key = "tensorboard.tensorboard_dir"
    if not check.trains:
        return
    for name in names:
        modules = _TRACKER_MODULES[name]
        if not any(importlib.util.find_spec(module) for module in modules):
            package = modules[0].replace("_", "-")
            yield check.wrong(
                key,
                f"the Python package of tracker {name} is not installed",
                advice=f"Install it: pip install {package}",
            )
