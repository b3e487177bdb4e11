"""Sections about the training run itself: length, optimizer, learning rate, step, experts."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.field import effective


@dataclass(frozen=True, kw_only=True)
class RunnerSection:
    """`runner_config`: how long a run is and how large its steps are."""

    epochs: int = effective(1, minimum=1)
    """Passes over the training data; max_steps may end the run earlier."""
    batch_size: int = effective(1, minimum=1)
    """Samples of one micro step and one data-parallel rank."""
    sink_mode: bool = True
    """Run sink_size steps without a callback or a host synchronisation between them.
    On by default, as in MindFormers; with sink_size 1 it changes nothing."""
    sink_size: int = 1
    """Optimizer steps of one sink; 1: no sinking; -1: an epoch."""
    gradient_accumulation_steps: int = effective(1, minimum=1)
    """Micro steps of one optimizer step."""
    max_steps: int | None = effective(None, minimum=1)
    """Length of the run in optimizer steps, which the learning rate is planned for; where epochs is
    written too, whichever ends first."""
    stop_step: int = effective(0, minimum=0)
    """Stop after this many optimizer steps of a longer run, whose learning rate is planned to its
    end: it can be resumed. 0: off."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """`optimizer`."""

    type: str = effective(
        "AdamW",
        choices=("AdamW", "Adam", "SGD", "Muon"),
        planned=(
            *("FusedAdamW", "PmaAdamW", "FusedPmaAdamW", "Came"),
            *("FP32StateAdamWeightDecay", "FusedCastAdamWeightDecay", "AdamWeightDecay"),
            *("Momentum", "Lamb", "Adafactor", "AdaFactor"),
        ),
    )
    """The algorithm. Muon updates the weight matrices of the layers, with AdamW for embeddings, the
    output head, norms and biases."""
    betas: list[float] = effective([0.9, 0.999])
    """AdamW, Adam: decay of the two running averages, each in [0, 1)."""
    eps: float = effective(1e-8, above=0)
    """AdamW, Adam: added to the denominator."""
    weight_decay: float = effective(0.0, minimum=0)
    """Weight decay, never applied to biases and norm weights: decoupled in AdamW and Muon, added to
    the gradient in Adam and SGD."""
    momentum: float | None = effective(None, minimum=0)
    """SGD, Muon: decay of the running average of gradients. Left out: 0 for SGD, 0.95 for Muon."""
    dampening: float = effective(0.0, minimum=0, maximum=1)
    """SGD: how much less than 1 a gradient weighs in the momentum."""
    nesterov: bool | None = effective(None)
    """SGD, Muon: Nesterov momentum. Left out: False for SGD, True for Muon."""
    ns_steps: int = effective(5, minimum=1, maximum=99)
    """Muon: Newton-Schulz iterations that orthogonalise a matrix."""
    ns_coefficients: list[float] = effective([3.4445, -4.775, 2.0315])
    """Muon: the three coefficients of an iteration."""
    matched_adamw_rms: float = effective(0.2, above=0)
    """Muon: root mean square of an update before the learning rate; 0.2 is about that of AdamW."""
    adamw_betas: list[float] = effective([0.9, 0.95])
    """Muon: `betas` of the AdamW beside it."""
    adamw_eps: float = effective(1e-8, above=0)
    """Muon: `eps` of the AdamW beside it."""
    state_dtype: str | None = effective(
        None, choices=("float32", "bfloat16"),
        words={"bf16": "bfloat16", "fp32": "float32", "float": "float32"},
    )  # fmt: skip
    """Dtype of the moments. bfloat16 halves their memory: the arithmetic stays float32, what is
    stored is rounded stochastically, the same in each repetition. Left out: that of the weights."""
    learning_rate: float | None = effective(None, above=0)
    """Learning rate when lr_schedule gives none."""


OPTIMIZER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "AdamW": ("betas", "eps"),
    "Adam": ("betas", "eps"),
    "SGD": ("momentum", "dampening", "nesterov"),
    "Muon": (
        *("momentum", "nesterov", "ns_steps", "ns_coefficients", "matched_adamw_rms"),
        *("adamw_betas", "adamw_eps"),
    ),
}
"""The arguments each optimizer takes beside `type`, `weight_decay` and `learning_rate`."""


SCHEDULE_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "ConstantWarmUpLR": (),
    "LinearWithWarmUpLR": (),
    "CosineWithWarmUpLR": ("num_cycles", "lr_end", "decay_steps", "decay_ratio"),
    "CosineWithRestartsAndWarmUpLR": ("num_cycles", "lr_end", "decay_steps", "decay_ratio"),
    "PolynomialWithWarmUpLR": ("power", "lr_end", "decay_steps", "decay_ratio"),
    "CosineAnnealingLR": ("t_max", "eta_min"),
    "CosineAnnealingWarmRestarts": ("t_0", "t_mult", "eta_min"),
    "WarmUpStableDecayLR": ("lr_end", "decay_start_steps", "decay_start_ratio"),
    "ConstantWithCoolDownLR": (
        *("keep_steps", "decay_steps", "decay_ratio", "num_cycles"),
        *("lr_end1", "final_steps", "lr_end2"),
    ),
}
"""The arguments each schedule takes beside the common ones."""

WARMUP_ARGUMENTS = ("warmup_steps", "warmup_ratio", "warmup_epochs", "warmup_lr_init")
SCHEDULES_WITHOUT_WARMUP = ("CosineAnnealingLR", "CosineAnnealingWarmRestarts")


@dataclass(frozen=True, kw_only=True)
class LrScheduleSection:
    """`lr_schedule`: the learning rate as a function of the step.

    An argument left out (None) takes the default of the schedule's type; see SCHEDULE_ARGUMENTS.
    """

    type: str = effective(
        "CosineWithWarmUpLR",
        choices=tuple(SCHEDULE_ARGUMENTS),
        planned=("LearningRateWiseLayer",),
    )
    """The shape of the curve."""
    learning_rate: float | None = effective(None, above=0)
    """The highest learning rate. Left out: optimizer.learning_rate, else 5e-5."""
    lr_end: float | None = effective(None, minimum=0)
    """Learning rate at the end of the decay. Left out: 0, but 1e-7 for the polynomial and
    warm-up-stable-decay curves."""
    warmup_steps: int | None = effective(None, minimum=0)
    """Steps of linear warm-up. Left out: 0."""
    warmup_ratio: float | None = effective(None, minimum=0, maximum=1)
    """Warm-up as a share of all steps; wins over warmup_steps and warmup_epochs."""
    warmup_epochs: float | None = effective(None, minimum=0)
    """Warm-up in epochs; wins over warmup_steps."""
    warmup_lr_init: float = effective(0.0, minimum=0)
    """Learning rate at the first step of the warm-up."""
    total_steps: int | None = effective(None, minimum=-1)
    """Length of the curve in steps. Left out or -1: the length of the run."""
    num_cycles: float | None = effective(None, above=0)
    """Cosine waves. Left out: 0.5 (half a wave), but 1 for the curve with restarts."""
    decay_steps: int | None = effective(None, minimum=1)
    """Steps of the decay after the warm-up. Left out: all the rest."""
    decay_ratio: float | None = effective(None, minimum=0, maximum=1)
    """The decay as a share of all steps; wins over decay_steps."""
    power: float | None = effective(None, above=0)
    """Exponent of the polynomial. Left out: 1."""
    t_max: int | None = effective(None, minimum=1)
    """Steps of half a wave of CosineAnnealingLR. Left out: the length of the run."""
    t_0: int | None = effective(None, minimum=1)
    """Steps of the first period of CosineAnnealingWarmRestarts. Left out: the length of the run."""
    t_mult: int | None = effective(None, minimum=1)
    """Growth of the period at each restart. Left out: 1."""
    eta_min: float | None = effective(None, minimum=0)
    """Lowest learning rate of the annealing curves. Left out: 0."""
    decay_start_steps: int | None = effective(None, minimum=0)
    """Step at which WarmUpStableDecayLR begins to decay. Left out: decay_start_ratio decides."""
    decay_start_ratio: float | None = effective(None, minimum=0, maximum=1)
    """The same as a share of all steps; wins over decay_start_steps. Left out: 0.9."""
    keep_steps: int | None = effective(None, minimum=0)
    """Steps ConstantWithCoolDownLR stays at the top after the warm-up. Left out: 0."""
    lr_end1: float | None = effective(None, minimum=0)
    """Learning rate after the decay of ConstantWithCoolDownLR. Left out: 0."""
    final_steps: int | None = effective(None, minimum=0)
    """Steps at lr_end1 before ConstantWithCoolDownLR goes to lr_end2. Left out: 0."""
    lr_end2: float | None = effective(None, minimum=0)
    """Last learning rate of ConstantWithCoolDownLR. Left out: lr_end1."""


DYNAMIC_LOSS_SCALE, FIXED_LOSS_SCALE = "DynamicLossScaleUpdateCell", "FixedLossScaleUpdateCell"
LOSS_SCALES: dict[str, dict[str, float | None]] = {
    DYNAMIC_LOSS_SCALE: {"loss_scale_value": 65536.0, "scale_factor": 2.0, "scale_window": 1000},
    FIXED_LOSS_SCALE: {"loss_scale_value": None},
}
"""The arguments each type of `scale_sense` takes, with their defaults; None: it must be written."""
LARGEST_LOSS_SCALE = 2.0**64
"""With it a scaled loss is still far inside float32."""


@dataclass(frozen=True, kw_only=True)
class RunnerWrapperSection:
    """`runner_wrapper`: what happens between gradients and the optimizer."""

    use_clip_grad: bool = True
    """Clip the gradients by their global norm."""
    max_grad_norm: float = effective(1.0, above=0)
    """The norm gradients are clipped to."""
    scale_sense: float | dict[str, Any] | None = effective(None)
    """Loss scale: a number (fixed), or a map with `type`: FixedLossScaleUpdateCell and
    `loss_scale_value`, or DynamicLossScaleUpdateCell and, as far as not 65536, 2 and 1000,
    `loss_scale_value`, `scale_factor` and `scale_window`. A step whose gradients are not finite is
    skipped. Left out: dynamic with compute_dtype float16, else no scale and no skipping."""
