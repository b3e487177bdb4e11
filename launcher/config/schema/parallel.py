"""Sections about how the work is spread over processes and memory."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.field import effective, no_effect, not_built, open_keys, section

_GRAPH = "a switch of MindSpore's graph compiler"
_LAYERS = "whole layers and chosen modules are recomputed, with their communication"


@dataclass(frozen=True, kw_only=True)
class ParallelConfigSection:
    """`parallel_config`: the degree of every axis. Their product is the number of processes."""

    data_parallel: int = effective(1, minimum=1)
    """Data-parallel degree: replicas that each see their own share of the global batch."""
    model_parallel: int = effective(1, minimum=1)
    """Tensor-parallel degree: ranks that share every matrix."""
    pipeline_stage: int = effective(1, minimum=1)
    """Pipeline degree: ranks that each own a run of layers, or several runs."""
    context_parallel: int = effective(1, minimum=1)
    """Ranks that share one sequence."""
    context_parallel_algo: str = effective(
        "colossalai_cp",
        choices=("colossalai_cp", "ulysses_cp", "hybrid_cp", "hybird_cp", "ring", "ulysses"),
    )
    """How a sequence is shared: `colossalai_cp` and `ring` pass keys and values round,
    `ulysses_cp` and `ulysses` trade sequence for heads, `hybrid_cp` is one inside the other
    (`hybird_cp` is the original's misspelling)."""
    ulysses_degree_in_cp: int = effective(1, minimum=1)
    """Inner degree of the hybrid: ranks that trade heads; it divides context_parallel."""
    expert_parallel: int = effective(1, minimum=1)
    """Ranks that share the experts of a layer. They are data-parallel ranks: it divides
    data_parallel, and is no factor of the number of processes."""
    micro_batch_num: int = effective(1, minimum=1)
    """Micro-batches of a pipeline; without a pipeline it does nothing, as in the original."""
    seq_split_num: int = not_built(1, "Set it to 1", minimum=1)
    """Pieces a sequence is cut into for the sequence pipeline."""
    use_seq_parallel: bool = False
    """Sequence parallel beside tensor parallel: between the matrices each rank keeps its part of
    the sequence."""
    vocab_emb_dp: bool = True
    """True: the embedding is whole on every tensor-parallel rank. False: its rows are cut."""
    gradient_aggregation_group: int = effective(4, minimum=1)
    """Layers whose gradients are communicated together."""
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

    pipeline_interleave: bool = False
    """Several stages a rank, model.model_config.pp_interleave_num of them (left out: 2)."""
    pipeline_scheduler: str = effective(
        "1f1b",
        choices=("1f1b", "gpipe", "zero_bubble_v", "interleaved_1f1b", "interleaved_zero_bubble"),
        planned=("seqpipe", "seqvpp", "seqsmartvpp"),
    )
    """Order of forward and backward passes. The interleaved ones have several stages a rank,
    `zero_bubble_v` has two."""
    stage_layers: list[int] | None = effective(None, minimum=1)
    """Layers of each stage, first to last: `[5, 6, 6, 5]`. Left out: even shares changed by
    model.model_config.offset, or balanced where the layers do not divide."""


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

    recompute: bool | list[Any] = False
    """Recompute whole layers in the backward pass: all, or an entry a pipeline rank (True, False or
    the number of its first layers), or with several stages a rank a list of such lists."""
    select_recompute: bool | list[Any] | dict[str, Any] = False
    """Recompute chosen modules of the other layers: True for norms and activations, a list of
    name patterns or of entries as above, or patterns with such entries."""
    parallel_optimizer_comm_recompute: bool = no_effect(
        False, "the gathered weights of a layer are always dropped and gathered again"
    )
    """Drop gathered weights after the forward pass and gather them again in the backward pass."""
    select_comm_recompute: bool | list[Any] | dict[str, Any] = no_effect(False, _LAYERS)
    """Recompute chosen communication."""
    mp_comm_recompute: bool = no_effect(True, _LAYERS)
    """Recompute tensor-parallel communication."""
    recompute_slice_activation: bool = no_effect(False, "use_seq_parallel keeps them sliced")
    """Keep the kept activations sliced."""
    select_recompute_exclude: bool | list[Any] | dict[str, Any] = False
    """Modules left out of recomputation, in the form of select_recompute."""
    select_comm_recompute_exclude: bool | list[Any] | dict[str, Any] = no_effect(False, _LAYERS)
    """Communication left out of recomputation."""


@dataclass(frozen=True, kw_only=True)
class SwapSection:
    """`swap_config`: moving activations and optimizer state to host memory."""

    swap: bool = False
    """Move activations to host memory between forward and backward."""
    layer_swap: list[Any] | None = None
    """Layers to move: entries with `layers` (True, or numbers from 0) and `backward_prefetch`. Left
    out together with op_swap: all layers."""
    op_swap: list[Any] | None = None
    """Modules to move: entries with `op_name` (a name pattern, or several), `layers` and
    `backward_prefetch`."""
    optimizer: bool = False
    """Keep optimizer state in host memory; it acts without `swap` too."""
    default_prefetch: int = no_effect(1, "copies run beside the computation and come back in order")
    """How early an activation comes back."""
