"""Sections about how the work is spread over processes and memory."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.field import effective, no_effect, not_built, open_keys, section

_PIPELINE = "Use data parallel: set it to 1 and raise data_parallel"
_GRAPH = "a switch of MindSpore's graph compiler"


@dataclass(frozen=True, kw_only=True)
class ParallelConfigSection:
    """`parallel_config`: the degree of every axis. Their product is the number of processes."""

    data_parallel: int = effective(1, minimum=1)
    """Data-parallel degree: replicas that each see their own share of the global batch."""
    model_parallel: int = not_built(1, _PIPELINE, minimum=1)
    """Tensor-parallel degree: ranks that share every matrix."""
    pipeline_stage: int = not_built(1, _PIPELINE, minimum=1)
    """Pipeline stages: ranks that each own a run of layers."""
    context_parallel: int = not_built(1, _PIPELINE, minimum=1)
    """Ranks that share one sequence."""
    context_parallel_algo: str = no_effect(
        "colossalai_cp",
        "context_parallel is 1",
        choices=("colossalai_cp", "ulysses_cp", "hybrid_cp", "hybird_cp"),
    )
    """How a sequence is shared; `hybird_cp` is the original's misspelling of `hybrid_cp`."""
    ulysses_degree_in_cp: int = no_effect(1, "context_parallel is 1")
    """Inner degree of the hybrid algorithm."""
    expert_parallel: int = not_built(1, "Set it to 1", minimum=1)
    """Ranks that share the experts of a mixture-of-experts layer (inside dp x mp)."""
    micro_batch_num: int = effective(1, minimum=1)
    """Micro-batches of a pipeline; without a pipeline it does nothing, as in the original."""
    seq_split_num: int = not_built(1, "Set it to 1", minimum=1)
    """Pieces a sequence is cut into for the sequence pipeline."""
    use_seq_parallel: bool = no_effect(False, "it acts only with model_parallel > 1")
    """Sequence parallel beside tensor parallel."""
    vocab_emb_dp: bool = no_effect(True, "it acts only with model_parallel > 1")
    """True: the embedding is not cut over model_parallel."""
    gradient_aggregation_group: int = no_effect(4, "FSDP2 fuses the communication by itself")
    """Group size of fused gradient communication."""
    optimizer_shard: bool | None = no_effect(
        None, "obsolete; the switch is parallel.enable_parallel_optimizer"
    )
    """The original's old switch for a sharded optimizer."""
    mem_coeff: float = no_effect(0.1, "a weight of MindSpore's automatic strategy search")
    """Cost of memory in the automatic search."""


@dataclass(frozen=True, kw_only=True)
class ParallelOptimizerConfigSection:
    """`parallel.parallel_optimizer_config`: how the sharded optimizer is sharded."""

    gradient_accumulation_shard: bool = no_effect(
        False, "FSDP2 keeps accumulated gradients sharded always"
    )
    """Keep accumulated gradients sharded."""
    parallel_optimizer_threshold: int = no_effect(64, "FSDP2 shards small parameters too")
    """In KB: smaller parameters would not be sharded."""
    optimizer_weight_shard_size: int = effective(-1, minimum=-1)
    """Ranks that share one copy of weights and optimizer state; must divide data_parallel.
    -1: the whole data-parallel group."""


@dataclass(frozen=True, kw_only=True)
class StrategyCkptConfigSection:
    """`parallel.strategy_ckpt_config`: MindSpore's strategy file."""

    save_file: str = no_effect("", "our checkpoints describe their own layout")
    """Where the strategy file goes."""
    load_file: str = not_built("", "Our checkpoints describe their own layout: leave it out")
    """A strategy to load."""
    only_trainable_params: bool = no_effect(True, "our checkpoints describe their own layout")
    """Only trainable parameters in the strategy file."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfigSection:
    """`parallel.pipeline_config`: the schedule of a pipeline."""

    pipeline_interleave: bool = not_built(False, "Leave it out: pipeline_stage is 1")
    """Interleaved stages."""
    pipeline_scheduler: str = no_effect(
        "1f1b",
        "pipeline_stage is 1",
        choices=("1f1b", "gpipe", "seqpipe", "seqvpp", "seqsmartvpp", "zero_bubble_v"),
    )
    """Order of forward and backward passes."""


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """`parallel`: MindSpore's automatic parallel context; the optimizer switches act here too."""

    parallel_mode: int | str = no_effect(
        1,
        "degrees come from parallel_config",
        choices=(
            *(0, 1, 2, 3, "DATA_PARALLEL", "SEMI_AUTO_PARALLEL", "AUTO_PARALLEL"),
            *("HYBRID_PARALLEL", "STAND_ALONE", "MANUAL_PARALLEL"),
            *("data_parallel", "semi_auto_parallel", "auto_parallel", "hybrid_parallel"),
            "stand_alone",
        ),
    )
    """0 data, 1 semi-automatic, 2 automatic, 3 hybrid, or the name."""
    full_batch: bool = no_effect(True, "every rank reads exactly its share of the global batch")
    """Every rank reads the whole batch."""
    dataset_strategy: list[Any] | str | None = no_effect(
        None, "every rank reads exactly its share of the global batch"
    )
    """How each input is cut."""
    search_mode: str = no_effect(
        "sharding_propagation",
        "nothing is searched",
        choices=("sharding_propagation", "recursive_programming", "dynamic_programming"),
    )
    """Algorithm of the automatic mode."""
    enable_parallel_optimizer: bool = False
    """Shard weights, gradients and optimizer state over the data-parallel ranks (FSDP2).
    False: every data-parallel rank holds a full copy."""
    parallel_optimizer_config: ParallelOptimizerConfigSection = section(
        ParallelOptimizerConfigSection
    )
    """How the sharded optimizer is sharded."""
    gradients_mean: bool = no_effect(False, "the loss is always the mean over the tokens")
    """Average gradients instead of adding them."""
    enable_alltoall: bool = no_effect(False, _GRAPH)
    """Use all-to-all communication."""
    strategy_ckpt_save_file: str = no_effect("", "our checkpoints describe their own layout")
    """Where the strategy file goes."""
    strategy_ckpt_load_file: str = not_built(
        "", "Our checkpoints describe their own layout: leave it out"
    )
    """The strategy file of the weights to load."""
    strategy_ckpt_config: StrategyCkptConfigSection = section(StrategyCkptConfigSection)
    """MindSpore's strategy file."""
    pipeline_config: PipelineConfigSection = section(PipelineConfigSection)
    """The schedule of a pipeline."""
    device_num: int | None = no_effect(None, "it is the number of processes")
    """Number of devices."""
    auto_parallel_search_mode: str | None = no_effect(None, "nothing is searched")
    """Old name of search_mode."""


