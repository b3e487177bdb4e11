"""Sections about callbacks, monitors and trackers."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.evaluation import METRIC_MODES, EarlyStoppingSection
from launcher.config.schema.field import effective, no_effect, open_keys


@dataclass(frozen=True, kw_only=True)
class LossMonitorSection:
    """`MFLossMonitor`: the line of a step."""

    type: str = "MFLossMonitor"
    """Always `MFLossMonitor`."""
    per_print_times: int = effective(1, minimum=1)
    """Optimizer steps between two lines."""


@dataclass(frozen=True, kw_only=True)
class CheckpointMonitorSection:
    """`CheckpointMonitor`: when and what is saved."""

    type: str = "CheckpointMonitor"
    """Always `CheckpointMonitor`."""
    prefix: str = "CKP"
    """Prefix of the file names, without "/" and "rank"."""
    directory: str | None = None
    """Root of the checkpoints. Left out: output_dir."""
    save_checkpoint_steps: int | None = effective(1, minimum=0)
    """Optimizer steps between two checkpoints; 0: save_checkpoint_seconds decides."""
    keep_checkpoint_max: int | None = effective(5, minimum=0)
    """Checkpoints kept, the newest ones; 0 or null: all, or those of
    keep_checkpoint_per_n_minutes."""
    keep_best: bool = False
    """Keep the save with the best `best_metric` beside the newest ones, and name it in `best.json`.
    A save counts whose step was evaluated."""
    best_metric: str = "eval_loss"
    """With keep_best: key of the evaluation rows of `metrics.jsonl`."""
    best_mode: str | None = effective(None, choices=METRIC_MODES)
    """With keep_best: whether lower (`min`) or higher (`max`) values are better. Left out: as
    `mode` of EarlyStopping."""
    save_network_params: bool = False
    """Also write the weights alone, without optimizer state."""
    save_optimizer: bool = True
    """Write optimizer state too; False: the checkpoint can only be fine-tuned from."""
    checkpoint_format: str = effective("safetensors", choices=("safetensors", "ckpt"))
    """Format of the files; `ckpt`: that of MindSpore."""
    integrated_save: bool = False
    """Also write complete weights, as transformers opens them, into `checkpoint_integrated/`."""
    async_save: bool | str = effective(False, choices=(False, True, "thread", "process"))
    """Write in the background; training waits for a copy in memory. `process` uses a thread too."""
    on_save_error: str = effective("continue", choices=("continue", "stop"))
    """What a run does when a save fails: continue with a warning, or stop."""
    remove_redundancy: bool = False
    """Write each shard once, on one of the ranks that hold a copy."""
    save_trainable_params: bool = False
    """Also write the trained weights alone, into `checkpoint_trainable/`."""
    save_checkpoint_seconds: int = effective(0, minimum=0)
    """Seconds between two checkpoints, with save_checkpoint_steps: 0; 0: off."""
    keep_checkpoint_per_n_minutes: int = effective(0, minimum=0)
    """Keep one checkpoint of every so many minutes, with keep_checkpoint_max: 0; 0: off."""
    exception_save: bool = False
    """Save the last complete step when training fails on one process."""
    embedding_local_norm_threshold: float = effective(1.0, above=0)
    """The norm of the embedding's gradient above which a save is unhealthy, where health is
    watched."""
    use_checkpoint_health_monitor: bool = False
    """The same as the key at the top level: either one turns it on."""


@dataclass(frozen=True, kw_only=True)
class OnRequestExitSection:
    """`OnRequestExit`: saves and ends a run, with exit code 0, on a request in a file."""

    type: str = "OnRequestExit"
    """Always `OnRequestExit`."""
    config_file: str = ""
    """A JSON file that is read after every step: `{"GracefulExit": 1}` ends the run."""


@dataclass(frozen=True, kw_only=True)
class EvalCallbackSection:
    """`EvalCallBack`: evaluation during training; do_eval and the intervals determine when."""

    type: str = "EvalCallBack"
    """Always `EvalCallBack`."""


@dataclass(frozen=True, kw_only=True)
class RegisteredCallbackSection:
    """A callback from register_path: its arguments are checked against its signature later."""

    type: str = ""
    """Name of the class or function."""
    arguments: dict[str, Any] = open_keys()
    """Every other key of the entry."""


@dataclass(frozen=True, kw_only=True)
class IgnoredCallbackSection:
    """A callback of MindFormers without effect: `ObsMonitor` is for ModelArts."""

    type: str = no_effect("", "only for ModelArts")
    """Name of the class."""
    arguments: dict[str, Any] = open_keys("only for ModelArts", status="no effect")
    """Every other key of the entry."""


CallbackSection = (
    LossMonitorSection
    | CheckpointMonitorSection
    | EvalCallbackSection
    | OnRequestExitSection
    | EarlyStoppingSection
    | RegisteredCallbackSection
    | IgnoredCallbackSection
)

CALLBACKS: dict[str, type] = {
    "MFLossMonitor": LossMonitorSection,
    "CheckpointMonitor": CheckpointMonitorSection,
    "EvalCallBack": EvalCallbackSection,
    "OnRequestExit": OnRequestExitSection,
    "EarlyStopping": EarlyStoppingSection,
    "ObsMonitor": IgnoredCallbackSection,
}
"""The values of `type` in callbacks; any other callback comes from register_path."""


@dataclass(frozen=True, kw_only=True)
class MonitorSection:
    """`monitor_config`: checks of loss and gradient norm."""

    check_for_global_norm: bool = False
    """End the run at a gradient norm that is too large, before it is saved."""
    global_norm_spike_threshold: float = effective(3.0, above=0)
    """A norm from this value on is too large, where one of the checks is on."""
    global_norm_spike_count_threshold: int = effective(10, minimum=0)
    """Steps in a row that use_skip_data_by_global_norm may skip; roll-backs to one save."""
    loss_spike_threshold: float | None = effective(None, above=0)
    """A loss from this value on is too large, where one of the checks is on; null: none is."""
    roll_back: bool = False
    """Where a check would end the run: go back to the latest save, and skip the samples between
    it and the failed step."""


@dataclass(frozen=True, kw_only=True)
class TensorboardSection:
    """`tensorboard`: scalars for TensorBoard."""

    tensorboard_dir: str | None = None
    """Folder of the event files (a `rank_0` folder is added); giving it turns the tracker on."""
