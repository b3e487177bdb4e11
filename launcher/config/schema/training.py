"""Sections about the training run itself: length, optimizer, learning rate, step, experts."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.field import effective, no_effect, not_built

_DENSE = "experts are described in model.model_config"


@dataclass(frozen=True, kw_only=True)
class RunnerSection:
    """`runner_config`: how long a run is and how large its steps are."""

    epochs: int = effective(1, minimum=1)
    """Passes over the training data; max_steps may end the run earlier."""
    batch_size: int = effective(1, minimum=1)
    """Samples of one micro step and one data-parallel rank."""
    sink_mode: bool = True
    """Run sink_size steps without a callback or a host synchronisation between them.
    On by default, as in the original; with sink_size 1 it changes nothing."""
    sink_size: int = 1
    """Optimizer steps of one sink; 1: no sinking; -1: the whole epoch."""
    gradient_accumulation_steps: int = effective(1, minimum=1)
    """Micro steps of one optimizer step."""
    max_steps: int | None = effective(None, minimum=1)
    """Length of the run in optimizer steps, which the learning rate is planned for; where epochs is
    written too, whichever ends first."""
    stop_step: int = effective(0, minimum=0)
    """Stop after this many optimizer steps of a longer run, whose learning rate is planned to its
    end: it can be resumed. 0: off."""
    num_classes: int = no_effect(1, "a language model has none")
    """Classes of a classifier."""


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
    use_fused_adamw: bool = no_effect(False, "AdamW is always fused")
    """Muon: a fused AdamW beside it."""
    learning_rate: float | None = effective(None, above=0)
    """Learning rate when lr_schedule gives none."""


OPTIMIZER_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "AdamW": ("betas", "eps"),
    "Adam": ("betas", "eps"),
    "SGD": ("momentum", "dampening", "nesterov"),
    "Muon": (
        *("momentum", "nesterov", "ns_steps", "ns_coefficients", "matched_adamw_rms"),
        *("adamw_betas", "adamw_eps", "use_fused_adamw"),
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


@dataclass(frozen=True, kw_only=True)
class GroupedLrScheduleSection:
    """`grouped_lr_schedule`: a curve for each group of parameters."""

    default: dict[str, Any] = not_built({}, "Use lr_schedule: one curve for all parameters")
    """The curve of parameters in no group."""
    grouped: list[Any] = not_built([], "Use lr_schedule: one curve for all parameters")
    """Groups, each with `params` patterns and a curve."""


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

    type: str = no_effect(
        "MFTrainOneStepCell",
        "there is one training step, whatever its name",
        choices=("MFTrainOneStepCell", "MFPipelineWithLossScaleCell"),
    )
    """The original's class of a training step."""
    use_clip_grad: bool = True
    """Clip the gradients by their global norm."""
    max_grad_norm: float = effective(1.0, above=0)
    """The norm gradients are clipped to."""
    scale_sense: float | dict[str, Any] | None = effective(None)
    """Loss scale: a number (fixed), or a map with `type`: FixedLossScaleUpdateCell and
    `loss_scale_value`, or DynamicLossScaleUpdateCell and, as far as not 65536, 2 and 1000,
    `loss_scale_value`, `scale_factor` and `scale_window`. A step whose gradients are not finite is
    skipped. Left out: dynamic with compute_dtype float16, else no scale and no skipping."""
    local_norm: bool = not_built(False, "Set it to False; the global norm is always reported")
    """Report the norm of every parameter's gradient."""
    calculate_per_token_loss: bool | None = not_built(
        None, "The loss is always the mean over the tokens: leave it out", harmless=(True,)
    )
    """Weigh by tokens, not by micro-batches; always so here."""


