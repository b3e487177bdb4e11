"""Callbacks of a job: one table by type, and classes of the user's own.

A user's classes come only from the files that `register_path` names, and only by class name.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.builders.job import Job
from launcher.checkpoint.monitor import LAST_STEP_ONLY, CheckpointMonitor
from launcher.config.schema import (
    EarlyStoppingSection,
    OnRequestExitSection,
    RegisteredCallbackSection,
)
from launcher.errors import UserError, did_you_mean
from launcher.train.callbacks import Callback, Callbacks, EarlyStopping, LossMonitor, RequestFile
from launcher.train.health import FiniteCheck, LimitCheck, limits_of


def _loss_monitor(job: Job) -> Callback:
    return LossMonitor(job.config.loss_monitor.per_print_times)


def _checkpoint_monitor(job: Job) -> Callback:
    config = job.config
    section = config.checkpoint_monitor or (LAST_STEP_ONLY if config.final_checkpoint else None)
    if section is None:
        job.log("warning: nothing will be saved: there is no CheckpointMonitor, and "
                "final_checkpoint is False")  # fmt: skip
        return Callback()
    return CheckpointMonitor(section)  # type: ignore[return-value]  # it has the same methods


def _request_file(job: Job) -> Callback:
    section = job.config.last_callback(OnRequestExitSection)
    return RequestFile(section.config_file) if section and section.config_file else Callback()


def _early_stopping(job: Job) -> Callback:
    section = job.config.last_callback(EarlyStoppingSection)
    return EarlyStopping(section) if section else Callback()


CALLBACKS: dict[str, Callable[[Job], Callback]] = {
    "MFLossMonitor": _loss_monitor,
    "CheckpointMonitor": _checkpoint_monitor,
    "OnRequestExit": _request_file,
    "EarlyStopping": _early_stopping,
}
"""`type` of an entry of `callbacks` to what builds it: the last entry counts, or the default.
EvalCallBack has no entry: the loop evaluates itself."""


def build_callbacks(job: Job) -> Callbacks:
    """The callbacks of the configuration, those of the user too."""
    config = job.config
    built = {kind: build(job) for kind, build in CALLBACKS.items()}
    checks: list[Callback] = [FiniteCheck(stop=config.check_for_nan_in_loss_and_grad)]
    if (limits := limits_of(config)) is not None:
        most = config.monitor_config.global_norm_spike_count_threshold
        checks.append(LimitCheck(limits, most))
    return Callbacks(
        reports=[built["MFLossMonitor"]],
        checks=[*checks, built["EarlyStopping"]],
        saving=built["CheckpointMonitor"],
        others=[built["OnRequestExit"], *_registered(job)],
    )


def _registered(job: Job) -> Iterator[Callback]:
    config = job.config
    entries = {
        f"callbacks.{index}.type": entry
        for index, entry in enumerate(config.callbacks)
        if isinstance(entry, RegisteredCallbackSection)
    }
    if not config.register_path:
        return
    if not entries:
        # A folder of MindFormers' own code is often named, which cannot be imported here.
        job.log(f"register_path: nothing of {config.register_path} is in callbacks: not imported")
        return
    registered = load_registered(config.register_path)
    for key, entry in entries.items():
        yield build_registered(entry, registered, job.provenance.nearest(key))


def load_registered(path: str) -> dict[str, type[Callback]]:
    """The `Callback` subclasses in the file `path`, or in the files of that folder, by name."""
    root = Path(path)
    files = sorted(root.glob("*.py")) if root.is_dir() else [root]
    found: dict[str, type[Callback]] = {}
    for file in files:
        name = f"slipway_registered_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise UserError(f"register_path: {file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(
                f"register_path: importing {file} failed: {type(error).__name__}: {error}",
                where=_place(error, file),
            ) from error
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, Callback) and value.__module__ == name:
                found[value.__name__] = value
    return found


def _place(error: BaseException, file: Path) -> str:
    """file:line in `file` where an error was raised, if its traceback shows it."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f"{file}:{lines[-1]}" if lines else str(file)


def build_registered(
    entry: RegisteredCallbackSection, registered: Mapping[str, type[Callback]], where: str
) -> Callback:
    """The registered callback that an entry of `callbacks` names, with its arguments checked."""
    kind = registered.get(entry.type)
    if kind is None:
        raise UserError(
            f"callbacks: unknown type {entry.type!r}",
            where=where,
            rule=f"register_path defines {', '.join(sorted(registered)) or 'no callback'}",
            nearest=did_you_mean(entry.type, registered),
        )
    parameters = list(inspect.signature(kind).parameters)
    try:
        inspect.signature(kind).bind(**entry.arguments)
    except TypeError as error:
        unknown = next((key for key in entry.arguments if key not in parameters), "")
        raise UserError(
            f"{entry.type}: {error}",
            where=where,
            rule=f"it takes {', '.join(parameters) or 'no argument'}",
            nearest=did_you_mean(unknown, parameters),
        ) from error
    try:
        return kind(**entry.arguments)
    except Exception as error:
        raise UserError(
            f"{entry.type}({_shown(entry.arguments)}) failed: {type(error).__name__}: {error}",
            where=where,
        ) from error


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
