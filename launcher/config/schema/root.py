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
from launcher.config.schema.data import DataCacheSection, DatasetSection, DatasetTaskSection
from launcher.config.schema.evaluation import NamedDatasetSection
from launcher.config.schema.field import (
    effective,
    not_built,
    optional_section,
    section,
)
from launcher.config.schema.fp8 import Fp8Section
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
from launcher.config.schema.pet import PetSection
from launcher.config.schema.preference import PREFERENCE_TRAINERS, PreferenceSection
from launcher.config.schema.training import (
    LrScheduleSection,
    OptimizerSection,
    RunnerSection,
    RunnerWrapperSection,
)

RUN_MODES = ("train", "finetune", "eval", "predict", "resume", "predict_with_train_model")
_QUANTIZED = (
    "No library for it that runs on CUDA and CPU is a dependency: hold the base in bfloat16 "
    "(model.model_config.params_dtype), and shard it (parallel.enable_parallel_optimizer)"
)
TRACKERS = (
    *("tensorboard", "wandb", "mlflow", "comet_ml", "aim", "swanlab", "trackio", "clearml"),
    "dvclive",
)


Kind = TypeVar("Kind")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, checked and complete: what a YAML file and a command line become.

    Paths are as written, relative to the current directory. It never changes.
    """

    seed: int = effective(1, minimum=0, maximum=2**63 - 1)
    """Seed of initial weights, data order, dropout and sampling."""
    run_mode: str | None = effective(None, choices=RUN_MODES)
    """What to do. `resume` is train with resume_training, and arrives as `train`."""
    output_dir: str = "./output"
    """Root of everything the run writes."""
    use_parallel: bool | None = None
    """Assertion: several processes. Left out: as many as were started."""
    load_checkpoint: str = ""
    """Weights to load: a file or a directory. Used instead of those in pretrained_model_dir."""
    load_ckpt_format: str | None = effective(None, choices=("safetensors", "ckpt"))
    """Assertion about load_checkpoint. Left out: detected from the files."""
    auto_trans_ckpt: bool | None = None
    """Assertion: weights may be resharded for this run's layout. Left out: done where needed."""
    src_strategy_path_or_dir: str = ""
    """Layout of distributed weights that do not describe it themselves, as MindSpore's do not: a
    strategy file, a merged one, or a folder of them. Left out: the folder strategy/ beside them."""
    mindformers_qkv_order: str | None = effective(None, choices=("group", "plain"))
    """Rows of fused query, key and value in weights with names of MindFormers: per key/value group,
    or all of query, key, value. Left out: by names, shapes and metadata of the files."""
    mindformers_mlp_order: str | None = effective(None, choices=("pair", "plain"))
    """Rows of fused gate and up in such weights: row by row in turn, or all of gate, up."""
    mindformers_tensor_parallel: int | None = effective(None, minimum=1)
    """Degree of the run that wrote such weights in a plain order, which is plain within each rank.
    Left out: 1."""
    mindformers_use_gmm: bool | None = None
    """Whether stacked experts in such weights are transposed. Left out: by their shape."""
    mindformers_rearranged_rope: bool | None = None
    """Whether such weights of GLM-4-9B have the even rows of each query and key head first. Left
    out: no."""
    only_save_strategy: bool = False
    """Write the strategy files of all ranks and exit; one process is enough for any layout."""
    resume_training: bool | str = False
    """Continue a run: True for the newest checkpoint of load_checkpoint (left out:
    {output_dir}/checkpoint), or the name of one. Nothing there: a fresh start with a warning."""
    final_checkpoint: bool = True
    """Save the last step of a run without CheckpointMonitor. False: such a run saves nothing."""
    ignore_data_skip: bool = False
    """A resumed run reads the data from the start instead of continuing where it was."""
    data_skip_steps: int | None = effective(None, minimum=0)
    """A resumed run skips exactly this many steps of data. Left out: as many as it has seen."""
    remove_redundancy: bool | None = None
    """Whether copies were left out of load_checkpoint. The files decide, with a warning."""
    strict_load: bool = True
    """Every parameter is loaded exactly once, or the run stops. False: others keep their initial
    values, and a table lists them."""
    pretrained_model_dir: str = ""
    """Hugging Face directory: config.json, tokenizer and, below load_checkpoint, weights."""
    trust_remote_code: bool = False
    """Run code found in pretrained_model_dir. Can be set on the command line only."""
    register_path: str | None = None
    """Directory or file with your own callbacks, relative to the current directory."""
    generation_config: GenerationSection = section(GenerationSection)
    """How predict continues a prompt; `generation` is the same section."""
    do_eval: bool = False
    """Evaluate on eval_dataset or eval_datasets during training."""
    eval_step_interval: int = effective(100, minimum=-1)
    """Optimizer steps between evaluations; -1 or 0: never by steps."""
    eval_epoch_interval: int = effective(-1, minimum=-1)
    """Epochs between evaluations; -1 or 0: never by epochs."""
    chat_template: str | None = None
    """How conversations become text, in training and in predict: the name of one of several
    templates of the tokenizer, a file, or Jinja text. Left out: the template of the tokenizer.
    `none`: predict gives prompts to the model as they are. A `prompt_template` of a data loader
    takes its place for that data set."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, such as `{enable_thinking: False}`; those of a record
    (`chat_template_kwargs`) win."""
    tools: str | list[dict[str, Any]] | None = None
    """Tools that conversations may call, shown to the model by the chat template: a JSON file with
    a list, or the list. Those of a record win."""
    input_data: str | list[str] | None = None
    """Prompts of predict: a text, several, messages as JSON, or a file with one a line."""
    system: str | None = None
    """System prompt of the conversations that predict answers; those with their own keep it. Plain
    prompts are then rendered with the chat template."""
    stream: bool | None = None
    """predict prints the text of a single prompt while it is generated. Left out: on a terminal."""
    interactive: bool = False
    """predict is a chat at the terminal."""
    predict_batch_size: int | None = effective(None, minimum=1)
    """Prompts generated together. Left out: all of them, at most eight."""
    save_file: str | None = None
    """Where predict writes. Left out: {output_dir}/text_generation_result.txt."""
    profile: bool = False
    """Record some steps with torch.profiler: on each rank a trace for Perfetto or chrome://tracing
    and a table of the slowest operations. The other `profile_*` keys only act with it."""
    profile_start_step: int = effective(1, minimum=1)
    """First optimizer step that is recorded."""
    profile_stop_step: int = effective(10, minimum=1)
    """Last one, with its report, evaluation and save."""
    init_start_profile: bool = False
    """Record from the start of the job instead: data, model and loading too."""
    profile_rank_ids: list[int] | None = effective(None)
    """Ranks that record. Left out: all, or those of profile_pipeline."""
    profile_pipeline: bool = False
    """Record on one rank of each pipeline stage, beside those of profile_rank_ids."""
    profile_communication: bool = False
    """Write a table of the collectives too, with shapes and times."""
    profile_memory: bool = True
    """Record what operations allocate and free."""
    profile_memory_snapshot: bool = False
    """Write a snapshot of the allocations on CUDA too, for https://pytorch.org/memory_viz."""
    profile_level: int | None = effective(None, choices=(0, 1, 2))
    """0: operations. 1: also the shapes of their inputs. 2: also the FLOPs of products. Left out:
    1. `profiler_level` is the same key."""
    profile_output: str | None = None
    """Folder of the traces. Left out: {output_dir}/profile."""
    with_stack: bool = False
    """profile: record the lines of Python that call an operation; slow."""
    mstx: bool = False
    """profile: mark the named ranges for Nsight Systems too (NVTX), on CUDA."""
    trackers: list[str] = effective([], choices=TRACKERS)
    """Trackers of accelerate that get the metrics."""
    device_peak_tflops: float | None = effective(None, above=0, maximum=100_000)
    """Peak speed of one device in dense matrix products of the compute dtype, for `mfu` in the
    metrics. Left out: that of the data sheet for GPUs that are known, else there is no `mfu`."""
    compile: bool | str = effective(
        "auto", choices=("auto", True, False, "inductor", "aot_eager", "eager"),
        words={**dict.fromkeys(("default", "reduce-overhead", "max-autotune", "cudagraphs",
                                "max-autotune-no-cudagraphs"), "inductor"), "aot": "aot_eager"},
    )  # fmt: skip
    """Compile every layer with torch.compile when training: True for its usual backend, or the name
    of one. `auto`: inductor on CUDA where it works, nothing on the CPU; a layer that does not
    compile then runs eagerly, with a line in the log."""
    attention_by_documents: bool = True
    """Compute attention within documents, windows and padding without a mask of length x length.
    False: with a mask, to find a fault. Rows of up to 64 tokens always have one."""
    deterministic: bool | str = effective(
        "auto", choices=("auto", True, False),
        words={"on": "True", "strict": "True", "off": "False", "warn": "auto", "exact": "auto"},
    )  # fmt: skip
    """Whether two runs give the same bits on GPUs. True: only deterministic kernels, and an error
    at an operation that has none. False: the fastest kernels. auto: as True for the decoders of
    Slipway; for models of transformers a warning in place of the error."""
    expandable_segments: bool = True
    """Let the CUDA allocator grow its blocks, which fragments less memory. PYTORCH_ALLOC_CONF in
    the environment wins."""
    gc_freq: int = effective(50, minimum=0)
    """Steps between two passes of Python's garbage collector, on all ranks at the same step.
    0: whenever Python decides."""
    loss_chunk_tokens: int | None = effective(None, minimum=0)
    """Apply the head and the loss to this many tokens at a time, so that the logits of a full
    micro-batch never exist; 0: to all at once. Left out: in chunks where that saves memory, which
    depends on tokens and vocabulary."""
    micro_batch_interleave_num: int = effective(1, minimum=1)
    """Multiplies the samples of a micro step, which is computed in this many parts. Also accepted
    under parallel_config."""
    balanced_load: bool = False
    """Spread the reading of replicated weights over the ranks; `load_balanced` is the same key."""
    save_unified_checkpoint: bool = False
    """Distributed weights that are loaded are also written as complete weights, to
    {output_dir}/unified_checkpoint. An earlier copy there is replaced, nothing else."""
    save_converted_checkpoint: bool = False
    """Complete Hugging Face weights that are loaded are also written in MindSpore's format, to
    {output_dir}/ms_safetensors. An earlier copy there is replaced, nothing else."""
    check_for_nan_in_loss_and_grad: bool = False
    """Stop with an error at a loss or gradient norm that is not finite."""
    lr_scale: bool = False
    """Multiply the learning rate by processes x batch_size / lr_scale_factor."""
    lr_scale_factor: float = effective(256.0, above=0)
    """See lr_scale."""
    use_checkpoint_health_monitor: bool = False
    """Check the health of saves by the gradient norm of the embedding; a resume skips unhealthy
    ones that are not named."""
    use_skip_data_by_global_norm: bool = False
    """Steps with a gradient norm far too large change nothing; monitor_config has the limits."""

    trainer: TrainerSection = section(TrainerSection)
    """The task."""
    preference: PreferenceSection = section(PreferenceSection)
    """Training on preferences."""
    model: ModelSection = section(ModelSection)
    """What is trained."""
    pet_config: PetSection = section(PetSection)
    """A low-rank adapter that is trained instead of the model."""
    freeze: list[str] = effective([])
    """Parameters that are not trained: names of parameters or modules, endings of names
    (`embed_tokens`), or regular expressions for full names. Checkpoints still hold them."""
    load_in_4bit: bool = not_built(False, _QUANTIZED)
    """Whether the frozen base of an adapter is held in 4 bits (QLoRA)."""
    load_in_8bit: bool = not_built(False, _QUANTIZED)
    """Whether the frozen base of an adapter is held in 8 bits."""
    quantization_bit: int | None = not_built(None, _QUANTIZED, harmless=(0,))
    """Bits in which the frozen base of an adapter is held."""
    processor: ProcessorSection = section(ProcessorSection)
    """From text to tokens and back."""
    runner_config: RunnerSection = section(RunnerSection)
    """How long a run is and how large its steps are."""
    parallel_config: ParallelConfigSection = section(ParallelConfigSection)
    """The degree of every axis."""
    parallel: ParallelSection = section(ParallelSection)
    """The sharded optimizer and the schedule of the pipeline."""
    context: ContextSection = section(ContextSection)
    """The device."""
    lr_schedule: LrScheduleSection = section(LrScheduleSection)
    """The learning rate as a function of the step."""
    optimizer: OptimizerSection = section(OptimizerSection)
    """The algorithm that changes the weights."""
    runner_wrapper: RunnerWrapperSection = section(RunnerWrapperSection)
    """What happens between gradients and the optimizer."""
    train_dataset: DatasetSection | None = optional_section()
    """Training data."""
    train_dataset_task: DatasetTaskSection = section(DatasetTaskSection)
    """Another place of the training data."""
    eval_dataset: DatasetSection | None = optional_section()
    """Evaluation data."""
    eval_datasets: list[NamedDatasetSection] = field(default_factory=list)
    """Instead of eval_dataset: several evaluation sets, each with a `name`. `eval_loss` is then the
    loss per target token of all of them together, `eval_loss/<name>` that of one."""
    eval_dataset_task: DatasetTaskSection = section(DatasetTaskSection)
    """Another place of the evaluation data."""
    data_cache: DataCacheSection = section(DataCacheSection)
    """Tokens that are kept for later runs."""
    callbacks: list[CallbackSection] = field(default_factory=list)
    """What is watched and saved, a list of entries with `type`. MFLossMonitor is always there;
    of several entries of one built-in type the last one is used."""
    recompute_config: RecomputeSection = section(RecomputeSection)
    """Activation checkpointing."""
    fp8_config: Fp8Section = section(Fp8Section)
    """Products of the linear layers in FP8."""
    swap_config: SwapSection = section(SwapSection)
    """Moving activations to host memory."""
    monitor_config: MonitorSection = section(MonitorSection)
    """Checks of loss and gradient norm."""
    tensorboard: TensorboardSection = section(TensorboardSection)
    """Scalars for TensorBoard."""

    def last_callback(self, kind: type[Kind]) -> Kind | None:
        """The entry of this kind that counts (the last one), or None."""
        found = [entry for entry in self.callbacks if isinstance(entry, kind)]
        return found[-1] if found else None

    @property
    def loss_monitor(self) -> LossMonitorSection:
        """The MFLossMonitor that counts; the default one when none is written."""
        return self.last_callback(LossMonitorSection) or LossMonitorSection()

    @property
    def preference_loss(self) -> str | None:
        """The loss on preferences; None for the loss on the next token."""
        losses = PREFERENCE_TRAINERS.get(self.trainer.type)
        return None if losses is None else self.preference.loss or losses[0]

    @property
    def checkpoint_monitor(self) -> CheckpointMonitorSection | None:
        """The CheckpointMonitor that counts, or None: no checkpoints."""
        return self.last_callback(CheckpointMonitorSection)
