"""Sections about how the work is spread over processes and memory."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.field import effective, section


@dataclass(frozen=True, kw_only=True)
class ParallelConfigSection:
    """`parallel_config`: the degree of every axis. Their product is the number of processes."""

    data_parallel: int = effective(1, minimum=1)
    """Data-parallel degree: replicas that each see their own share of the global batch. `auto`: the
    number of processes divided by the other degrees."""
    model_parallel: int = effective(1, minimum=1)
    """Tensor-parallel degree: ranks that share every matrix."""
    pipeline_stage: int = effective(1, minimum=1)
    """Pipeline degree: ranks that each have one or several stages."""
    context_parallel: int = effective(1, minimum=1)
    """Ranks that share one sequence."""
    context_parallel_algo: str = effective(
        "colossalai_cp",
        choices=("colossalai_cp", "ulysses_cp", "hybrid_cp", "hybird_cp", "ring", "ulysses"),
    )
    """How a sequence is shared: `colossalai_cp` and `ring` are ring attention,
    `ulysses_cp` and `ulysses` exchange sequence for heads, `hybrid_cp` combines both
    (`hybird_cp` is MindFormers' spelling)."""
    ulysses_degree_in_cp: int = effective(1, minimum=1)
    """Ulysses degree of the hybrid: it divides context_parallel."""
    expert_parallel: int = effective(1, minimum=1)
    """Ranks that share the experts of a layer. They are data-parallel ranks: it divides
    data_parallel, and is not a factor of the number of processes."""
    micro_batch_num: int = effective(1, minimum=1)
    """Micro-batches of a pipeline; without a pipeline it has no effect, as in MindFormers."""
    use_seq_parallel: bool = False
    """Sequence parallel with tensor parallel: outside of the matrix products each rank has its part
    of the sequence."""
    vocab_emb_dp: bool = True
    """True: every tensor-parallel rank has the full embedding. False: its rows are sharded."""
    gradient_aggregation_group: int = effective(4, minimum=1)
    """Layers whose gradients are reduced together."""
    reshard_after_forward: bool | str = effective(
        "auto", choices=("auto", True, False),
        words={"default": "auto", "always": "True", "never": "False"},
    )  # fmt: skip
    """Whether FSDP frees the gathered weights of a layer after its forward pass, and gathers them
    again for its backward pass. False: it keeps them during a step, which costs the memory of all
    weights in the compute dtype. `auto`: True where weights are sharded over ranks; on one rank
    "gathering" is a cast, which is then done once a step."""


@dataclass(frozen=True, kw_only=True)
class ParallelOptimizerConfigSection:
    """`parallel.parallel_optimizer_config`: how the sharded optimizer is sharded."""

    optimizer_weight_shard_size: int = effective(-1, minimum=-1)
    """Ranks that share one copy of weights and optimizer state; must divide data_parallel.
    -1: all data-parallel ranks."""


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
    """`parallel`: the sharded optimizer and the schedule of the pipeline."""

    enable_parallel_optimizer: bool = False
    """Shard weights, gradients and optimizer state over the data-parallel ranks (FSDP2).
    False: every data-parallel rank holds a full copy."""
    parallel_optimizer_config: ParallelOptimizerConfigSection = section(
        ParallelOptimizerConfigSection
    )
    """How the sharded optimizer is sharded."""
    pipeline_config: PipelineConfigSection = section(PipelineConfigSection)
    """The schedule of a pipeline."""


@dataclass(frozen=True, kw_only=True)
class ContextSection:
    """`context`: the device."""

    device_target: str = effective("Ascend", choices=("Ascend", "GPU", "CPU"))
    """`CPU`: run on the CPU even where there is a GPU. With the other values a GPU is used where
    there is one."""


@dataclass(frozen=True, kw_only=True)
class RecomputeSection:
    """`recompute_config`: activation checkpointing."""

    recompute: bool | list[Any] = False
    """Recompute full layers in the backward pass: all, or an entry a pipeline rank (True, False or
    the number of its first layers), or with several stages a rank a list of such lists."""
    select_recompute: bool | list[Any] | dict[str, Any] = False
    """Recompute chosen modules of the other layers: True for norms and activations, a list of
    name patterns or of entries as above, or patterns with such entries."""
    select_recompute_exclude: bool | list[Any] | dict[str, Any] = False
    """Modules left out of recomputation, in the form of select_recompute."""
    recompute_operations: bool = False
    """Recompute by operation, in the layers that are not recomputed in full: keep the results of
    matrix products and attention, recompute everything else."""
    memory_budget: float | None = effective(None, minimum=0, maximum=1)
    """The same with a limit: how much of what a layer keeps for the backward pass without
    recomputation it may keep, from 0 (as `recompute`) to 1. The operations that are dearest for
    their bytes are kept. With compiled layers the compiler chooses, on the same scale."""


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