@dataclass(frozen=True, kw_only=True)
class MoeSection:
    """`moe_config`: mixture of experts of the original's older models.

    Here experts are described in model.model_config, by the keys of config.json.
    """

    expert_num: int = not_built(
        1,
        "Describe the experts in model.model_config, by the keys of config.json: leave it out",
        minimum=1,
    )
    """Experts of a layer; 1: a dense model."""
    capacity_factor: float = no_effect(1.1, _DENSE)
    """Room of an expert, relative to an even share."""
    aux_loss_factor: float = no_effect(0.05, _DENSE)
    """Weight of the balancing loss."""
    num_experts_chosen: int = no_effect(1, _DENSE)
    """Experts a token visits."""
    expert_group_size: int | None = no_effect(None, _DENSE)
    """Tokens of one routing group."""
    group_wise_a2a: bool = no_effect(False, _DENSE)
    """All-to-all inside a group."""
    comp_comm_parallel: bool = no_effect(False, _DENSE)
    """Overlap experts and communication."""
    comp_comm_parallel_degree: int = no_effect(2, _DENSE)
    """Pieces of that overlap."""
    save_token_distribution: bool = no_effect(False, _DENSE)
    """Write how tokens spread over experts."""
    cur_layer: int = no_effect(0, _DENSE)
    """The layer that is written."""
    enable_cold_hot_expert: bool = no_effect(False, _DENSE)
    """Move popular experts."""
    update_step: int = no_effect(10000, _DENSE)
    """Steps between such moves."""
    hot_expert_num: int = no_effect(0, _DENSE)
    """Popular experts held everywhere."""
    cold_token_percent: float = no_effect(1.0, _DENSE)
    """Share of tokens for unpopular experts."""
    moe_module_name: str = no_effect("", _DENSE)
    """Where the layers are found."""
    routing_policy: str = no_effect("TopkRouterV1", _DENSE)
    """The router."""
    norm_topk_prob: bool = no_effect(True, _DENSE)
    """Normalise the chosen weights."""
    enable_sdrop: bool = no_effect(False, _DENSE)
    """Drop tokens by position."""
    use_fused_ops_topkrouter: bool = no_effect(False, _DENSE)
    """Fused routing kernels."""
    router_dense_type: str = no_effect("float32", _DENSE)
    """Dtype of the router."""
    shared_expert_num: int = no_effect(0, _DENSE)
    """Experts every token visits."""
    use_shared_expert_gating: bool = no_effect(False, _DENSE)
    """Gate the shared expert."""
    max_router_load: int = no_effect(128 * 1024, _DENSE)
    """Tokens a router takes at most."""
    topk_method: str = no_effect("greedy", _DENSE)
    """How experts are chosen."""
    topk_group: int | None = no_effect(None, _DENSE)
    """Groups chosen."""
    n_group: int | None = no_effect(None, _DENSE)
    """Groups of experts."""
    first_k_dense_replace: bool | int = no_effect(True, _DENSE)
    """First layers that stay dense."""
    moe_intermediate_size: int = no_effect(1407, _DENSE)
    """Width of an expert."""
    routed_scaling_factor: float = no_effect(1.0, _DENSE)
    """Weight of the routed experts."""
    aux_loss_types: list[Any] | None = no_effect(None, _DENSE)
    """Kinds of balancing loss."""
    aux_loss_factors: list[Any] | None = no_effect(None, _DENSE)
    """Their weights."""
    z_loss_factor: float = no_effect(0.0, _DENSE)
    """Weight of the z loss."""
    balance_via_topk_bias: bool = no_effect(False, _DENSE)
    """Balance by a bias instead of a loss."""
    topk_bias_update_rate: float = no_effect(0.0, _DENSE)
    """Speed of that bias."""
    use_allgather_dispatcher: bool = no_effect(False, _DENSE)
    """Dispatch tokens by all-gather."""
    expert_model_parallel: int | None = no_effect(None, _DENSE)
    """Tensor parallel inside an expert."""
    use_gating_sigmoid: bool = no_effect(False, _DENSE)
    """Sigmoid instead of softmax."""
    use_gmm: bool = no_effect(False, _DENSE)
    """Grouped matrix products."""
    enable_gmm_safe_tokens: bool = no_effect(False, _DENSE)
    """Pad empty groups."""
    use_fused_ops_permute: bool = no_effect(False, _DENSE)
    """Fused permutation kernels."""
    callback_moe_droprate: bool = no_effect(False, _DENSE)
    """Report dropped tokens."""
    moe_init_method_std: float = no_effect(0.01, _DENSE)
    """Initial spread of expert weights."""
    enable_deredundency: bool = no_effect(False, _DENSE)
    """The original's spelling of de-duplicated dispatch."""
    npu_nums_per_device: int = no_effect(8, _DENSE)
    """Devices of a node."""


@dataclass(frozen=True, kw_only=True)
class MetricSection:
    """`metric`: what evaluation measures."""

    type: str | list[str] = no_effect("PerplexityMetric", "eval reports loss and perplexity")
    """The original's class of a metric."""
