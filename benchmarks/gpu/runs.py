"""Training runs of this launcher in this process, on random tokens.

Owns the way from a few keys to a `TrainRun`, by the code that a job takes: the configuration is
read and checked, files of tokens are opened by their loader, `build_run` builds. Only the weights
are filled here, on the device, since initialising 8B from a seed takes longer than measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.driver import Bench
from benchmarks.gpu.sizes import Training
from launcher.builders.job import Job
from launcher.builders.run import build_run
from launcher.builders.start import chosen_kernels
from launcher.config import rules
from launcher.config.nodes import from_plain
from launcher.config.resolve import read_tree
from launcher.data.loader import StepData
from launcher.errors import UserError
from launcher.parallel.local import local
from launcher.parallel.world import World
from launcher.report.console import Console
from launcher.train.run import TrainRun
from launcher.train.step import LOSS, micro_batch_of, train_step

END_OF_DOCUMENT = 0
ROWS = 64
"""Of a file of tokens."""
DOCUMENTS_PER_ROW = 8
"""About as many, of random lengths."""
LEARNING_RATE = 1e-5


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged section by section."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        result[key] = merged(inner, value) if both else value
    return result


def job_of(world: World, plain: dict[str, Any]) -> Job:
    """A job of a configuration, checked as that of a YAML file is. Raises `UserError`."""
    resolved = read_tree(from_plain(plain, "benchmark"))
    found = rules.check(
        resolved.config, resolved.provenance, world=world.size, bad_keys=resolved.bad_keys
    )
    if problems := (*resolved.problems, *found):
        raise UserError(problems)
    return Job(resolved.config, resolved.provenance, world, Console(enabled=False))


@contextmanager
def training_run(
    bench: Bench, size: Training, *, packed: bool, keys: dict[str, Any] | None = None,
    world: World | None = None,
) -> Iterator[TrainRun]:  # fmt: skip
    """A run at step 0 with random weights that are equal in each such run on a device.

    `packed`: rows of several documents, kept apart; else each row is one. `keys` are merged over
    the configuration. Raises `UserError`.
    """
    world = bench.world if world is None else world
    plain: dict[str, Any] = {
        "run_mode": "train",
        "output_dir": str(bench.folder / "output"),
        "model": {"model_config": dict(size.model)},
        "train_dataset": {
            "data_loader": {
                "type": "TokenFileDataLoader",
                "dataset_dir": str(tokens_file(bench, size, packed=packed)),
                **({"eod_token_id": END_OF_DOCUMENT} if packed else {}),
            },
            "seq_length": size.length,
            "packing": packed,
        },
        "runner_config": {"batch_size": size.rows, "max_steps": 1000},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "weight_decay": 0.1},
        "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": LEARNING_RATE},
        "context": {"device_target": "CPU" if world.device.type == "cpu" else "GPU"},
    }
    job = job_of(world, merged(plain, keys or {}))
    with chosen_kernels(job):
        run = build_run(job)
        fill(run)
        try:
            yield run
        finally:
            run.loader.close()


def tokens_file(bench: Bench, size: Training, *, packed: bool) -> Path:
    """A file of random tokens for rows of the length of `size`, the same for any batch."""
    vocabulary, rows = size.model["vocab_size"], ROWS
    kind = "packed" if packed else "rows"
    path = bench.folder / f"{kind}_{vocabulary}_{size.length}.npy"
    if path.exists():
        return path
    generator = np.random.default_rng(0)
    shape = (rows * size.length + 1,) if packed else (rows, size.length + 1)
    tokens = generator.integers(1, vocabulary, shape, dtype=np.uint32)
    if packed:
        ends = generator.random(len(tokens)) < DOCUMENTS_PER_ROW / size.length
        tokens[ends] = END_OF_DOCUMENT
    np.save(path, tokens)
    return path


@torch.no_grad()
def fill(run: TrainRun) -> None:
    """Random weights, drawn on the device: normal ones, ones for norms, zeros for biases."""
    generator = torch.Generator(run.world.device).manual_seed(0)
    for name, parameter in run.model.parts.all_named():
        fill_parameter(name, local(parameter), generator)


def fill_parameter(name: str, values: Tensor, generator: torch.Generator) -> None:
    """As `fill`, for one parameter."""
    if values.dim() > 1:
        values.normal_(0.0, 0.02, generator=generator)
    else:
        values.fill_(0.0 if name.endswith("bias") else 1.0)


def next_data(run: TrainRun) -> StepData:
    """The data of the next step."""
    return run.loader.step(run.state.data_position)


def do_steps(run: TrainRun, count: int) -> tuple[int, float]:
    """`count` steps, each read as the loop reads it: when its gradients are known. Returns the
    number of tokens, and the loss of the last step."""
    tokens, loss = 0, 0.0
    for _ in range(count):
        data = next_data(run)
        measured = train_step(run, data, LEARNING_RATE)
        run.state.advance(data.samples, data.input_tokens)
        tokens += data.input_tokens
        loss = measured.read("step values")[LOSS]
    return tokens, loss


def gradients(run: TrainRun, data: StepData) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step and this rank's gradients, by the calls of `train_step` before it clips;
    nothing is updated."""
    run.model.parts.train()
    targets = max(data.target_tokens, 1)
    batches = [micro_batch_of(run, batch) for batch in data.batches]
    loss = run.model.compute.train(batches, 1.0 / targets)
    run.gradients.finish()
    found = {
        name: local(parameter.grad).clone()
        for name, parameter in run.model.parts.all_named()
        if parameter.grad is not None
    }
    run.optimizer.zero_grad()
    return float(loss) / targets, found
