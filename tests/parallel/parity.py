"""The harness of the parity matrix: real runs on real ranks, gradients and parameters compared.

A case is a family, a layout and a few settings. Every rank builds the run as `run.py` would from
YAML, trains three steps on real text, and returns its shards; one process is the reference.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tests.ranks import PATIENCE, run_ranks
from tests.workshop import BASE, VOCABULARY, Workshop, merged

STEPS = 3
TOLERANCE = 1e-5

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "initializer_range": 0.08,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig", **_SIZES},
    "qwen2": {"type": "Qwen2Config", **_SIZES},
    "qwen3": {"type": "Qwen3Config", "head_dim": 8, **_SIZES},
    "qwen3 tied": {"type": "Qwen3Config", "head_dim": 8, "tie_word_embeddings": True, **_SIZES},
    "qwen3 moe": {"type": "Qwen3MoeConfig", "head_dim": 8, "norm_topk_prob": True, **_SIZES,
                  **_EXPERTS},
    "mixtral": {"type": "MixtralConfig", **_SIZES, "num_local_experts": 8,
                "num_experts_per_tok": 2},
    "deepseek": {
        "type": "DeepseekV3Config", **_SIZES, "num_key_value_heads": 8,
        "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4,
        "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "routed_scaling_factor": 1.5,
    },
    "glm": {
        "type": "Glm4MoeConfig", **_SIZES, "head_dim": 16, "use_qk_norm": True,
        "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "glm 9b": {"type": "GlmConfig", **_SIZES, "head_dim": 8},
    "glm 0414": {"type": "Glm4Config", **_SIZES, "head_dim": 16},
    "gpt-oss": {
        "type": "GptOssConfig", **_SIZES, "head_dim": 16, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": 9,
    },
    "telechat": {"type": "TelechatConfig", **_SIZES},
    "telechat moe": {"type": "TelechatConfig", **_SIZES, "num_experts": 8,
                     "num_experts_per_tok": 2},
    "telechat tied": {"type": "TelechatConfig", **_SIZES, "tie_word_embeddings": True},
}  # fmt: skip
MODULES: dict[str, dict[str, Any]] = {
    "gpt2": {"type": "GPT2Config", "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3,
             "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0, "initializer_range": 0.08},
    "gemma": {"type": "GemmaConfig", **_SIZES, "head_dim": 16},
}  # fmt: skip
"""Families that run through their transformers module."""
MIXTURES = ("qwen3 moe", "mixtral", "deepseek", "glm", "gpt-oss", "telechat moe")
"""Families with experts."""
EPSILON = {
    **dict.fromkeys(("gpt-oss", "glm 9b", "glm 0414", "telechat", "telechat moe"), 1e-3),
    "telechat tied": 2e-3,
}
"""Of Adam. Biases are initialized to zero and become the sum of its steps, in which the rounding of
a small gradient is multiplied by 1 / epsilon; these families have many."""


@dataclass(frozen=True)
class Case:
    """One run: `parallel_config` degrees, and other changes of the YAML."""

    family: str = "qwen3"
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    sharded: bool = False
    shard_size: int = -1
    batch: int = 0
    """Samples of a rank in a micro-batch; 0: those of a global batch of 8."""
    micro: int = 1
    """Micro-batches of a step."""
    parallel: Mapping[str, Any] = field(default_factory=dict)
    """More of `parallel_config`."""
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    """More of `parallel.pipeline_config`."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """More of `model.model_config`."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """More of the YAML."""

    @property
    def ranks(self) -> int:
        """Processes it needs."""
        return self.dp * self.tp * self.pp * self.cp

    def yaml(self) -> dict[str, Any]:
        """The configuration."""
        micro = max(self.micro, min(2 * self.pp, 8 // self.dp) if self.pp > 1 else 1)
        steps = {"micro_batch_num": micro} if self.pp > 1 else {}
        accumulation = {} if self.pp > 1 else {"gradient_accumulation_steps": micro}
        changes: dict[str, Any] = {
            "model": {"model_config": None},
            "runner_config": {
                "batch_size": self.batch or 8 // (self.dp * micro), "max_steps": STEPS,
                "epochs": 4, **accumulation,
            },
            "optimizer": {"eps": EPSILON.get(self.family, 1e-4)},
            "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 5e-3, "warmup_steps": 0},
            "callbacks": [],
            "parallel_config": {
                "data_parallel": self.dp, "model_parallel": self.tp, "pipeline_stage": self.pp,
                "context_parallel": self.cp, "expert_parallel": self.ep, **steps, **self.parallel,
            },
            "parallel": {
                "enable_parallel_optimizer": self.sharded,
                "parallel_optimizer_config": {"optimizer_weight_shard_size": self.shard_size},
                "pipeline_config": dict(self.pipeline),
            },
        }  # fmt: skip
        config = merged(BASE, changes)
        config["model"]["model_config"] = {**(FAMILIES | MODULES)[self.family], **self.model}
        return merged(config, dict(self.more))

    def alone(self) -> Case:
        """The same run in one process."""
        keep = {k: v for k, v in self.more.items() if k not in ("compile", "recompute_config",
                "swap_config", "micro_batch_interleave_num", "loss_chunk_tokens")}  # fmt: skip
        return Case(family=self.family, batch=8, model=self.model, more=keep)

    def __str__(self) -> str:
        axes = {"dp": self.dp, "tp": self.tp, "pp": self.pp, "cp": self.cp, "ep": self.ep}
        text = " ".join(f"{axis}{size}" for axis, size in axes.items() if size > 1) or "alone"
        text += " sharded" * self.sharded + (f"/{self.shard_size}" if self.shard_size > 0 else "")
        extra = {**self.parallel, **self.pipeline, **self.model, **self.more}
        shown = ",".join(f"{key}={value}" for key, value in extra.items())
        return f"{self.family}: {text}" + (f" x{self.micro}" if self.micro > 1 else "") + (
            f" [{shown}]" if shown else "")  # fmt: skip


Pieces = dict[str, tuple[tuple[int, ...], tuple[int, ...], np.ndarray]]


@dataclass
class Outcome:
    """Results and shards of one rank: name -> (global shape, offset, values)."""

    losses: list[float]
    norms: list[float]
    eval_loss: float
    gradients: list[Pieces]
    parameters: Pieces
    error: str = ""


def run_cases(
    workshop: Workshop, cases: Sequence[Case], timeout: float = PATIENCE, main: Any = None
) -> list[list[Outcome]]:
    """The outcomes of every case, rank by rank; cases of one size share their processes.

    `main`: the function of a rank instead of `run_on_rank`.
    """
    found: dict[int, list[Outcome]] = {}
    for ranks in sorted({case.ranks for case in cases}):
        mine = [index for index, case in enumerate(cases) if case.ranks == ranks]
        results = run_ranks(
            ranks, main or run_on_rank, str(workshop.folder), [cases[i] for i in mine],
            timeout=timeout,
        )  # fmt: skip
        for place, index in enumerate(mine):
            found[index] = [result[place] for result in results]
    return [found[index] for index in range(len(cases))]


def run_on_rank(folder: str, cases: Sequence[Case]) -> list[Outcome]:
    import traceback

    from launcher.parallel import world as worlds

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    outcomes = []
    for number, case in enumerate(cases):
        outcome = None
        try:
            outcome = run_case(case, world, f"{len(cases)}_{world.size}_{number}")
        except Exception:
            if world.size == 1 or number == 0:
                raise
            outcome = Outcome([], [], math.nan, [], {}, error=traceback.format_exc())
        outcomes.append(outcome)
        gc.collect()
        if outcome.error:
            break
    outcomes += [replace(outcomes[-1]) for _ in range(len(cases) - len(outcomes))]
    if not outcomes[-1].error:
        worlds.stop()
    return outcomes


def run_case(case: Case, world: Any, tag: str, step: Any = None) -> Outcome:
    """Train and evaluate; `tag` is part of the names of files. `step`: in place of `train_step`;
    gradients are then not kept."""
    import yaml

    from launcher.builders.job import Job
    from launcher.builders.run import fresh_run
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.report.console import Console
    from launcher.train.step import GRADIENT_NORM, LOSS, train_step

    name = f"case_{tag}_{world.rank}.yaml"
    with open(name, "w") as file:
        yaml.safe_dump({**case.yaml(), "output_dir": "parity"}, file)
    resolved = resolve_command_line(parse(["--config", name, "--run_mode", "train"]))
    assert not resolved.problems, resolved.problems
    job = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
    run = fresh_run(job, None)
    gradients: list[Pieces] = []
    update = run.optimizer.step

    def captured(*arguments: Any) -> Any:
        gradients.append(_gradients(run))
        return update(*arguments)

    if step is None:
        run.optimizer.step = captured  # type: ignore[method-assign]
    outcome = Outcome([], [], math.nan, gradients, {})
    for _ in range(STEPS):
        data = run.loader.step(run.state.data_position)
        rate = run.schedule(run.state.global_step)
        measured = (step or train_step)(run, data, rate).read("step values")
        run.state.advance(data.samples, data.input_tokens)
        outcome.losses.append(measured[LOSS])
        outcome.norms.append(measured[GRADIENT_NORM])
    outcome.eval_loss = _evaluate(run)
    outcome.parameters = _pieces(run.weights())
    run.loader.close()
    return outcome


def _evaluate(run: Any) -> float:
    from launcher.train.evaluate import evaluate

    if run.model.preference is not None:
        return math.nan  # its evaluation needs more than batches
    data = run.loader.step(0)
    return evaluate(run.model, data.batches, run.world, run.loader.source_names).loss


def _gradients(run: Any) -> Pieces:
    from launcher.parallel.apply import shards
    from launcher.weights.tensor_mapping import mapped

    tensors = {
        n: p.grad for n, p in run.model.parts.named_parameters().items() if p.grad is not None
    }
    held = shards(tensors, run.model.layout, run.world.rank)
    return _pieces(mapped(held, run.model.mappings_of))


def _pieces(held: Mapping[str, Any]) -> Pieces:
    return {
        name: (shard.shape, shard.box.offset, shard.tensor.float().cpu().numpy().copy())
        for name, shard in held.items()
    }


def assert_equal(
    case: Case, outcomes: Sequence[Outcome], reference: Outcome, tolerance: float = TOLERANCE
) -> None:
    """Losses, every gradient of every step and every parameter agree with one process."""
    for rank, outcome in enumerate(outcomes):
        assert not outcome.error, f"{case}, rank {rank}:\n{outcome.error}"
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, reference.losses, rtol=tolerance)
        np.testing.assert_allclose(outcome.norms, reference.norms, rtol=10 * tolerance)
        np.testing.assert_allclose(outcome.eval_loss, reference.eval_loss, rtol=tolerance)
    for step in range(STEPS):
        mine = [outcome.gradients[step] for outcome in outcomes]
        _assert_pieces(f"{case}: gradients of step {step}", mine, reference.gradients[step],
                       tolerance)  # fmt: skip
    mine = [outcome.parameters for outcome in outcomes]
    _assert_pieces(f"{case}: parameters", mine, reference.parameters, tolerance)


def _assert_pieces(what: str, held: Sequence[Pieces], reference: Pieces, tolerance: float) -> None:
    worst, culprit = 0.0, ""
    for name, (shape, _, expected) in reference.items():
        seen = np.zeros(shape, dtype=bool)
        scale = max(float(np.abs(expected).max()), 1e-30)
        for pieces in held:
            if name not in pieces:
                continue
            _, offset, values = pieces[name]
            place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
            seen[place] = True
            if values.size:
                assert np.isfinite(values).all(), f"{what}: {name} is not finite"
                error = float(np.abs(values - expected[place]).max()) / scale
                if error > worst:
                    worst, culprit = error, name
        assert seen.all(), f"{what}: no rank holds all of {name}"
    assert worst <= tolerance, f"{what}: {culprit} differs by {worst:.2e} of its largest"
