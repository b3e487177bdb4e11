"""Sections about what is watched and saved: callbacks, monitors, trackers."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.field import effective, no_effect, not_built, open_keys

_NO_CRYPTO = "Leave it out: files are not encrypted"


@dataclass(frozen=True, kw_only=True)
class LossMonitorSection:
    """`MFLossMonitor`: the line of a step."""

    type: str = "MFLossMonitor"
    """Always `MFLossMonitor`."""
    per_print_times: int = effective(1, minimum=1)
    """Optimizer steps between two lines."""
    learning_rate: float | None = no_effect(None, "the rate in use is printed")
    """The original: a fixed rate to print."""
    micro_batch_num: int | None = no_effect(None, "known from parallel_config")
    """Micro-batches of a step."""
    micro_batch_interleave_num: int | None = no_effect(None, "known from the top level")
    """Copies of a step."""
    origin_epochs: int | None = no_effect(None, "known from runner_config")
    """Epochs before rescaling."""
    dataset_size: int | None = no_effect(None, "known from the data")
    """Steps of an epoch."""
    initial_epoch: int | None = no_effect(None, "known from the checkpoint")
    """Epoch of a resumed run."""
    initial_step: int | None = no_effect(None, "known from the checkpoint")
    """Step of a resumed run."""
    global_batch_size: int | None = no_effect(None, "known from runner_config")
    """Samples of a step."""
    gradient_accumulation_steps: int | None = no_effect(None, "known from runner_config")
    """Micro steps of a step."""
    check_for_nan_in_loss_and_grad: bool | None = no_effect(None, "the top-level key decides")
    """Stop at a loss that is no number."""
    calculate_per_token_loss: bool | None = no_effect(None, "the loss is always per token")
    """Weigh by tokens."""


@dataclass(frozen=True, kw_only=True)
class CheckpointMonitorSection:
    """`CheckpointMonitor`: when and what is saved."""

    type: str = "CheckpointMonitor"
    """Always `CheckpointMonitor`."""
    prefix: str = "CKP"
    """First part of the file names; without "/" and without the word "rank"."""
    directory: str | None = None
    """Root of the checkpoints. Left out: output_dir."""
    save_checkpoint_steps: int | None = effective(1, minimum=0)
    """Optimizer steps between two checkpoints; 0: save_checkpoint_seconds decides."""
    keep_checkpoint_max: int | None = effective(5, minimum=0)
    """Checkpoints kept, the newest ones; 0 or null: all, or what keep_checkpoint_per_n_minutes
    says."""
    save_network_params: bool = False
    """Also write the weights alone, without optimizer state."""
    save_optimizer: bool = True
    """Write optimizer state too; False: the checkpoint can only be fine-tuned from."""
    checkpoint_format: str = effective("safetensors", choices=("safetensors",), planned=("ckpt",))
    """Format of the files."""
    integrated_save: bool = False
    """Also write complete weights, as transformers opens them, into `checkpoint_integrated/`."""
    async_save: bool | str = effective(False, choices=(False, True, "thread", "process"))
    """Write beside training: it waits for a copy in memory. `process` is done by a thread too."""
    on_save_error: str = effective("continue", choices=("continue", "stop"))
    """What a run does when it cannot save: go on and say so, or stop."""
    remove_redundancy: bool = False
    """Write each shard once: of the ranks that hold a copy, one writes it."""
    save_trainable_params: bool = False
    """Also write the trained weights alone, into `checkpoint_trainable/`."""
    save_checkpoint_seconds: int = effective(0, minimum=0)
    """Seconds between two checkpoints, with save_checkpoint_steps: 0; 0: off."""
    keep_checkpoint_per_n_minutes: int = effective(0, minimum=0)
    """Keep one checkpoint of every so many minutes, with keep_checkpoint_max: 0; 0: off."""
    exception_save: bool = False
    """Save the last whole step when training fails on one process."""
    saved_network: Any = no_effect(None, "the model of the run is saved")
    """The original: another network to save."""
    append_info: list[Any] | None = not_built(None, "Leave it out", harmless=([],))
    """More entries for the files."""
    enc_key: str | None = not_built(None, _NO_CRYPTO)
    """Key of encryption."""
    enc_mode: str = no_effect("AES-GCM", "files are not encrypted")
    """Cipher."""
    config: Any = no_effect(None, "only for the original's Python interface")
    """The original's CheckpointConfig object."""
    global_batch_size: int | None = no_effect(None, "known from runner_config")
    """Samples of a step."""
    embedding_size: int = no_effect(4096, "the norm is that of the whole embedding")
    """Elements of the embedding."""
    embedding_local_norm_threshold: float = effective(1.0, above=0)
    """The norm of the embedding's gradient above which a save is unhealthy, where health is
    watched."""
    use_checkpoint_health_monitor: bool = False
    """As the key of that name outside of callbacks: either turns it on."""
    health_ckpts_record_dir: str = no_effect("./output", "the record lies in output_dir")
    """Where the judgement is written."""
    use_legacy_format: bool = no_effect(True, "there is one format")
    """The original's older or newer format."""


