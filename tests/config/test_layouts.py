"""Layouts that are impossible: refused before anything starts, each with the nearest possible one,
and that one is then accepted.

Each row adds lines to a right configuration: a decoder of six layers, eight attention heads, four
key/value heads, an MLP of 96, 64 rows of vocabulary, rows of 64 tokens.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.config import derived, rules
from launcher.config.checks.pipeline import corrected
from launcher.config.resolve import resolve
from launcher.config.schema import Config
from models.families import model_spec
from tests.config.interpreter import Report, run_many
from tests.config.workspace import RIGHT, build

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
PARALLEL, PIPELINE = "parallel_config", "parallel.pipeline_config"


@dataclass(frozen=True, kw_only=True)
class Impossible:
    """One row of the table."""

    name: str
    degrees: str = ""
    """`parallel_config`, on one line."""
    add: str = ""
    """Further lines at the end of the file."""
    replace: dict[str, str] = field(default_factory=dict)
    """Text in the file and what stands there instead."""
    env: dict[str, str] = field(default_factory=dict)
    at: str = "parallel_config"
    """Text in the line the error points at."""
    says: str
    """The whole error behind file and line."""
    key: str = ""
    """The key that the nearest value is of; empty: there is none."""

    @property
    def text(self) -> str:
        """The file."""
        text = RIGHT
        for old, new in {**SIZES, **self.replace}.items():
            assert old in text, (self.name, old)
            text = text.replace(old, new, 1)
        degrees = f"parallel_config: {{{self.degrees}}}\n" if self.degrees else ""
        return text + degrees + self.add

    @property
    def error(self) -> str:
        """What the user is told."""
        line = next(n for n, text in enumerate(self.text.splitlines(), 1) if self.at in text)
        return f"error: x.yaml:{line}: {self.says}\n"

    @property
    def nearest(self) -> list[str]:
        """The values named as possible."""
        found = re.search(r"Nearest: (?:data_parallel )?(.*?)\.(?: |$)", self.says + " ")
        return found[1].split(" or ") if found else []


def pipeline(**keys: Any) -> str:
    written = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return f"parallel: {{pipeline_config: {{{written}}}}}\n"


TABLE = (
    # --- the number of processes ------------------------------------------------------------
    Impossible(
        name="too few processes",
        degrees="model_parallel: 2, pipeline_stage: 2, micro_batch_num: 2",
        env={"WORLD_SIZE": "8"},
        says="the degrees ask for model_parallel 2 x pipeline_stage 2 = 4 processes, this job has "
        "8: the product of the degrees is the number of processes. Nearest: data_parallel 2. "
        "Or start it with `torchrun --nproc_per_node 4 run.py ...`.",
        key="parallel_config.data_parallel",
    ),
    Impossible(
        name="processes that no data_parallel makes up for",
        degrees="model_parallel: 2, context_parallel: 2",
        env={"WORLD_SIZE": "6"},
        says="the degrees ask for model_parallel 2 x context_parallel 2 = 4 processes, this job "
        "has 6: the product of the degrees is the number of processes. Set the degrees to fit, or "
        "start it with `torchrun --nproc_per_node 4 run.py ...`.",
    ),
    # --- tensor parallel --------------------------------------------------------------------
    Impossible(
        name="heads",
        degrees="model_parallel: 3",
        says="parallel_config.model_parallel = 3: 8 attention heads and the 64 rows of the head "
        "cannot be divided by 3; 4 key/value heads can neither be divided by 3 nor repeated "
        "evenly. Nearest: 2 or 4.",
        key="parallel_config.model_parallel",
    ),
    Impossible(
        name="more ranks than heads",
        degrees="model_parallel: 16",
        says="parallel_config.model_parallel = 16: 8 attention heads cannot be divided by 16. "
        "Nearest: 8.",
        key="parallel_config.model_parallel",
    ),
    Impossible(
        name="the width of the MLP",
        degrees="model_parallel: 4",
        replace={"intermediate_size: 96": "intermediate_size: 90"},
        says="parallel_config.model_parallel = 4: an MLP of width 90 cannot be divided by 4. "
        "Nearest: 2.",
        key="parallel_config.model_parallel",
    ),
    Impossible(
        name="the vocabulary of the head",
        degrees="model_parallel: 4",
        replace={"vocab_size: 64": "vocab_size: 66"},
        says="parallel_config.model_parallel = 4: the 66 rows of the head cannot be divided by 4. "
        "Nearest: 2.",
        key="parallel_config.model_parallel",
    ),
    Impossible(
        name="the vocabulary of embedding and head",
        degrees="model_parallel: 4, vocab_emb_dp: False",
        replace={"vocab_size: 64": "vocab_size: 66"},
        says="parallel_config.model_parallel = 4: the 66 rows of the embedding and the head cannot "
        "be divided by 4. Nearest: 2.",
        key="parallel_config.model_parallel",
    ),
    Impossible(
        name="key/value heads",
        degrees="model_parallel: 4",
        replace={"num_heads: 8": "num_heads: 12", "n_kv_heads: 4": "n_kv_heads: 3",
                 "vocab_size: 64": "vocab_size: 96"},
        says="parallel_config.model_parallel = 4: 3 key/value heads can neither be divided by 4 "
        "nor repeated evenly. Nearest: 3 or 6.",
        key="parallel_config.model_parallel",
    ),
    Impossible(
        name="rows cut by sequence parallel",
        degrees="model_parallel: 4, use_seq_parallel: True",
        replace={"  seq_length: 64": "  seq_length: 30"},
        at="  seq_length",
        says="train_dataset.seq_length = 30: use_seq_parallel with model_parallel 4: a row must be "
        "a multiple of 4 tokens. Nearest: 28 or 32.",
        key="train_dataset.seq_length",
    ),
    Impossible(
        name="a family without a decoder of ours",
        degrees="model_parallel: 2",
        replace={"packing: True": "packing: False",
                 RIGHT[RIGHT.index("    type: Qwen3Config") : RIGHT.index("train_dataset: &train")]
                 .replace("num_layers: 2", SIZES["num_layers: 2"])
                 .replace("num_heads: 4", SIZES["num_heads: 4"])
                 .replace("n_kv_heads: 2", SIZES["n_kv_heads: 2"])
                 .replace("intermediate_size: 64", SIZES["intermediate_size: 64"]):
                 "    type: GPT2Config\n"},
        says="parallel_config.model_parallel = 2: a gpt2 model is trained as transformers has it, "
        "which data parallel alone can spread. Nearest: 1. Raise data_parallel. All axes: {all}.",
        key="parallel_config.model_parallel",
    ),
    # --- context parallel -------------------------------------------------------------------
    Impossible(
        name="rows cut by the ring",
        degrees="context_parallel: 2",
        replace={"  seq_length: 64": "  seq_length: 30"},
        at="  seq_length",
        says="train_dataset.seq_length = 30: context_parallel 2 (ring): a row must be a multiple "
        "of 4 tokens. Nearest: 28 or 32.",
        key="train_dataset.seq_length",
    ),
    Impossible(
        name="rows cut by ulysses, longest that the model has",
        degrees="context_parallel: 4, context_parallel_algo: ulysses_cp",
        replace={"  seq_length: 64": "  seq_length: 127", "embeddings: 128": "embeddings: 127"},
        at="  seq_length",
        says="train_dataset.seq_length = 127: context_parallel 4 (ulysses): a row must be a "
        "multiple of 4 tokens. Nearest: 124.",
        key="train_dataset.seq_length",
    ),
    Impossible(
        name="rows cut twice",
        degrees="context_parallel: 2, model_parallel: 4, use_seq_parallel: True",
        replace={"  seq_length: 64": "  seq_length: 36"},
        at="  seq_length",
        says="train_dataset.seq_length = 36: context_parallel 2 (ring) and use_seq_parallel with "
        "model_parallel 4: a row must be a multiple of 8 tokens. Nearest: 32 or 40.",
        key="train_dataset.seq_length",
    ),
    Impossible(
        name="heads traded by ulysses",
        degrees="context_parallel: 3, context_parallel_algo: ulysses_cp",
        replace={"  seq_length: 64": "  seq_length: 60"},
        says="parallel_config.context_parallel = 3: 8 attention heads cannot be shared by 3. "
        "Nearest: 2 or 4. context_parallel_algo: colossalai_cp needs no heads.",
        key="parallel_config.context_parallel",
    ),
    Impossible(
        name="heads cut already by tensor parallel",
        degrees="context_parallel: 4, context_parallel_algo: ulysses, model_parallel: 4",
        says="parallel_config.context_parallel = 4: 2 attention heads a rank (model_parallel 4) "
        "cannot be shared by 4. Nearest: 2. context_parallel_algo: colossalai_cp needs no heads.",
        key="parallel_config.context_parallel",
    ),
    Impossible(
        name="key/value heads traded by ulysses",
        degrees="context_parallel: 2, context_parallel_algo: ulysses_cp",
        replace={"num_heads: 8": "num_heads: 12", "n_kv_heads: 4": "n_kv_heads: 3"},
        says="parallel_config.context_parallel = 2: 3 key/value heads can neither be shared by 2 "
        "nor repeated. Nearest: 1. context_parallel_algo: colossalai_cp needs no heads.",
        key="parallel_config.context_parallel",
    ),
    Impossible(
        name="an inner degree that does not divide",
        degrees="context_parallel: 4, context_parallel_algo: hybrid_cp, ulysses_degree_in_cp: 3",
        says="parallel_config.ulysses_degree_in_cp = 3: it must divide context_parallel (4). "
        "Nearest: 2 or 4.",
        key="parallel_config.ulysses_degree_in_cp",
    ),
    Impossible(
        name="an inner degree without heads",
        degrees="context_parallel: 4, context_parallel_algo: hybird_cp, ulysses_degree_in_cp: 4, "
        "model_parallel: 4",
        says="parallel_config.ulysses_degree_in_cp = 4: 2 attention heads a rank (model_parallel 4)"
        " cannot be shared by 4. Nearest: 2. context_parallel_algo: colossalai_cp needs no heads.",
        key="parallel_config.ulysses_degree_in_cp",
    ),
    Impossible(
        name="attention dropout",
        degrees="context_parallel: 2",
        replace={"head_dim: 8": "head_dim: 8\n    attention_dropout_rate: 0.1"},
        at="attention_dropout_rate",
        says="model.model_config.attention_dropout_rate = 0.1: context_parallel 2: ranks that "
        "share a sequence cannot drop shares of attention. Nearest: 0.0. Or set context_parallel "
        "to 1.",
        key="model.model_config.attention_dropout_rate",
    ),
    # --- pipelines --------------------------------------------------------------------------
    Impossible(
        name="more stages than layers",
        degrees="pipeline_stage: 8, micro_batch_num: 8",
        says="parallel_config.pipeline_stage = 8: 6 layers are too few for 8 stages. Nearest: 6.",
        key="parallel_config.pipeline_stage",
    ),
    Impossible(
        name="more stages than layers, two a rank; and rounds of micro-batches",
        degrees="pipeline_stage: 4, micro_batch_num: 4",
        add=pipeline(pipeline_interleave=True),
        says="parallel_config.pipeline_stage = 4: 6 layers are too few for 4 x 2 = 8 stages. "
        "Nearest: 2.",
        key="parallel_config.pipeline_stage",
    ),
    Impossible(
        name="fewer micro-batches than stages",
        degrees="pipeline_stage: 3, micro_batch_num: 2",
        says="parallel_config.micro_batch_num = 2: a pipeline of 3 ranks needs as many "
        "micro-batches at least. Nearest: 3.",
        key="parallel_config.micro_batch_num",
    ),
    Impossible(
        name="micro-batches that fill no round",
        degrees="pipeline_stage: 2, micro_batch_num: 3",
        add=pipeline(pipeline_scheduler="interleaved_zero_bubble"),
        says="parallel_config.micro_batch_num = 3: interleaved_zero_bubble takes them in rounds "
        "of pipeline_stage (2). Nearest: 2 or 4.",
        key="parallel_config.micro_batch_num",
    ),
    Impossible(
        name="accumulation beside micro-batches",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={"batch_size: 4": "batch_size: 4\n  gradient_accumulation_steps: 4"},
        at="gradient_accumulation",
        says="runner_config.gradient_accumulation_steps = 4: a pipeline accumulates gradients over "
        "its micro-batches. Nearest: 1. Raise parallel_config.micro_batch_num instead.",
        key="runner_config.gradient_accumulation_steps",
    ),
    Impossible(
        name="layers of too few stages",
        degrees="pipeline_stage: 4, micro_batch_num: 4",
        add=pipeline(stage_layers=[2, 2, 2]),
        at="stage_layers",
        says="parallel.pipeline_config.stage_layers = [2, 2, 2]: 6 layers are divided over 4 "
        "stages; these are 6 over 3. Nearest: [2, 2, 1, 1].",
        key="parallel.pipeline_config.stage_layers",
    ),
    Impossible(
        name="layers too many",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add=pipeline(stage_layers=[2, 5]),
        at="stage_layers",
        says="parallel.pipeline_config.stage_layers = [2, 5]: 6 layers are divided over 2 stages; "
        "these are 7 over 2. Nearest: [2, 4].",
        key="parallel.pipeline_config.stage_layers",
    ),
    Impossible(
        name="layers divided twice",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={"head_dim: 8": "head_dim: 8\n    offset: [1, -1]"},
        add=pipeline(stage_layers=[2, 4]),
        at="stage_layers",
        says="parallel.pipeline_config.stage_layers = [2, 4]: offset (x.yaml:18) divides the "
        "layers too. Keep one of the two.",
    ),
    Impossible(
        name="an offset that does not add up",
        degrees="pipeline_stage: 4, micro_batch_num: 4",
        replace={"head_dim: 8": "head_dim: 8\n    offset: [0, 1, 0, 0]"},
        at="offset",
        says="model.model_config.offset = [0, 1, 0, 0]: 6 layers are 1 for each of 4 stages, and 2 "
        "over: the sum of offset is 2, and every stage keeps a layer. Nearest: [1, 1, 0, 0].",
        key="model.model_config.offset",
    ),
    Impossible(
        name="an offset that takes a stage's last layer",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={"head_dim: 8": "head_dim: 8\n    offset: [3, -3]"},
        at="offset",
        says="model.model_config.offset = [3, -3]: 6 layers are 3 for each of 2 stages, and 0 "
        "over: the sum of offset is 0, and every stage keeps a layer. Nearest: [2, -2].",
        key="model.model_config.offset",
    ),
    Impossible(
        name="an offset of another shape",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={"head_dim: 8": "head_dim: 8\n    offset: [1, -1, 0]"},
        add=pipeline(pipeline_scheduler="zero_bubble_v"),
        at="offset",
        says="model.model_config.offset = [1, -1, 0]: 2 lists of 2 numbers, one number for each "
        "stage. Nearest: [[1, 1], [0, 0]].",
        key="model.model_config.offset",
    ),
    Impossible(
        name="three stages a rank of a V",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={"head_dim: 8": "head_dim: 8\n    pp_interleave_num: 3"},
        add=pipeline(pipeline_scheduler="zero_bubble_v"),
        at="pp_interleave_num",
        says="model.model_config.pp_interleave_num = 3: zero_bubble_v has two stages on every "
        "rank. Nearest: 2.",
        key="model.model_config.pp_interleave_num",
    ),
    Impossible(
        name="interleaving of one stage a rank",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={"head_dim: 8": "head_dim: 8\n    pp_interleave_num: 1"},
        add=pipeline(pipeline_interleave=True),
        at="pp_interleave_num",
        says="model.model_config.pp_interleave_num = 1: an interleaved pipeline has several stages "
        "on every rank. Nearest: 2. Or set pipeline_interleave to False.",
        key="model.model_config.pp_interleave_num",
    ),
    Impossible(
        name="several stages a rank without interleaving",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        replace={"head_dim: 8": "head_dim: 8\n    pp_interleave_num: 2"},
        at="pp_interleave_num",
        says="model.model_config.pp_interleave_num = 2: 1f1b has one stage on every rank. "
        "Nearest: 1. Or set parallel.pipeline_config.pipeline_interleave to True.",
        key="model.model_config.pp_interleave_num",
    ),
    Impossible(
        name="more recomputed layers than there are",
        degrees="pipeline_stage: 2, micro_batch_num: 4",
        add="recompute_config: {recompute: [9, 1]}\n",
        at="recompute: [9, 1]",
        says="recompute_config.recompute = [9, 1]: the model has 6 layers. Nearest: [6, 1].",
        key="recompute_config.recompute",
    ),
    Impossible(
        name="recomputed layers whose backward pass is split",
        degrees="pipeline_stage: 2, micro_batch_num: 4",
        add="recompute_config: {recompute: True}\n" + pipeline(pipeline_scheduler="zero_bubble_v"),
        at="recompute: True",
        says="recompute_config.recompute = True: zero_bubble_v splits the backward pass, and every "
        "part of it would run the layers again. Nearest: False. Or use pipeline_scheduler: 1f1b.",
        key="recompute_config.recompute",
    ),
    Impossible(
        name="compiled layers whose backward pass is split",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add="compile: True\n" + pipeline(pipeline_scheduler="zero_bubble_v"),
        at="compile",
        says="compile = True: zero_bubble_v splits the backward pass, which compiled layers do not "
        "allow. Nearest: False. Or use another pipeline_scheduler.",
        key="compile",
    ),
    Impossible(
        name="dynamic rope over shared rows",
        degrees="context_parallel: 2",
        replace={
            "intermediate_size: 96":
            "intermediate_size: 96\n    rope_scaling: {rope_type: dynamic, factor: 2.0}"
        },
        at="context_parallel: 2",
        says="parallel_config.context_parallel = 2: rope_type dynamic follows the length of a row, "
        "and ranks that share it see parts. Nearest: 1. Or use another rope_type, such as yarn.",
        key="parallel_config.context_parallel",
    ),
    # --- experts ----------------------------------------------------------------------------
    Impossible(
        name="experts of a dense model",
        degrees="data_parallel: 2, expert_parallel: 2",
        says="parallel_config.expert_parallel = 2: a dense model has no experts to share. "
        "Nearest: 1.",
        key="parallel_config.expert_parallel",
    ),
    Impossible(
        name="experts that do not divide",
        degrees="data_parallel: 12, expert_parallel: 3",
        replace=EXPERTS,
        says="parallel_config.expert_parallel = 3: 8 experts cannot be divided by 3. "
        "Nearest: 2 or 4.",
        key="parallel_config.expert_parallel",
    ),
    Impossible(
        name="more ranks that share experts than see data",
        degrees="data_parallel: 2, expert_parallel: 8",
        replace=EXPERTS,
        says="parallel_config.expert_parallel = 8: data_parallel 2 cannot be divided by 8. "
        "Nearest: 2.",
        key="parallel_config.expert_parallel",
    ),
    Impossible(
        name="experts and weights shared by groups that cross",
        degrees="data_parallel: 12, expert_parallel: 4",
        replace=EXPERTS,
        add="parallel: {enable_parallel_optimizer: True,\n"
            "  parallel_optimizer_config: {optimizer_weight_shard_size: 6}}\n",
        says="parallel_config.expert_parallel = 4: weights are sharded over 6 ranks, and one must "
        "divide the other. Nearest: 2.",
        key="parallel_config.expert_parallel",
    ),
    Impossible(
        name="the width of an expert",
        degrees="model_parallel: 4",
        replace={**EXPERTS, "head_dim: 8": EXPERTS["head_dim: 8"].replace("48", "50")},
        says="parallel_config.model_parallel = 4: experts of width 50 cannot be divided by 4. "
        "Nearest: 2.",
        key="parallel_config.model_parallel",
    ),
    # --- memory -----------------------------------------------------------------------------
    Impossible(
        name="more entries of recomputation than stages",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add="recompute_config: {recompute: [True, 2, 1]}\n",
        at="recompute_config",
        says="recompute_config.recompute = [True, 2, 1]: one entry a pipeline rank, pipeline_stage "
        "is 2. Nearest: [True, 2].",
        key="recompute_config.recompute",
    ),
    Impossible(
        name="lists of recomputation for stages that are not there",
        degrees="pipeline_stage: 2, micro_batch_num: 2",
        add="recompute_config: {recompute: [[1, 2], [1, 1]]}\n",
        at="recompute_config",
        says="recompute_config.recompute = [[1, 2], [1, 1]]: at most 1 of at most 2 entries each, "
        "for the stages there are. Nearest: [[1, 2]].",
        key="recompute_config.recompute",
    ),
    Impossible(
        name="recomputation of half a layer",
        add="recompute_config: {select_recompute: {'mlp\\..*': [0.5]}}\n",
        at="recompute_config",
        says="recompute_config.select_recompute.mlp\\..* = [0.5]: an entry is True, False or a "
        "number of layers.",
    ),
    Impossible(
        name="a pattern that is none",
        add="recompute_config: {select_recompute_exclude: ['mlp(']}\n",
        at="recompute_config",
        says="recompute_config.select_recompute_exclude: 'mlp(': a module is chosen by a regular "
        "expression: missing ), unterminated subpattern at position 3.",
    ),
    Impossible(
        name="layers on the host that are not there",
        add="swap_config: {swap: True, layer_swap: [{layers: [0, 5, 6]}]}\n",
        at="swap_config",
        says="swap_config.layer_swap.0.layers = [0, 5, 6]: layers are numbered from 0 to 5. "
        "Nearest: [0, 5].",
        key="swap_config.layer_swap.0.layers",
    ),
    Impossible(
        name="modules on the host without a name",
        add="swap_config: {swap: True, op_swap: [{layers: True}]}\n",
        at="swap_config",
        says="swap_config.op_swap.0.op_name = None: the name of a module is needed, or a list of "
        "names.",
    ),
)  # fmt: skip


def argv(*words: str) -> list[str]:
    return ["--config", "x.yaml", "--run_mode", "train", *words]


def started(row: Impossible) -> dict[str, str]:
    """As many processes as the degrees ask for."""
    written = yaml.safe_load(f"{{{row.degrees}}}")
    axes = ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel")
    return {"WORLD_SIZE": str(math.prod(written.get(axis, 1) for axis in axes))}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Report]]:
    """Every row run as it is, then checked with each nearest value in its place."""
    cases: list[dict[str, Any]] = []
    for index, row in enumerate(TABLE):
        folder = build(tmp_path_factory.mktemp(f"layout{index}"))
        (folder / "x.yaml").write_text(row.text)
        cases.append({"argv": argv(), "cwd": str(folder), "env": {**started(row), **row.env}})
        for value in row.nearest if row.key else ():
            line = argv(f"{row.key}={value}", "--check_config")
            cases.append({"argv": line, "cwd": str(folder), "env": row.env})
    done = iter(run_many(cases))
    return {
        row.name: [next(done) for _ in range(1 + len(row.nearest) * bool(row.key))] for row in TABLE
    }


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_an_impossible_layout_is_refused(row: Impossible, reports: dict[str, list[Report]]) -> None:
    report = reports[row.name][0]
    from models.families import DECODERS

    assert report.err == row.error.replace("{all}", ", ".join(DECODERS))
    assert (report.code, report.out) == (2, "")
    assert not report.torch_imported


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.nearest and row.key], ids=lambda row: row.name
)
def test_the_nearest_layout_is_possible(row: Impossible, reports: dict[str, list[Report]]) -> None:
    for value, report in zip(row.nearest, reports[row.name][1:], strict=True):
        assert report.code == 0, (value, report.err)


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 20
    assert sum(bool(row.nearest) for row in TABLE) >= 20
    assert len({row.name for row in TABLE}) == len(TABLE)


POSSIBLE = [
    "data_parallel: 4",
    "model_parallel: 2, use_seq_parallel: True, vocab_emb_dp: False",
    "model_parallel: 8",  # more ranks than key/value heads: these are repeated
    "context_parallel: 4",
    "context_parallel: 4, context_parallel_algo: ulysses",
    "context_parallel: 8, context_parallel_algo: hybrid_cp, ulysses_degree_in_cp: 2",
    "pipeline_stage: 3, micro_batch_num: 5",
    "pipeline_stage: 4, micro_batch_num: 4",  # six layers
    "data_parallel: 2, model_parallel: 2, pipeline_stage: 2, context_parallel: 2, "
    "micro_batch_num: 4, micro_batch_interleave_num: 2",
]


@pytest.mark.parametrize("degrees", POSSIBLE)
def test_what_is_possible(workspace: Path, degrees: str) -> None:
    Path("x.yaml").write_text(Impossible(name="", degrees=degrees, says="").text)
    assert problems("x.yaml") == []


def problems(name: str, mode: str = "train", world: int | None = None, *words: str) -> list[str]:
    result = resolve(name, mode, overrides=words)
    found = rules.check(result.config, result.provenance, world=world, bad_keys=result.bad_keys)
    return [str(problem) for problem in (*result.problems, *found)]


def test_one_process_writes_the_strategy_of_any_layout(workspace: Path) -> None:
    row = Impossible(name="", degrees="data_parallel: 2, model_parallel: 4", says="")
    Path("x.yaml").write_text(row.text + "only_save_strategy: True\n")
    assert problems("x.yaml", world=1) == []
    assert problems("x.yaml", world=8) == []
    (text,) = problems("x.yaml", world=4)
    assert "the degrees ask for data_parallel 2 x model_parallel 4 = 8 processes" in text


def test_predict_cuts_matrices_only(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["input_data=hello"]
    Path("x.yaml").write_text(Impossible(name="", degrees="model_parallel: 3", says="").text)
    (text,) = problems("x.yaml", "predict", 3, *words)
    assert "8 attention heads" in text
    Path("x.yaml").write_text(Impossible(name="", degrees="pipeline_stage: 3", says="").text)
    assert problems("x.yaml", "predict", 3, *words) == []
    result = resolve("x.yaml", "predict", overrides=words)
    (warning,) = rules.warnings(result.config, result.provenance)
    assert warning == (
        "x.yaml:45: pipeline_stage: predict cuts the model over model_parallel at most; these "
        "processes each hold it and share the prompts"
    )


def test_evaluation_is_laid_out_too(workspace: Path) -> None:
    Path("x.yaml").write_text(
        Impossible(name="", degrees="context_parallel: 4", says="").text
        + "eval_dataset: {data_loader: {dataset_dir: corpus}, seq_length: 36}\n"
    )
    (text,) = problems("x.yaml", "eval")
    assert "eval_dataset.seq_length = 36: context_parallel 4 (ring)" in text
    assert problems("x.yaml", "train") == []
    (text,) = problems("x.yaml", "train", None, "do_eval=true")
    assert "eval_dataset.seq_length = 36" in text


def test_rows_of_a_length_nobody_wrote(workspace: Path) -> None:
    row = Impossible(name="", degrees="context_parallel: 3", replace={"  seq_length: 64\n": ""},
                     says="")  # fmt: skip
    Path("x.yaml").write_text(row.text)
    (text,) = problems("x.yaml")
    assert text == (
        "x.yaml:19: train_dataset.seq_length = 128: context_parallel 3 (ring): a row must be a "
        "multiple of 6 tokens. Nearest: 126."
    )


def warned(add: str, degrees: str = "") -> list[str]:
    Path("x.yaml").write_text(Impossible(name="", degrees=degrees, says="").text + add)
    result = resolve("x.yaml", "train")
    return rules.warnings(result.config, result.provenance)


@pytest.mark.parametrize(
    ("degrees", "add", "says"),
    [
        ("use_seq_parallel: True", "", "parallel_config.use_seq_parallel: no effect without model"),
        ("micro_batch_num: 4", "", "parallel_config.micro_batch_num: no effect without a pipeline"),
        ("", pipeline(pipeline_scheduler="zero_bubble_v"), "no effect without a pipeline"),
        ("", pipeline(stage_layers=[6]), "stage_layers: no effect without a pipeline"),
        ("context_parallel: 4, ulysses_degree_in_cp: 2", "", "only context_parallel_algo hybrid"),
        ("", "swap_config: {layer_swap: [{layers: [0]}]}\n", "no effect without swap: True"),
    ],
)
def test_layouts_probably_not_meant(workspace: Path, degrees: str, add: str, says: str) -> None:
    (text,) = warned(add, degrees)
    assert text.startswith("x.yaml:45: ")
    assert says in text


# --- what follows from a layout -------------------------------------------------------------------


def config(*words: str) -> Config:
    Path("x.yaml").write_text(Impossible(name="", says="").text)
    return resolve("x.yaml", "train", overrides=words).config


STAGES_2 = "parallel_config.pipeline_stage=2"


@pytest.mark.parametrize(
    ("words", "schedule", "stages"),
    [
        ([], "1f1b", 1),
        ([STAGES_2], "1f1b", 1),
        ([STAGES_2, f"{PIPELINE}.pipeline_interleave=true"], "interleaved_1f1b", 2),
        ([f"{PIPELINE}.pipeline_interleave=true"], "interleaved_1f1b", 1),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=gpipe",
          f"{PIPELINE}.pipeline_interleave=true"], "gpipe", 2),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=zero_bubble_v"], "zero_bubble_v", 2),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=interleaved_zero_bubble",
          "+model.model_config.pp_interleave_num=3"], "interleaved_zero_bubble", 3),
    ],
)  # fmt: skip
def test_schedules_and_stages(
    workspace: Path, words: list[str], schedule: str, stages: int
) -> None:
    found = config(*words)
    assert derived.pipeline_schedule(found) == schedule
    assert derived.stages_per_rank(found) == stages


@pytest.mark.parametrize(
    ("words", "offsets", "counts"),
    [
        ([STAGES_2], None, None),
        (["+model.model_config.offset=[1,-1]"], None, None),
        ([STAGES_2, "+model.model_config.offset=0"], None, None),
        ([STAGES_2, "+model.model_config.offset=[1,-1]"], [1, -1], [4, 2]),
        ([STAGES_2, "+model.model_config.offset=[[1,-1]]"], [1, -1], [4, 2]),
        ([STAGES_2, f"{PIPELINE}.pipeline_interleave=true",
          "+model.model_config.offset=[[0,1],[1,0]]"], [0, 1, 1, 0], [1, 2, 2, 1]),
        ([STAGES_2, f"{PIPELINE}.pipeline_scheduler=zero_bubble_v",
          "+model.model_config.offset=[[0,1],[0,1]]"], [0, 1, 1, 0], [1, 2, 2, 1]),
        ([STAGES_2, f"{PIPELINE}.stage_layers=[2,4]"], None, [2, 4]),
    ],
)  # fmt: skip
def test_layers_of_each_stage(workspace: Path, words: list[str], offsets: Any, counts: Any) -> None:
    found = config(*words)
    assert derived.stage_offsets(found) == offsets
    assert derived.stage_counts(found, 6) == counts


@pytest.mark.parametrize(
    ("words", "algorithm", "inner", "unit"),
    [
        ([], "ring", 1, 1),
        (["context_parallel=4"], "ring", 1, 8),
        (["context_parallel=4", "context_parallel_algo=ring"], "ring", 1, 8),
        (["context_parallel=4", "context_parallel_algo=ulysses"], "ulysses", 4, 4),
        (["context_parallel=4", "context_parallel_algo=ulysses_cp"], "ulysses", 4, 4),
        (["context_parallel=4", "context_parallel_algo=hybird_cp",
          "ulysses_degree_in_cp=2"], "hybrid", 2, 8),
        (["context_parallel=2", "model_parallel=6", "use_seq_parallel=true"], "ring", 1, 12),
        (["model_parallel=4", "use_seq_parallel=true"], "ring", 1, 4),
    ],
)  # fmt: skip
def test_ways_to_share_a_sequence(
    workspace: Path, words: list[str], algorithm: str, inner: int, unit: int
) -> None:
    found = config(*(f"parallel_config.{word}" for word in words))
    assert derived.context_algorithm(found) == algorithm
    assert derived.ulysses_degree(found) == inner
    assert derived.row_unit(found) == unit


@pytest.mark.parametrize(
    ("counts", "layers", "expected"),
    [
        ([1, 1, 1], 3, [1, 1, 1]),
        ([1, 1, 1], 5, [2, 2, 1]),
        ([9, 1], 4, [3, 1]),
        ([4, -4], 6, [4, 2]),
        ([10**9, 1], 6, [5, 1]),
    ],
)
def test_mended_counts(counts: list[int], layers: int, expected: list[int]) -> None:
    assert corrected(counts, layers) == expected


def test_the_family_with_experts_is_one_of_ours() -> None:
    spec = model_spec({"type": "Qwen3MoeConfig"}, None)
    assert spec.decoder is not None
    assert spec.decoder.experts is not None