@dataclass(frozen=True, kw_only=True)
class ContextSection:
    """`context` (open): MindSpore's run-time context."""

    mode: int | str = no_effect(
        0, "PyTorch runs eagerly", choices=(0, 1, "GRAPH_MODE", "PYNATIVE_MODE")
    )
    """0 graph, 1 eager."""
    device_target: str = effective("Ascend", choices=("Ascend", "GPU", "CPU"))
    """`CPU` keeps the run on the CPU even where there is a GPU; the other values choose nothing:
    a GPU is used where there is one."""
    device_id: int = no_effect(0, "the rank decides")
    """Device number."""
    max_device_memory: str = no_effect("58GB", "PyTorch's allocator takes what is needed")
    """Memory limit of a device."""
    max_call_depth: int = no_effect(10000, _GRAPH)
    """Depth limit of the graph compiler."""
    save_graphs: bool | int = no_effect(False, _GRAPH)
    """Dump compiled graphs."""
    save_graphs_path: str = no_effect("", _GRAPH)
    """Where dumped graphs go."""
    jit_config: dict[str, Any] = no_effect({}, _GRAPH)
    """Options of the graph compiler."""
    ascend_config: dict[str, Any] = no_effect({}, "there is no Ascend device")
    """Options of Ascend devices."""
    affinity_cpu_list: Any = no_effect(None, "processes are not bound to cores")
    """Cores to bind to."""
    memory_optimize_level: str = no_effect("O0", _GRAPH)
    """Memory optimisation of the graph compiler."""
    mempool_block_size: str = no_effect("1GB", "PyTorch's allocator decides")
    """Block size of the memory pool."""
    extra: dict[str, Any] = open_keys("a switch of MindSpore's context", status="no effect")
    """Every other key of `context`."""


@dataclass(frozen=True, kw_only=True)
class RecomputeSection:
    """`recompute_config`: activation checkpointing."""

    recompute: bool | list[Any] = not_built(False, "Set it to False", harmless=([],))
    """Recompute activations in the backward pass: True, or one entry a pipeline stage."""
    select_recompute: bool | list[Any] | dict[str, Any] = not_built(
        False, "Set it to False", harmless=([], {})
    )
    """Recompute chosen operations only."""
    parallel_optimizer_comm_recompute: bool = no_effect(False, _GRAPH)
    """Gather sharded weights again in the backward pass."""
    select_comm_recompute: bool | list[Any] | dict[str, Any] = no_effect(False, _GRAPH)
    """Recompute chosen communication."""
    mp_comm_recompute: bool = no_effect(True, "model_parallel is 1")
    """Recompute tensor-parallel communication."""
    recompute_slice_activation: bool = no_effect(False, "nothing is recomputed")
    """Keep the kept activations sliced."""
    select_recompute_exclude: bool | list[Any] | dict[str, Any] = no_effect(
        False, "nothing is recomputed"
    )
    """Operations left out of recomputation."""
    select_comm_recompute_exclude: bool | list[Any] | dict[str, Any] = no_effect(
        False, "nothing is recomputed"
    )
    """Communication left out of recomputation."""


@dataclass(frozen=True, kw_only=True)
class SwapSection:
    """`swap_config`: moving activations to host memory."""

    swap: bool = not_built(False, "Set it to False")
    """Move activations to host memory between forward and backward."""
    layer_swap: list[Any] | None = no_effect(None, "swap is off")
    """Layers to move."""
    op_swap: list[Any] | None = no_effect(None, "swap is off")
    """Operations to move."""
    default_prefetch: int = no_effect(1, "swap is off")
    """How early an activation comes back."""
