"""The root of the configuration: the general keys and every section."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from launcher.config.schema.callbacks import (
    CallbackSection,
    CheckpointMonitorSection,
    LossMonitorSection,
    MonitorSection,
    TensorboardSection,
)
from launcher.config.schema.data import DatasetSection, DatasetTaskSection
from launcher.config.schema.field import (
    effective,
    no_effect,
    not_built,
    optional_section,
    section,
)
from launcher.config.schema.model import (
    GenerationSection,
    ModelSection,
    ProcessorSection,
    TrainerSection,
)
from launcher.config.schema.parallel import (
    ContextSection,
    ParallelConfigSection,
    ParallelSection,
    RecomputeSection,
    SwapSection,
)
from launcher.config.schema.training import (
    GroupedLrScheduleSection,
    LrScheduleSection,
    MetricSection,
    MoeSection,
    OptimizerSection,
    RunnerSection,
    RunnerWrapperSection,
)

RUN_MODES = ("train", "finetune", "eval", "predict", "resume", "predict_with_train_model")
TRACKERS = (
    *("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "swanlab", "trackio", "clearml"),
    "dvclive",
)
_PROFILE = "the profiler is off"
_ASCEND = "there is no Ascend device"
_NEWER = "Use load_checkpoint, resume_training and the CheckpointMonitor callback"

Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """`checkpoint`: the original's newer way to say the same as load_checkpoint and friends."""

    save_path: str | None = not_built(None, _NEWER)
    """Where checkpoints go."""
    save_max: int = not_built(5, _NEWER)
    """Checkpoints kept."""
    save_interleaved_steps: int = not_built(1, _NEWER)
    """Steps between checkpoints."""
    no_save_optim: bool = not_built(False, _NEWER)
    """Leave out optimizer state."""
    async_save: bool | str = not_built(False, _NEWER)
    """Write in the background."""
    prefix: str = not_built("CKP", _NEWER)
    """First part of the names."""
    save_remove_redundancy: bool = not_built(False, _NEWER)
    """Write each tensor once."""
    load_path: str = not_built("", _NEWER)
    """What is loaded."""
    load_balanced: bool = not_built(False, _NEWER)
    """Spread the reading over the ranks."""
    no_load_optim: bool | None = not_built(None, _NEWER)
    """Load weights only."""
    reshard_worker_num: int = no_effect(1, "reading decides by itself")
    """Threads that cut while loading (the original's text: reshard_worker_number)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, checked and complete: what a YAML file and a command line become.

    Paths are as typed, relative to the current directory. Nothing in it changes after resolving.
    """

    seed: int = effective(1, minimum=0, maximum=2**63 - 1)
    """Everything random follows from it: initial weights, order of the data, dropout, sampling."""
    run_mode: str | None = effective(None, choices=RUN_MODES)
    """What to do. `resume` is train with resume_training, and arrives as `train`."""
    output_dir: str = "./output"
    """Root of everything the run writes."""
    use_parallel: bool | None = None
    """Assertion: several processes. Left out: as many as were started."""
    load_checkpoint: str = ""
    """Weights to load: a file or a folder. Wins over the weights in pretrained_model_dir."""
    load_ckpt_format: str | None = effective(None, choices=("safetensors", "ckpt"))
    """Assertion about load_checkpoint. Left out: seen from the files."""
    auto_trans_ckpt: bool | None = None
    """Assertion: weights may be cut for this run's layout. Left out: done where needed."""
    src_strategy_path_or_dir: str = ""
    """Layout of distributed weights that do not describe it themselves, as MindSpore's do not: a
    strategy file, a merged one, or a folder of them. Left out: the folder strategy/ beside them."""
    transform_process_num: int = no_effect(1, "every rank reads its own slices")
    """Ranks that convert."""
    transform_by_rank: bool = no_effect(False, "every rank reads its own slices")
    """Convert rank by rank."""
    only_save_strategy: bool = False
    """Write the strategy files of all ranks and end; one process is enough for any layout."""
    resume_training: bool | str = False
    """Continue a run: True for the newest checkpoint of load_checkpoint (left out:
    {output_dir}/checkpoint), or the name of one. Nothing there: a fresh start with a warning."""
    final_checkpoint: bool = True
    """Save the last step of a run without CheckpointMonitor. False: such a run saves nothing."""
    ignore_data_skip: bool = False
    """A resumed run begins the data anew instead of going on where it was."""
    data_skip_steps: int | None = effective(None, minimum=0)
    """A resumed run skips exactly this many steps of data. Left out: as many as it has seen."""
    load_ckpt_async: bool = no_effect(False, "only for ckpt files, and ignored for safetensors")
    """Load in the background."""
    remove_redundancy: bool | None = None
    """Whether copies were left out of load_checkpoint. The files decide; a difference is noted."""
    resume_by_last_timestamp_ckpt: bool = not_built(
        False, "The newest complete checkpoint is chosen by its sequence number: leave it out"
    )
    """Each rank takes its newest file."""
    strict_load: bool = True
    """Every parameter is loaded exactly once or the run stops. False: the rest keeps its initial
    values, and a table says which."""
    use_legacy: bool = no_effect(True, "old and new configurations are read alike")
    """The original's older or newer models."""
    use_legacy_format: bool = no_effect(True, "there is one format of checkpoints")
    """The original's older or newer checkpoints."""
    pretrained_model_dir: str = ""
    """Hugging Face directory: config.json, tokenizer and, below load_checkpoint, weights."""
    trust_remote_code: bool = False
    """Run code found in pretrained_model_dir. Counts only on the command line."""
    register_path: str | None = None
    """Folder or file with callbacks of the user, relative to the current directory."""
    generation_config: GenerationSection = section(GenerationSection)
    """How predict continues a prompt; `generation` is the same section."""
    do_eval: bool = False
    """Evaluate on eval_dataset during training."""
    eval_step_interval: int = effective(100, minimum=-1)
    """Optimizer steps between evaluations; -1 or 0: never by steps."""
    eval_epoch_interval: int = effective(-1, minimum=-1)
    """Epochs between evaluations; -1 or 0: never by epochs."""
    input_data: str | list[str] | None = None
    """Prompts of predict: a text, several, or a file with one a line."""
    predict_batch_size: int | None = effective(None, minimum=1)
    """Prompts continued together. Left out: all of them, eight at most."""
    save_file: str | None = None
    """Where predict writes. Left out: {output_dir}/text_generation_result.txt."""
    modal_type: str | list[str] | None = not_built(None, "Only text is predicted: leave it out")
    """Kinds of the inputs of a multimodal model."""
    adapter_id: str | list[str] | None = not_built(None, "Leave it out: adapters are not built")
    """Adapter of each prompt."""
    trackers: list[str] = effective([], choices=TRACKERS)
    """Trackers of accelerate that get the metrics."""
    compile: bool | str = effective(False, choices=(True, False, "inductor", "aot_eager", "eager"))
    """Compile every layer with torch.compile: True for its usual backend, or the name of one."""
    micro_batch_interleave_num: int = effective(1, minimum=1)
    """Multiplies the samples of a micro step, which is computed in so many parts. Also accepted
    under parallel_config."""
    balanced_load: bool = False
    """Spread the reading of replicated weights over the ranks; `load_balanced` is the same key."""
    reshard_worker_num: int = no_effect(1, "reading decides by itself")
    """Threads that cut while loading."""
    save_unified_checkpoint: bool = False
    """Distributed weights that are loaded are also written whole, to
    {output_dir}/unified_checkpoint. A former copy there is replaced, nothing else."""
    save_converted_checkpoint: bool = False
    """Complete Hugging Face weights that are loaded are also written in MindSpore's form, to
    {output_dir}/ms_safetensors. A former copy there is replaced, nothing else."""
    print_separate_loss: bool = no_effect(True, "a dense model has one loss")
    """Print the parts of the loss."""
    check_for_nan_in_loss_and_grad: bool = False
    """Stop with an error at a loss or gradient norm that is no number."""
    calculate_per_token_loss: bool | None = not_built(
        None, "The loss is always the mean over the tokens: leave it out", harmless=(True,)
    )
    """Weigh by tokens, not by micro-batches; always so here."""
    lr_scale: bool = False
    """Multiply the learning rate by processes x batch_size / lr_scale_factor."""
    lr_scale_factor: float = effective(256.0, above=0)
    """See lr_scale."""
    layer_scale: bool = not_built(False, "Set it to False")
    """A smaller learning rate for lower layers."""
    layer_decay: float = no_effect(0.65, "layer_scale is off")
    """Its decay from layer to layer."""
    profile: bool = not_built(False, "Set it to False")
    """Profile some steps."""
    profile_start_step: int = no_effect(1, _PROFILE)
    """First profiled step."""
    profile_stop_step: int = no_effect(10, _PROFILE)
    """Last profiled step."""
    init_start_profile: bool = no_effect(False, _PROFILE)
    """Profile the start too."""
    profile_communication: bool = no_effect(False, _PROFILE)
    """Profile communication."""
    profile_memory: bool = no_effect(True, _PROFILE)
    """Profile memory."""
    profile_rank_ids: list[int] | None = no_effect(None, _PROFILE)
    """Ranks profiled."""
    profile_pipeline: bool = no_effect(False, _PROFILE)
    """Profile one rank of each stage."""
    profile_level: int = no_effect(1, _PROFILE)
    """Depth of the profile."""
    profiler_level: int | None = no_effect(None, _PROFILE)
    """The same."""
    profile_output: str | None = no_effect(None, _PROFILE)
    """Where the profile goes."""
    with_stack: bool = no_effect(False, _PROFILE)
    """Python stacks in the profile."""
    data_simplification: bool = no_effect(False, _PROFILE)
    """A smaller profile."""
    mstx: bool = no_effect(False, _PROFILE)
    """MindStudio marks."""
    remote_save_url: str | None = no_effect(None, "only for ModelArts")
    """Where ModelArts copies the output."""
    exclude_cann_cpu: bool = no_effect(False, _ASCEND)
    """Leave cores to the driver."""
    train_precision_sync: bool | None = no_effect(None, "a run is repeatable to the bit anyway")
    """Deterministic training."""
    infer_precision_sync: bool | None = no_effect(None, "a run is repeatable to the bit anyway")
    """Deterministic prediction."""
    postprocess_use_numpy: bool = no_effect(False, "tokens are chosen by PyTorch")
    """Choose tokens by numpy."""
    use_graceful_exit: bool = no_effect(
        False,
        "OnRequestExit in callbacks is enough; Ctrl-C and SIGTERM save and end cleanly anyway",
    )
    """Save and end when asked through a file."""
    use_checkpoint_health_monitor: bool = False
    """Judge saves by the norm of the embedding's gradient; a resume passes over unhealthy ones
    that are not named."""
    use_skip_data_by_global_norm: bool = False
    """Steps with a gradient norm far too large change nothing; monitor_config has the limits."""
    print_struct: bool = not_built(False, "Set it to False")
    """Print the model."""
    npu_num_per_node: int | None = no_effect(None, _ASCEND)
    """Devices of a node."""
    auto_tune: bool = no_effect(False, "the data needs no tuning")
    """Tune the readers."""
    filepath_prefix: str = no_effect("", "the data needs no tuning")
    """Where tuning results go."""
    autotune_per_step: int = no_effect(10, "the data needs no tuning")
    """Steps between tunings."""

    trainer: TrainerSection = section(TrainerSection)
    """The task."""
    model: ModelSection = section(ModelSection)
    """What is trained."""
    processor: ProcessorSection = section(ProcessorSection)
    """From text to tokens and back."""
    runner_config: RunnerSection = section(RunnerSection)
    """How long a run is and how large its steps are."""
    parallel_config: ParallelConfigSection = section(ParallelConfigSection)
    """The degree of every axis."""
    parallel: ParallelSection = section(ParallelSection)
    """The original's automatic parallel context; the sharded optimizer."""
    context: ContextSection = section(ContextSection)
    """The original's run-time context."""
    lr_schedule: LrScheduleSection = section(LrScheduleSection)
    """The learning rate as a function of the step."""
    optimizer: OptimizerSection = section(OptimizerSection)
    """The algorithm that changes the weights."""
    grouped_lr_schedule: GroupedLrScheduleSection = section(GroupedLrScheduleSection)
    """A curve for each group of parameters."""
    runner_wrapper: RunnerWrapperSection = section(RunnerWrapperSection)
    """What happens between gradients and the optimizer."""
    train_dataset: DatasetSection | None = optional_section()
    """Training data."""
    train_dataset_task: DatasetTaskSection = section(DatasetTaskSection)
    """The original's wrapper around the training data."""
    eval_dataset: DatasetSection | None = optional_section()
    """Evaluation data."""
    eval_dataset_task: DatasetTaskSection = section(DatasetTaskSection)
    """The original's wrapper around the evaluation data."""
    callbacks: list[CallbackSection] = field(default_factory=list)
    """What is watched and saved, a list of entries with `type`. MFLossMonitor is always there;
    of several entries of one of our types the last one counts."""
    eval_callbacks: list[Any] = no_effect([], "eval reports loss and perplexity")
    """The same for evaluation."""
    recompute_config: RecomputeSection = section(RecomputeSection)
    """Activation checkpointing."""
    swap_config: SwapSection = section(SwapSection)
    """Moving activations to host memory."""
    moe_config: MoeSection = section(MoeSection)
    """Mixture of experts of the original's older models."""
    monitor_config: MonitorSection = section(MonitorSection)
    """The original's deep look into a run."""
    tensorboard: TensorboardSection = section(TensorboardSection)
    """Scalars for TensorBoard."""
    metric: MetricSection = section(MetricSection)
    """What evaluation measures."""
    checkpoint: CheckpointSection = section(CheckpointSection)
    """The original's newer way to say the same as load_checkpoint and friends."""

    def last_callback(self, kind: type[Kind]) -> Kind | None:
        """The entry of this kind that counts (the last one), or None."""
        found = [entry for entry in self.callbacks if isinstance(entry, kind)]
        return found[-1] if found else None

    @property
    def loss_monitor(self) -> LossMonitorSection:
        """The MFLossMonitor that counts; the default one when none is written."""
        return self.last_callback(LossMonitorSection) or LossMonitorSection()

    @property
    def checkpoint_monitor(self) -> CheckpointMonitorSection | None:
        """The CheckpointMonitor that counts, or None: no checkpoints."""
        return self.last_callback(CheckpointMonitorSection)
