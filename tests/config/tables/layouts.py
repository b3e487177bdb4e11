"""Layouts that are impossible, each with the nearest possible one.

The model has six layers, eight attention heads, four key/value heads, an MLP of 96 and a vocabulary
of 64; rows have 64 tokens.
"""

from __future__ import annotations

from tests.config.tables import Error, Row

SIZES = {
    "num_layers: 2": "num_layers: 6",
    "num_heads: 4": "num_heads: 8",
    "n_kv_heads: 2": "n_kv_heads: 4",
    "intermediate_size: 64": "intermediate_size: 96",
}
EXPERTS = {
    "type: Qwen3Config": "type: Qwen3MoeConfig",
    "head_dim: 8": "head_dim: 8\n    num_experts: 8\n    moe_intermediate_size: 48",
}
_MODEL = """\
    type: Qwen3Config
    vocab_size: 64
    hidden_size: 32
    intermediate_size: 96
    num_layers: 6
    num_heads: 8
    n_kv_heads: 4
    head_dim: 8
    max_position_embeddings: 128
"""

TABLE = (
    # the number of processes
    Row(
        name="too few processes",
        replace=SIZES,
        degrees="model_parallel: 2, pipeline_stage: 2, micro_batch_num: 2",
        env={"WORLD_SIZE": "8"},
        fix="parallel_config.data_parallel",
        errors=(
            Error(
                "model_parallel 2 x pipeline_stage 2 = 4 processes", at="parallel_config", near="2"
            ),
        ),
    ),
    Row(
        name="processes that no data_parallel makes up for",
        replace=SIZES,
        degrees="model_parallel: 2, context_parallel: 2",
        env={"WORLD_SIZE": "6"},
        errors=(
            Error("model_parallel 2 x context_parallel 2 = 4 processes", at="parallel_config"),
        ),
    ),
    # tensor parallel
    Row(
        name="heads",
        replace=SIZES,
        degrees="model_parallel: 3",
        errors=(
            Error("parallel_config.model_parallel = 3", at="parallel_config", near=("2", "4")),
        ),
    ),
    Row(
        name="more ranks than heads",
        replace=SIZES,
        degrees="model_parallel: 16",
        errors=(Error("parallel_config.model_parallel = 16", at="parallel_config", near="8"),),
    ),
    Row(
        name="the width of the MLP",
        degrees="model_parallel: 4",
        replace={**SIZES, "intermediate_size: 96": "intermediate_size: 90"},
        errors=(Error("parallel_config.model_parallel = 4", at="parallel_config", near="2"),),
    ),
    Row(
        name="the vocabulary of the head",
        degrees="model_parallel: 4",
        replace={**SIZES, "vocab_size: 64": "vocab_size: 66"},
        errors=(Error("parallel_config.model_parallel = 4", at="parallel_config", near="2"),),
    ),
    Row(
        name="the vocabulary of embedding and head",
        degrees="model_parallel: 4, vocab_emb_dp: False",
        replace={**SIZES, "vocab_size: 64": "vocab_size: 66"},
        errors=(Error("parallel_config.model_parallel = 4", at="parallel_config", near="2"),),
    ),
    Row(
        name="key/value heads",
        degrees="model_parallel: 4",
        replace={
            **SIZES,
            "num_heads: 8": "num_heads: 12",
            "n_kv_heads: 4": "n_kv_heads: 3",
            "vocab_size: 64": "vocab_size: 96",
        },
        errors=(
            Error("parallel_config.model_parallel = 4", at="parallel_config", near=("3", "6")),
        ),
    ),
    Row(
        name="rows cut by sequence parallel",
        degrees="model_parallel: 4, use_seq_parallel: True",
        replace={**SIZES, "  seq_length: 64": "  seq_length: 30"},
        errors=(Error("train_dataset.seq_length = 30", at="  seq_length", near=("28", "32")),),
    ),
    Row(
        name="a family that transformers builds",
        degrees="model_parallel: 2",
        replace={**SIZES, "packing: True": "packing: False", _MODEL: "    type: GPT2Config\n"},
        errors=(Error("parallel_config.model_parallel = 2", at="parallel_config", near="1"),),
    ),
    # context parallel
    Row(
        name="rows cut by the ring",
        degrees="context_parallel: 2",
        replace={**SIZES, "  seq_length: 64": "  seq_length: 30"},
        errors=(Error("train_dataset.seq_length = 30", at="  seq_length", near=("28", "32")),),
    ),
    Row(
        name="rows cut by ulysses, longest that the model has",
        degrees="context_parallel: 4, context_parallel_algo: ulysses_cp",
        replace={
            **SIZES,
            "  seq_length: 64": "  seq_length: 127",
            "embeddings: 128": "embeddings: 127",
        },
        errors=(Error("train_dataset.seq_length = 127", at="  seq_length", near="124"),),
    ),
    Row(
        name="rows cut twice",
        degrees="context_parallel: 2, model_parallel: 4, use_seq_parallel: True",
        replace={**SIZES, "  seq_length: 64": "  seq_length: 36"},
        errors=(Error("train_dataset.seq_length = 36", at="  seq_length", near=("32", "40")),),
    ),
    Row(
        name="heads traded by ulysses",
        degrees="context_parallel: 3, context_parallel_algo: ulysses_cp",
        replace={**SIZES, "  seq_length: 64": "  seq_length: 60"},
        errors=(
            Error("parallel_config.context_parallel = 3", at="parallel_config", near=("2", "4")),
        ),
    ),
    Row(
        name="heads cut already by tensor parallel",
        replace=SIZES,
        degrees="context_parallel: 4, context_parallel_algo: ulysses, model_parallel: 4",
        errors=(Error("parallel_config.context_parallel = 4", at="parallel_config", near="2"),),
    ),
    Row(
        name="key/value heads traded by ulysses",
        degrees="context_parallel: 2, context_parallel_algo: ulysses_cp",
        replace={**SIZES, "num_heads: 8": "num_heads: 12", "n_kv_heads: 4": "n_kv_heads: 3"},
        errors=(Error("parallel_config.context_parallel = 2", at="parallel_config", near="1"),),
    ),
    Row(
        name="an inner degree that does not divide",
        replace=SIZES,
        degrees="context_parallel: 4, context_parallel_algo: hybrid_cp, ulysses_degree_in_cp: 3",
        errors=(
            Error(
                "parallel_config.ulysses_degree_in_cp = 3", at="parallel_config", near=("2", "4")
            ),
        ),
    ),
    Row(
        name="an inner degree without heads",
        replace=SIZES,
        degrees="context_parallel: 4, context_parallel_algo: hybird_cp, ulysses_degree_in_cp: 4, "
        "model_parallel: 4",
        errors=(Error("parallel_config.ulysses_degree_in_cp = 4", at="parallel_config", near="2"),),
    ),
    Row(
        name="attention dropout",
        degrees="context_parallel: 2",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    attention_dropout_rate: 0.1"},
        errors=(
            Error(
                "model.model_config.attention_dropout_rate = 0.1",
                at="attention_dropout_rate",
                near="0.0",
            ),
        ),
    ),
    # pipelines
    Row(
        name="more stages than layers",
        replace=SIZES,
        degrees="pipeline_stage: 8, micro_batch_num: 8",
        errors=(Error("parallel_config.pipeline_stage = 8", at="parallel_config", near="6"),),
    ),
    Row(
        name="more stages than layers, two a rank; and rounds of micro-batches",
        replace=SIZES,
        degrees="pipeline_stage: 4, micro_batch_num: 4",
        add="parallel: {pipeline_config: {pipeline_interleave: True}}\n",
        errors=(Error("parallel_config.pipeline_stage = 4", at="parallel_config", near="2"),),
    ),
    Row(
        name="fewer micro-batches than stages",
        replace=SIZES,
        degrees="pipeline_stage: 3, micro_batch_num: 2",
        errors=(Error("parallel_config.micro_batch_num = 2", at="parallel_config", near="3"),),
    ),
    Row(
        name="micro-batches that fill no round",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 3",
        add="parallel: {pipeline_config: {pipeline_scheduler: interleaved_zero_bubble}}\n",
        errors=(
            Error("parallel_config.micro_batch_num = 3", at="parallel_config", near=("2", "4")),
        ),
    ),
    Row(
        name="accumulation beside micro-batches",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={**SIZES, "batch_size: 4": "batch_size: 4\n  gradient_accumulation_steps: 4"},
        errors=(
            Error(
                "runner_config.gradient_accumulation_steps = 4",
                at="gradient_accumulation",
                near="1",
            ),
        ),
    ),
    Row(
        name="layers of too few stages",
        replace=SIZES,
        degrees="pipeline_stage: 4, micro_batch_num: 4",
        add="parallel: {pipeline_config: {stage_layers: [2, 2, 2]}}\n",
        errors=(
            Error(
                "parallel.pipeline_config.stage_layers = [2, 2, 2]",
                at="stage_layers",
                near="[2, 2, 1, 1]",
            ),
        ),
    ),
    Row(
        name="layers too many",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add="parallel: {pipeline_config: {stage_layers: [2, 5]}}\n",
        errors=(
            Error(
                "parallel.pipeline_config.stage_layers = [2, 5]", at="stage_layers", near="[2, 4]"
            ),
        ),
    ),
    Row(
        name="layers divided twice",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    offset: [1, -1]"},
        add="parallel: {pipeline_config: {stage_layers: [2, 4]}}\n",
        errors=(Error("parallel.pipeline_config.stage_layers = [2, 4]", at="stage_layers"),),
    ),
    Row(
        name="an offset that does not add up",
        degrees="pipeline_stage: 4, micro_batch_num: 4",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    offset: [0, 1, 0, 0]"},
        errors=(
            Error("model.model_config.offset = [0, 1, 0, 0]", at="offset", near="[1, 1, 0, 0]"),
        ),
    ),
    Row(
        name="an offset that takes a stage's last layer",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    offset: [3, -3]"},
        errors=(Error("model.model_config.offset = [3, -3]", at="offset", near="[2, -2]"),),
    ),
    Row(
        name="an offset of another shape",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    offset: [1, -1, 0]"},
        add="parallel: {pipeline_config: {pipeline_scheduler: zero_bubble_v}}\n",
        errors=(
            Error("model.model_config.offset = [1, -1, 0]", at="offset", near="[[1, 1], [0, 0]]"),
        ),
    ),
    Row(
        name="three stages a rank of a V",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    pp_interleave_num: 3"},
        add="parallel: {pipeline_config: {pipeline_scheduler: zero_bubble_v}}\n",
        errors=(
            Error("model.model_config.pp_interleave_num = 3", at="pp_interleave_num", near="2"),
        ),
    ),
    Row(
        name="interleaving of one stage a rank",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    pp_interleave_num: 1"},
        add="parallel: {pipeline_config: {pipeline_interleave: True}}\n",
        errors=(
            Error("model.model_config.pp_interleave_num = 1", at="pp_interleave_num", near="2"),
        ),
    ),
    Row(
        name="several stages a rank without interleaving",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={**SIZES, "head_dim: 8": "head_dim: 8\n    pp_interleave_num: 2"},
        errors=(
            Error("model.model_config.pp_interleave_num = 2", at="pp_interleave_num", near="1"),
        ),
    ),
    Row(
        name="dynamic rope over shared rows",
        degrees="context_parallel: 2",
        replace={
            **SIZES,
            "intermediate_size: 96": (
                "intermediate_size: 96\n    rope_scaling: {rope_type: dynamic, factor: 2.0}"
            ),
        },
        errors=(Error("parallel_config.context_parallel = 2", at="context_parallel: 2", near="1"),),
    ),
    # experts
    Row(
        name="experts of a dense model",
        replace=SIZES,
        degrees="data_parallel: 2, expert_parallel: 2",
        errors=(Error("parallel_config.expert_parallel = 2", at="parallel_config", near="1"),),
    ),
    Row(
        name="experts that do not divide",
        degrees="data_parallel: 12, expert_parallel: 3",
        replace={**SIZES, **EXPERTS},
        errors=(
            Error("parallel_config.expert_parallel = 3", at="parallel_config", near=("2", "4")),
        ),
    ),
    Row(
        name="more ranks that share experts than see data",
        degrees="data_parallel: 2, expert_parallel: 8",
        replace={**SIZES, **EXPERTS},
        errors=(Error("parallel_config.expert_parallel = 8", at="parallel_config", near="2"),),
    ),
    Row(
        name="experts and weights shared by groups that cross",
        degrees="data_parallel: 12, expert_parallel: 4",
        replace={**SIZES, **EXPERTS},
        add=(
            "parallel: {enable_parallel_optimizer: True,\n"
            "  parallel_optimizer_config: {optimizer_weight_shard_size: 6}}\n"
        ),
        errors=(Error("parallel_config.expert_parallel = 4", at="parallel_config", near="2"),),
    ),
    Row(
        name="the width of an expert",
        degrees="model_parallel: 4",
        replace={**SIZES, **EXPERTS, "_size: 48": "_size: 50"},
        errors=(Error("parallel_config.model_parallel = 4", at="parallel_config", near="2"),),
    ),
    # memory
)
