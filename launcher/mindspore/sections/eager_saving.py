"""Files in the eager style: `checkpoint`, `monitor` and `profiler`.

Owns the CheckpointMonitor that `checkpoint` is, with the defaults of the style.
"""

from __future__ import annotations

from launcher.config.draft import Draft
from launcher.config.nodes import Node, from_plain, put
from launcher.mindspore.sections.values import is_on, off_or_refused, prune, written

_ROOT, _STYLE = "checkpoint", "training"
_MONITOR = {
    "prefix": ("prefix", "checkpoint"),
    "save_path": ("directory", None),
    "save_interleaved_steps": ("save_checkpoint_steps", 1000),
    "save_max": ("keep_checkpoint_max", 5),
    "async_save": ("async_save", False),
    "remove_redundancy": ("remove_redundancy", False),
}
"""Key of `checkpoint` -> the key of CheckpointMonitor, and its default in this style."""

_WITHOUT_EFFECT = {
    "the number of threads is chosen automatically": ("load_worker_number", "reshard_worker_num"),
    "checkpoints describe their own layout": ("save_global_layout_cache",),
}
CHECKPOINT_KEYS: tuple[str, ...] = (
    *("enable_save", *_MONITOR, "no_save_optim", "load_path", "no_load_optim", "load_balanced"),
    *("save_trainable_only", "base_load_path"),
    *(name for group in _WITHOUT_EFFECT.values() for name in group),
)
_PROFILER = {
    "start_step": "profile_start_step",
    "end_step": "profile_stop_step",
    "output_path": "profile_output",
    "profiler_rank": "profile_rank_ids",
    "profiler_level": "profile_level",
    "profile_memory": "profile_memory",
    "with_stack": "with_stack",
    "mstx": "mstx",
}
PROFILER_KEYS = ("enable_profiling", "profile_cpu", *_PROFILER)
_HEALTH = "monitor.health_checkpoint"


def translate(draft: Draft) -> None:
    """Translate these sections."""
    _loading(draft)
    _saving(draft)
    for why, group in _WITHOUT_EFFECT.items():
        draft.drop_all([f"{_ROOT}.{name}" for name in group], why)
    _monitor(draft)
    _profiler(draft)


def _profiler(draft: Draft) -> None:
    """The keys of `profiler` are those of the top level that begin with `profile`."""
    if not is_on(draft, "profiler.enable_profiling"):
        draft.drop("profiler", "it is off")
        return
    draft.rename("profiler.enable_profiling", "profile")
    ranks = written(draft, "profiler.profiler_rank")
    if isinstance(ranks, int) and not isinstance(ranks, bool):
        draft.replace("profiler.profiler_rank", {"profile_rank_ids": [ranks]})
    draft.drop("profiler.profile_cpu", "operations of the CPU are always recorded")
    for name, new in _PROFILER.items():
        if written(draft, f"profiler.{name}", "") == "":
            draft.drop(f"profiler.{name}", "the default is used")
        draft.rename(f"profiler.{name}", new)
    prune(draft, "profiler")


def _loading(draft: Draft) -> None:
    """load_path with its optimizer state is a resume, without it a start from weights."""
    key = f"{_ROOT}.load_path"
    resumes = bool(written(draft, key)) and not is_on(draft, f"{_ROOT}.no_load_optim")
    if written(draft, key, ""):
        draft.imply("resume_training", resumes, key)
        draft.rename(key, "load_checkpoint")
        why = "optimizer state is loaded where a run is resumed"
        draft.replace(f"{_ROOT}.no_load_optim", {"resume_training": resumes}, why)
    draft.drop(key, "it is empty")
    draft.drop(f"{_ROOT}.no_load_optim", "load_path is empty")
    draft.rename(f"{_ROOT}.load_balanced", "balanced_load")


def _saving(draft: Draft) -> None:
    off_or_refused(draft, f"{_ROOT}.save_trainable_only", "saving of adapters")
    draft.drop(f"{_ROOT}.base_load_path", "save_trainable_only is off")
    if not is_on(draft, f"{_ROOT}.enable_save", default=True):
        draft.imply("final_checkpoint", False, f"{_ROOT}.enable_save")
        draft.replace(f"{_ROOT}.enable_save", {"final_checkpoint": False}, "nothing is saved")
        draft.drop_all([f"{_ROOT}.{name}" for name in _MONITOR], "nothing is saved")
        draft.drop(f"{_ROOT}.no_save_optim", "nothing is saved")
        return
    entry = _new_callback(draft)
    draft.replace(f"{_ROOT}.enable_save", {f"{entry}.type": "CheckpointMonitor"})
    for name, (new, default) in _MONITOR.items():
        if written(draft, f"{_ROOT}.{name}", "") == "":
            draft.drop(f"{_ROOT}.{name}", "the default is used")
        draft.rename(f"{_ROOT}.{name}", f"{entry}.{new}")
        if default is not None:
            draft.imply(f"{entry}.{new}", default, _STYLE)
    keeps = not is_on(draft, f"{_ROOT}.no_save_optim")
    draft.replace(f"{_ROOT}.no_save_optim", {f"{entry}.save_optimizer": keeps})


def _new_callback(draft: Draft) -> str:
    """Add a CheckpointMonitor. Returns its key."""
    origin, present = draft.find(_STYLE), draft.find("callbacks")
    where = origin.where if origin is not None else ""
    entries = present.value if present is not None and isinstance(present.value, list) else []
    added = [*entries, from_plain({"type": "CheckpointMonitor"}, where)]
    draft.tree = put(draft.tree, "callbacks", Node(value=added, where=where))
    return f"callbacks.{len(added) - 1}"


def _monitor(draft: Draft) -> None:
    folder = "monitor.tensorboard.output_dir"
    if written(draft, folder, "") == "":
        draft.drop(folder, "TensorBoard is off")
    draft.rename(folder, "tensorboard.tensorboard_dir")
    draft.drop("monitor.tensorboard", "every step is written")
    draft.drop("monitor.train_state", "metrics.jsonl has loss and gradient norm of every step")
    draft.drop("monitor.moe_monitor", "the load of experts is not recorded")
    _health(draft)
    prune(draft, "monitor")


def _health(draft: Draft) -> None:
    """Limits that are written are watched: of the gradient norm, and of that of the embedding."""
    norm, times = f"{_HEALTH}.global_norm_skip_threshold", f"{_HEALTH}.global_norm_skip_time"
    if draft.find(norm) is not None:
        draft.imply("use_skip_data_by_global_norm", True, norm)
    draft.rename(norm, "monitor_config.global_norm_spike_threshold")
    draft.rename(times, "monitor_config.global_norm_spike_count_threshold")
    embedding = f"{_HEALTH}.embedding_local_norm_threshold"
    if draft.find(embedding) is not None:
        draft.imply("use_checkpoint_health_monitor", True, embedding)
        for index in range(_callbacks(draft)):
            target = f"callbacks.{index}"
            if written(draft, f"{target}.type") == "CheckpointMonitor":
                draft.rename(embedding, f"{target}.embedding_local_norm_threshold")
        draft.drop(embedding, "nothing is saved")
    prune(draft, _HEALTH)


def _callbacks(draft: Draft) -> int:
    """The number of callbacks that are written."""
    node = draft.find("callbacks")
    return len(node.value) if node is not None and isinstance(node.value, list) else 0
