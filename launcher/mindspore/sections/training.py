"""Optimizer, schedule, training step and callbacks of a MindFormers configuration.

Owns their second names and forms. What only a training run uses has no effect in another mode.
"""

from __future__ import annotations

from launcher.config.draft import Draft
from launcher.config.schema import OPTIMIZER_ARGUMENTS, SCHEDULE_ARGUMENTS
from launcher.mindspore.keys_not_built import CALLBACKS_NOT_BUILT
from launcher.mindspore.sections.values import (
    is_of_mindformers,
    is_on,
    mode,
    names,
    trains,
    word,
    written,
)

_OPTIMIZERS = {"FP32StateAdamWeightDecay": "AdamW"}
"""MindFormers' optimizers that are known here under another name: their state is float32, as it
always is here."""

_SCHEDULES = {
    "polynomial": "PolynomialWithWarmUpLR",
    "linear": "LinearWithWarmUpLR",
    "cosine": "CosineWithWarmUpLR",
    "cosine_with_restarts": "CosineWithRestartsAndWarmUpLR",
    "constant_with_warmup": "ConstantWarmUpLR",
    "constant": "ConstantWarmUpLR",
}
"""Names of schedules from before they had classes."""

_FIXED, _DYNAMIC = "FixedLossScaleUpdateCell", "DynamicLossScaleUpdateCell"
_DYNAMIC_ARGUMENTS = {"type", "loss_scale_value", "scale_factor", "scale_window"}
_SCALE = "runner_wrapper.scale_sense"
_METRICS = ("PerplexityMetric",)


def translate(draft: Draft) -> None:
    """Translate these sections."""
    if mode(draft) == "predict":
        _unused(draft)
    if trains(draft) and is_of_mindformers(draft):
        _weights(draft)
    _optimizer(draft)
    _schedule(draft)
    _loss_scale(draft)
    _callbacks(draft)
    _metric(draft)


def _unused(draft: Draft) -> None:
    """What predict does not use is dropped where it is not known here."""
    for section, known in (("optimizer", OPTIMIZER_ARGUMENTS), ("lr_schedule", SCHEDULE_ARGUMENTS)):
        kind = word(draft, f"{section}.type")
        if kind and kind not in known:
            draft.drop(section, "predict does not train")
    draft.drop("grouped_lr_schedule", "predict does not train")


def _weights(draft: Draft) -> None:
    """Trained weights of float16 are float32 here, in which small updates do not vanish."""
    for name in ("param_init_type", "params_dtype"):
        key = f"model.model_config.{name}"
        if written(draft, key) in ("float16", "fp16"):
            draft.replace(key, {key: "float32"}, "float16 weights lose small updates")


def _optimizer(draft: Draft) -> None:
    kind = word(draft, "optimizer.type")
    if kind in _OPTIMIZERS:
        why = "the state of AdamW is always float32"
        draft.replace("optimizer.type", {"optimizer.type": _OPTIMIZERS[kind]}, why)
    _betas(draft)
    if is_on(draft, "optimizer.swap"):
        why = "the state is kept in host memory"
        draft.replace("optimizer.swap", {"swap_config.optimizer": True}, why)
    else:
        draft.drop("optimizer.swap", "it is off")


def _betas(draft: Draft) -> None:
    """`beta1` and `beta2` are the two `betas`."""
    given = [written(draft, f"optimizer.{name}") for name in ("beta1", "beta2")]
    if given == [None, None]:
        draft.drop_all(("optimizer.beta1", "optimizer.beta2"), "it is null")
        return
    usual = (0.9, 0.999)
    betas = [new if old is None else old for old, new in zip(given, usual, strict=True)]
    first = "beta1" if given[0] is not None else "beta2"
    draft.replace(f"optimizer.{first}", {"optimizer.betas": betas}, "beta1 and beta2")
    if draft.find("optimizer.beta2") is not None:
        draft.replace("optimizer.beta2", {"optimizer.betas": betas}, "beta1 and beta2")
    draft.drop("optimizer.beta1", "it is null")


def _schedule(draft: Draft) -> None:
    kind = word(draft, "lr_schedule.type")
    if kind in _SCHEDULES:
        draft.replace("lr_schedule.type", {"lr_schedule.type": _SCHEDULES[kind]})
    if _SCHEDULES.get(kind, kind) == "ConstantWarmUpLR":
        draft.drop("lr_schedule.lr_end", "a constant learning rate has no other end")


def _loss_scale(draft: Draft) -> None:
    """A dynamic loss scale that is multiplied by 1 is a fixed one."""
    scale = written(draft, _SCALE)
    if not isinstance(scale, dict):
        return
    factor, value = scale.get("scale_factor"), scale.get("loss_scale_value", 65536)
    is_never_changed = type(factor) in (int, float) and factor == 1
    is_right = type(value) in (int, float) and value >= 1 and set(scale) <= _DYNAMIC_ARGUMENTS
    if scale.get("type") == _DYNAMIC and is_never_changed and is_right:
        fixed = {"type": _FIXED, "loss_scale_value": value}
        draft.replace(_SCALE, {_SCALE: fixed}, "scale_factor 1 never changes the scale")


def _callbacks(draft: Draft) -> None:
    """Callbacks that only training has are dropped in another mode."""
    node = draft.find("callbacks")
    if node is None or not isinstance(node.value, list) or trains(draft) or not mode(draft):
        return
    for index in reversed(range(len(node.value))):
        kind = word(draft, f"callbacks.{index}.type")
        if kind in CALLBACKS_NOT_BUILT:
            draft.drop(f"callbacks.{index}", f"{kind} is for training")


def _metric(draft: Draft) -> None:
    """Evaluation reports loss and perplexity; another metric matters where something evaluates."""
    if "type" not in names(draft, "metric"):
        return
    found = written(draft, "metric.type")
    kinds = found if isinstance(found, list) else [found]
    unknown = [kind for kind in kinds if kind and kind not in _METRICS]
    evaluates = mode(draft) == "eval" or (trains(draft) and is_on(draft, "do_eval"))
    if unknown and evaluates:
        draft.refuse(
            "metric.type", "not built yet", nearest=f"Nearest: {_METRICS[0]}",
            advice="Evaluation reports loss and perplexity",
        )  # fmt: skip
