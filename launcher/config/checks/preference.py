"""Rules about training on preferences: the loss, its arguments, and the data that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.checks.paths import nearest_path
from launcher.config.derived import used_datasets
from launcher.config.provenance import KeyProblem
from launcher.config.schema import (
    JUDGED,
    PAIRS,
    PREFERENCE_ARGUMENTS,
    PREFERENCE_TRAINERS,
    WITH_REFERENCE,
    DataLoaderSection,
    PreferenceSection,
)

_KEYS = ("loss", "beta", *PREFERENCE_ARGUMENTS)


def trainer(check: Check) -> Iterator[KeyProblem]:
    """The section belongs to trainers of preferences, and its loss to the trainer."""
    kind, loss = check.config.trainer.type, check.config.preference.loss
    losses = PREFERENCE_TRAINERS.get(kind)
    if losses is None:
        usual = PreferenceSection()  # a printed configuration writes every key
        written = [
            key for key in _KEYS
            if _is_written(check, f"preference.{key}")
            and getattr(check.config.preference, key) != getattr(usual, key)
        ]  # fmt: skip
        if written:
            key = f"preference.{written[0]}"
            yield check.wrong(
                key, f"it is used with trainer.type {', '.join(PREFERENCE_TRAINERS)}",
                what=f"{key} is set, and trainer.type is {kind}",
                nearest="Nearest: trainer.type: DPOTrainer", also=("trainer.type",),
                advice="Set trainer.type, or remove the section",
            )  # fmt: skip
    elif loss is not None and loss not in losses:
        yield check.wrong(
            "preference.loss", f"{kind} has the loss {' or '.join(losses)}",
            nearest=f"Nearest: trainer.type: {_trainer_of(loss)}", also=("trainer.type",),
            advice="Remove preference.loss, or set the trainer of this loss",
        )  # fmt: skip


def _trainer_of(loss: str) -> str:
    """The trainer whose usual loss this is, else DPOTrainer, which has all of them."""
    found = (kind for kind, losses in PREFERENCE_TRAINERS.items() if losses[0] == loss)
    return next(found, "DPOTrainer")


def arguments(check: Check) -> Iterator[KeyProblem]:
    """An argument that the loss does not use would have no effect."""
    loss = check.config.preference_loss
    if loss is None:
        return
    for name, losses in PREFERENCE_ARGUMENTS.items():
        key = f"preference.{name}"
        if loss not in losses and _is_written(check, key):
            yield check.wrong(
                key, f"the loss {loss} does not use it; {', '.join(losses)} does",
                what=f"{key} is set" if name == "reference" else "", advice="Remove it",
                nearest=f"Nearest: {', '.join(_arguments_of(loss))}",
                also=("preference.loss", "trainer.type"),
            )  # fmt: skip


def _arguments_of(loss: str) -> list[str]:
    """The keys of `preference` that a loss uses."""
    used = (name for name, losses in PREFERENCE_ARGUMENTS.items() if loss in losses)
    return [f"preference.{name}" for name in ("beta", *used)]


def _is_written(check: Check, key: str) -> bool:
    places = check.provenance.places
    return any(place == key or place.startswith(f"{key}.") for place in places)


def reference(check: Check) -> Iterator[KeyProblem]:
    """Its weights exist. An evaluation by itself has no start of training to compare with."""
    config = check.config
    weights = config.preference.reference.weights
    if weights and not Path(weights).exists():
        yield check.wrong(
            "preference.reference.weights", "no such file or directory",
            nearest=nearest_path(weights), advice="Give a local file or directory of weights",
        )  # fmt: skip
    if (
        check.mode == "eval"
        and config.preference_loss in WITH_REFERENCE
        and not weights
        and not (config.load_checkpoint and config.pretrained_model_dir)
    ):
        yield check.wrong(
            "preference.reference.weights",
            f"the loss {config.preference_loss} compares the model with a reference",
            what="preference.reference.weights is missing", also=("preference.loss",),
            advice="Name the weights that training started from, there or as pretrained_model_dir "
            "beside load_checkpoint",
        )  # fmt: skip


def loaders(check: Check) -> Iterator[KeyProblem]:
    """The loss decides the kind of data: pairs, judged answers, or text."""
    if check.config.only_save_strategy:
        return
    loss = check.config.preference_loss
    for name, section in used_datasets(check.config).items():
        for key, loader in section.loaders.items():
            yield from _loader(check, f"{name}.{key}", loader, loss)


def _loader(
    check: Check, prefix: str, loader: DataLoaderSection, loss: str | None
) -> Iterator[KeyProblem]:
    needed = None if loss is None else JUDGED if loss == "kto" else PAIRS
    is_of_preferences = loader.type in (PAIRS, JUDGED)
    if needed is not None and loader.type != needed:
        yield check.wrong(
            f"{prefix}.type", f"the loss {loss} is computed on records of {needed}",
            nearest=f"Nearest: {needed}", also=("trainer.type", "preference.loss"),
            advice=f"Set {prefix}.type: {needed}, or another loss",
        )  # fmt: skip
    elif needed is None and is_of_preferences:
        nearest = "DPOTrainer" if loader.type == PAIRS else "KTOTrainer"
        yield check.wrong(
            f"{prefix}.type",
            f"it is read by trainers of preferences, and trainer.type is "
            f"{check.config.trainer.type}",
            nearest=f"Nearest: trainer.type: {nearest}", also=("trainer.type",),
            advice="Set trainer.type, or read the chosen answers alone: InstructionDataLoader with "
            "column_map",
        )  # fmt: skip
    if loader.format == "text" and not is_of_preferences:
        yield check.wrong(
            f"{prefix}.format", f"it is a form of {PAIRS} and {JUDGED}",
            nearest="Nearest: alpaca, messages, sharegpt", advice="Plain text is read by "
            "HFDataLoader", also=(f"{prefix}.type",),
        )  # fmt: skip


def packing(check: Check) -> Iterator[KeyProblem]:
    """A sample of preferences is two rows by itself."""
    if check.config.preference_loss is None:
        return
    for name, section in used_datasets(check.config).items():
        if section.packing:
            yield check.wrong(
                f"{name}.packing", "with preferences a sample is two padded rows, chosen and "
                "rejected, which stay together", nearest="Nearest: False",
                advice=f"Remove {name}.packing", also=("trainer.type",),
            )  # fmt: skip
