"""Training on preferences, as the configuration describes it: the loss, and its reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch.distributed as dist
from torch import nn

from launcher.builders.job import Job
from launcher.config.schema import WITH_REFERENCE, Config
from launcher.train.loss import Loss
from launcher.train.preference import (
    SIMPO_BETA,
    USUAL_BETA,
    PreferenceLoss,
    PreferenceSettings,
)
from launcher.train.preference_task import PreferenceTask
from models.lora import adapters_off


def preference_settings(config: Config) -> PreferenceSettings | None:
    """The loss on preferences with its numbers; None: the run is on the next token."""
    section, loss = config.preference, config.preference_loss
    if loss is None:
        return None
    usual_beta = SIMPO_BETA if loss == "simpo" else USUAL_BETA
    usual_weight = 1.0 if loss in ("orpo", "cpo") else 0.0
    return PreferenceSettings(
        loss=loss,
        beta=usual_beta if section.beta is None else section.beta,
        label_smoothing=section.label_smoothing,
        simpo_gamma=section.simpo_gamma,
        sft_weight=usual_weight if section.sft_weight is None else section.sft_weight,
        desirable_weight=section.desirable_weight,
        undesirable_weight=section.undesirable_weight,
    )


def preference_loss(job: Job, token_loss: Loss) -> PreferenceLoss | None:
    """The loss on preferences of a job, of this rank's logits; None: there is none."""
    settings = preference_settings(job.config)
    if settings is None:
        return None
    return PreferenceLoss(settings, token_loss, _context_groups(job))


def _context_groups(job: Job) -> tuple[dist.ProcessGroup, ...]:
    if job.mesh.cp == 1:
        return ()
    groups = (job.meshes.context_group(axis) for axis in ("ulysses", "ring"))
    return tuple(group for group in groups if group is not None)


def preference_task(job: Job, modules: Sequence[nn.Module]) -> PreferenceTask | None:
    """What a step on preferences needs beside its loss; None: there is none. `modules`: the parts
    of the model on this rank."""
    settings = preference_settings(job.config)
    if settings is None:
        return None
    lora, needs_reference = job.spec.lora, settings.loss in WITH_REFERENCE
    # Modules that are trained in full below an adapter leave the base with the first step.
    keeps_base = lora is not None and not lora.modules_to_save
    is_other = bool(job.config.preference.reference.weights)
    at = job.mesh.coordinates(job.world.rank)
    return PreferenceTask(
        settings,
        needs_reference=needs_reference,
        counts=at["tp"] == 0 and at["cp"] == 0,
        scores_before=needs_reference and (is_other or not keeps_base),
        without_adapters=nullcontext if lora is None else partial(_adapters_off, modules),
    )


@contextmanager
def _adapters_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(adapters_off(module))
        yield
