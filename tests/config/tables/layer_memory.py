"""Layers that cannot be recomputed, moved to the host, compiled or computed in FP8 like this, each
with the nearest possible choice.

The model is that of `layouts`.
"""

from __future__ import annotations

from tests.config.tables import Error, Row
from tests.config.tables.layouts import SIZES

TABLE = (
    Row(
        name="more recomputed layers than there are",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 4",
        add="recompute_config: {recompute: [9, 1]}\n",
        errors=(
            Error("recompute_config.recompute = [9, 1]", at="recompute: [9, 1]", near="[6, 1]"),
        ),
    ),
    Row(
        name="recomputed layers whose backward pass is split",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 4",
        add=(
            "recompute_config: {recompute: True}\n"
            "parallel: {pipeline_config: {pipeline_scheduler: zero_bubble_v}}\n"
        ),
        errors=(Error("recompute_config.recompute = True", at="recompute: True", near="False"),),
    ),
    Row(
        name="operations recomputed whose backward pass is split",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 4",
        add=(
            "recompute_config: {memory_budget: 0.5}\n"
            "parallel: {pipeline_config: {pipeline_scheduler: zero_bubble_v}}\n"
        ),
        errors=(
            Error("recompute_config.memory_budget = 0.5", at="memory_budget: 0.5", near="None"),
        ),
    ),
    Row(
        name="operations recomputed in layers that are recomputed",
        replace=SIZES,
        add="recompute_config: {recompute: True, recompute_operations: True}\n",
        errors=(
            Error(
                "recompute_config.recompute_operations = True", at="recompute_config", near="False"
            ),
        ),
    ),
    Row(
        name="a budget over 1",
        replace=SIZES,
        add="recompute_config: {memory_budget: 40}\n",
        errors=(Error("recompute_config.memory_budget = 40", at="memory_budget: 40"),),
    ),
    Row(
        name="a budget, and activations moved to the host",
        replace=SIZES,
        add="recompute_config: {memory_budget: 0.4}\nswap_config: {swap: True}\n",
        errors=(
            Error("recompute_config.memory_budget = 0.4", at="memory_budget: 0.4", near="None"),
        ),
    ),
    Row(
        name="FP8 in an exact run",
        replace=SIZES,
        add="fp8_config: {recipe: rowwise}\n",
        errors=(Error("fp8_config.recipe = 'rowwise'", at="recipe: rowwise", near="None"),),
    ),
    Row(
        name="an FP8 pattern that is wrong",
        replace=SIZES,
        add="deterministic: False\nfp8_config: {recipe: rowwise, exclude: ['(q_proj']}\n",
        errors=(Error("fp8_config.exclude: '(q_proj'", at="fp8_config"),),
    ),
    Row(
        name="compiled layers whose backward pass is split",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add=("compile: True\nparallel: {pipeline_config: {pipeline_scheduler: zero_bubble_v}}\n"),
        errors=(Error("compile = True", at="compile", near="auto"),),
    ),
    Row(
        name="more entries of recomputation than stages",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add="recompute_config: {recompute: [True, 2, 1]}\n",
        errors=(
            Error(
                "recompute_config.recompute = [True, 2, 1]", at="recompute_config", near="[True, 2]"
            ),
        ),
    ),
    Row(
        name="lists of recomputation for stages that are not there",
        replace=SIZES,
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add="recompute_config: {recompute: [[1, 2], [1, 1]]}\n",
        errors=(
            Error(
                "recompute_config.recompute = [[1, 2], [1, 1]]",
                at="recompute_config",
                near="[[1, 2]]",
            ),
        ),
    ),
    Row(
        name="recomputation of half a layer",
        replace=SIZES,
        add="recompute_config: {select_recompute: {'mlp\\..*': [0.5]}}\n",
        errors=(
            Error("recompute_config.select_recompute.mlp\\..* = [0.5]", at="recompute_config"),
        ),
    ),
    Row(
        name="a pattern that is not valid",
        replace=SIZES,
        add="recompute_config: {select_recompute_exclude: ['mlp(']}\n",
        errors=(Error("recompute_config.select_recompute_exclude", at="recompute_config"),),
    ),
    Row(
        name="layers on the host that are not there",
        replace=SIZES,
        add="swap_config: {swap: True, layer_swap: [{layers: [0, 5, 6]}]}\n",
        errors=(
            Error("swap_config.layer_swap.0.layers = [0, 5, 6]", at="swap_config", near="[0, 5]"),
        ),
    ),
    Row(
        name="modules on the host without a name",
        replace=SIZES,
        add="swap_config: {swap: True, op_swap: [{layers: True}]}\n",
        errors=(Error("swap_config.op_swap.0.op_name = None", at="swap_config"),),
    ),
)
