"""The eager style of MindFormers ("pynative", 2026), in the sections of the older styles.

Owns how the style is recognised, by `training:` at the top level, its strictness (a key that it
does not have is an error), its defaults, and the sections about the run, its optimizer, its data
and its model. eager_layout.py has those about processes, eager_saving.py those about files.

Source of keys and defaults: mindformers 2.1.0, `mindformers/pynative/config/config.py`.
"""

from __future__ import annotations

from launcher.config.draft import Draft
from launcher.config.nodes import Node, put
from launcher.errors import did_you_mean
from launcher.mindspore.sections import eager_layout, eager_saving, eager_types
from launcher.mindspore.sections.determinism import switch
from launcher.mindspore.sections.values import (
    is_on,
    move_keys,
    names,
    off_or_refused,
    prune,
    refuse,
    written,
)

_STYLE = "training"
_DEFAULTS = {
    "run_mode": "train", "seed": 42, "runner_config.max_steps": 1000, "optimizer.type": "AdamW",
    "optimizer.weight_decay": 0.01, "lr_schedule.type": "ConstantWarmUpLR",
    "lr_schedule.learning_rate": 1e-5, "train_dataset.data_loader.shuffle": False,
}  # fmt: skip
"""Key of the older styles -> its default in this one, where it differs."""

_KEYS = {
    "training": (
        *("steps", "local_batch_size", "global_batch_size", "max_norm", "seed", "deterministic"),
        *("rampup_batch_size", "use_skip_step_on_nan", "max_consecutive_skipped_steps"),
    ),
    "parallelism": eager_layout.KEYS,
    "recompute": ("mode", "full_recompute_layer", "select_module", "exclude_op"),
    "checkpoint": eager_saving.CHECKPOINT_KEYS,
    "monitor": ("health_checkpoint", "train_state", "tensorboard", "moe_monitor"),
    "profiler": eager_saving.PROFILER_KEYS,
}
"""Section -> its keys; of the other sections the keys are those of the older styles."""

_OPTIMIZER_RULES = ("weight_decay_include", "weight_decay_exclude", "adamw_include")
_QK_CLIP = ("qk_clip", "qk_clip_enabled", "qk_clip_threshold", "qk_clip_alpha")


def translate(draft: Draft) -> None:
    """Translate a configuration of this style; others stay as they are."""
    if draft.find(_STYLE) is None:
        return
    _only_sections(draft)
    _model(draft)
    for section, known in _KEYS.items():
        _strict(draft, section, known)
    eager_types.check(draft)
    _data(draft)
    if written(draft, "lr_scheduler.type") is None:
        draft.drop("lr_scheduler.type", "it is null")
    move_keys(draft, "lr_scheduler", "lr_schedule")
    eager_layout.translate(draft)
    eager_saving.translate(draft)
    _training(draft)
    for key, value in _DEFAULTS.items():
        if not key.startswith("train_dataset.") or draft.find("train_dataset.data_loader"):
            draft.imply(key, value, _STYLE)
    _optimizer(draft)
    for section in _KEYS:
        prune(draft, section)


def _only_sections(draft: Draft) -> None:
    """What must be a section and is none is one problem, and read as an empty one."""
    for section in (*_KEYS, "lr_scheduler"):
        node = draft.find(section)
        if node is not None and not isinstance(node.value, dict | None):
            draft.refuse(section, "must be a section (key: value)")
            draft.tree = put(draft.tree, section, Node(value={}, where=node.where))


def _strict(draft: Draft, section: str, known: tuple[str, ...]) -> None:
    for name in names(draft, section):
        if name in known:
            continue
        refuse(
            draft, f"{section}.{name}", f"there is no such key in `{section}`",
            nearest=did_you_mean(name, known), advice=f"It has {', '.join(known)}",
        )  # fmt: skip


def _model(draft: Draft) -> None:
    """`model` is flat in this style."""
    for name in names(draft, "model"):
        if name not in ("model_config", "arch"):
            draft.rename(f"model.{name}", f"model.model_config.{name}")


def _data(draft: Draft) -> None:
    for section in ("train_dataset", "eval_dataset"):
        loader = f"{section}.dataloader"
        draft.rename(f"{loader}.column_names", f"{section}.input_columns")
        why = "rows are prepared once and memory-mapped"
        draft.drop(f"{loader}.python_multiprocessing", why)
        draft.drop(f"{section}.use_distribute_dataset", "every rank reads exactly its share")
        move_keys(draft, loader, f"{section}.data_loader")
        off_or_refused(draft, f"{section}.balance_enabled", "load balancing of attention")


def _optimizer(draft: Draft) -> None:
    if written(draft, "optimizer.type") == "AdamW":
        draft.imply("optimizer.betas", [0.9, 0.95], _STYLE)
    for name in _OPTIMIZER_RULES:
        off_or_refused(draft, f"optimizer.{name}", "rules by parameter names")
    if not is_on(draft, "optimizer.qk_clip_enabled") and not is_on(draft, "optimizer.qk_clip"):
        draft.drop_all([f"optimizer.{name}" for name in _QK_CLIP], "QK-clip is off")
    for name in _QK_CLIP[:2]:
        off_or_refused(draft, f"optimizer.{name}", "QK-clip")
    draft.drop_all([f"optimizer.{name}" for name in _QK_CLIP[2:]], "it is of QK-clip")
    draft.drop("optimizer.comm_strategy", "PyTorch decides how states are exchanged")


def _training(draft: Draft) -> None:
    draft.rename("training.steps", "runner_config.max_steps")
    draft.rename("training.seed", "seed")
    switch(draft, "training.deterministic")
    norm = written(draft, "training.max_norm", 1.0)
    if isinstance(norm, int | float) and norm <= 0:
        why = "gradients are clipped where max_norm is above 0"
        draft.replace("training.max_norm", {"runner_wrapper.use_clip_grad": False}, why)
    else:
        draft.rename("training.max_norm", "runner_wrapper.max_grad_norm")
    if is_on(draft, "training.use_skip_step_on_nan"):
        why = "with a loss scale a step whose gradients are not finite is skipped"
        draft.replace("training.use_skip_step_on_nan", {"runner_wrapper.scale_sense": 1.0}, why)
    draft.drop("training.use_skip_step_on_nan", "it is off")
    off_or_refused(draft, "training.max_consecutive_skipped_steps", "a limit of skipped steps")
    off_or_refused(draft, "training.rampup_batch_size", "a batch that grows during the run")