@dataclass(frozen=True, kw_only=True)
class OnRequestExitSection:
    """`OnRequestExit`: saves and ends a run, with exit code 0, when a file asks for it."""

    type: str = "OnRequestExit"
    """Always `OnRequestExit`."""
    config_file: str = ""
    """A JSON file that is looked at after every step: `{"GracefulExit": 1}` ends the run."""
    save_ckpt: bool = no_effect(True, "CheckpointMonitor saves whenever a run is ended cleanly")
    """Save before the end."""
    save_mindir: bool = no_effect(True, "there is no such format")
    """Export the model."""
    file_name: str = no_effect("Net", "CheckpointMonitor names the files")
    """Name of the files."""
    directory: str = no_effect("./", "CheckpointMonitor has the folder")
    """Where they go."""
    sig: int = no_effect(15, "SIGTERM and SIGINT always end a run cleanly")
    """Signal that ends the run."""


@dataclass(frozen=True, kw_only=True)
class EvalCallbackSection:
    """`EvalCallBack`: evaluation during training; do_eval and the intervals say when."""

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
    """A callback of the original that has no meaning here: `ObsMonitor` serves ModelArts."""

    type: str = no_effect("", "only for ModelArts")
    """Name of the class."""
    arguments: dict[str, Any] = open_keys("only for ModelArts", status="no effect")
    """Every other key of the entry."""


CallbackSection = (
    LossMonitorSection
    | CheckpointMonitorSection
    | EvalCallbackSection
    | OnRequestExitSection
    | RegisteredCallbackSection
    | IgnoredCallbackSection
)

CALLBACKS: dict[str, type] = {
    "MFLossMonitor": LossMonitorSection,
    "CheckpointMonitor": CheckpointMonitorSection,
    "EvalCallBack": EvalCallbackSection,
    "OnRequestExit": OnRequestExitSection,
    "ObsMonitor": IgnoredCallbackSection,
}
"""What `type` in callbacks may say; anything else comes in through register_path."""

PLANNED_CALLBACKS = (
    *("ProfileMonitor", "TrainCallBack", "StressDetectCallBack", "StressTestModelMonitor"),
    *("SDCMonitor", "TopkBiasBalanceCallback", "MoEDropRateCallback", "ColdHotExpertMonitor"),
    *("TrainingStateMonitor", "SummaryMonitor", "MaxLogitsMonitor"),
    *("ExpertMigrateCallback", "LossMonitor", "TimeMonitor", "ModelCheckpoint"),
)
"""Callbacks of the original that this version does not have."""


@dataclass(frozen=True, kw_only=True)
class MonitorSection:
    """`monitor_config`: the original's deep look into a run."""

    monitor_on: bool = not_built(False, "Set it to False; metrics.jsonl has the main numbers")
    """Turn the section on."""
    dump_path: str = no_effect("", "the monitor is off")
    """Where numbers are dumped."""
    target: list[str] | None = no_effect(None, "the monitor is off")
    """Patterns of parameters."""
    invert: bool = no_effect(False, "the monitor is off")
    """Take the other parameters."""
    step_interval: int = no_effect(1, "the monitor is off")
    """Steps between two looks."""
    local_loss_format: str | list[str] | None = no_effect(None, "the monitor is off")
    """Where the loss of a rank goes."""
    local_norm_format: str | list[str] | None = no_effect(None, "the monitor is off")
    """Where the norm of each parameter goes."""
    device_local_norm_format: str | list[str] | None = no_effect(None, "the monitor is off")
    """Where the norm of a rank goes."""
    device_local_loss_format: str | list[str] | None = no_effect(None, "the monitor is off")
    """Where the loss of a device goes."""
    optimizer_state_format: str | list[str] | None = no_effect(None, "the monitor is off")
    """Where optimizer state goes."""
    weight_state_format: str | list[str] | None = no_effect(None, "the monitor is off")
    """Where weights go."""
    max_attention_logit_format: str | list[str] | None = no_effect(None, "the monitor is off")
    """Where the largest attention logit goes."""
    throughput_baseline: float | None = no_effect(None, "the monitor is off")
    """Throughput to compare with."""
    print_struct: bool = not_built(False, "Set it to False")
    """Print the model."""
    check_for_global_norm: bool = False
    """End the run at a gradient norm far too large, before it is saved."""
    global_norm_spike_threshold: float = effective(3.0, above=0)
    """The norm from which on it is far too large, where one of the checks is on."""
    global_norm_spike_count_threshold: int = effective(10, minimum=0)
    """Steps in a row that use_skip_data_by_global_norm may skip; roll-backs to one save."""
    loss_spike_threshold: float | None = effective(None, above=0)
    """The loss from which on it is far too large, where one of the checks is on; null: none is."""
    roll_back: bool = False
    """Where a check would end the run: go back to the newest save, and leave out the samples
    between it and the step that was not sound."""
    stable_rank_config: dict[str, Any] | None = no_effect(None, "the monitor is off")
    """Stable rank of weights."""
    health_checkpoint: dict[str, Any] | None = no_effect(None, "the monitor is off")
    """Thresholds of healthy checkpoints."""


@dataclass(frozen=True, kw_only=True)
class TensorboardSection:
    """`tensorboard`: scalars for TensorBoard."""

    tensorboard_dir: str | None = None
    """Folder of the event files (a `rank_0` folder is added); giving it turns the tracker on."""
    tensorboard_queue_size: int = no_effect(10, "the writer decides")
    """Events kept before writing."""
    log_loss_scale_to_tensorboard: bool = no_effect(
        False, "a loss scale is in the metrics, which go to TensorBoard as they are"
    )
    """Write the loss scale."""
    log_timers_to_tensorboard: bool = no_effect(False, "the time of a step is always written")
    """Write times."""
    log_expert_load_to_tensorboard: bool = no_effect(False, "the load of experts is not recorded")
    """Write the load of experts."""
