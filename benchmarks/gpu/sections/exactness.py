"""Whether results are what they should be: equal where they must be, near where they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.driver import Bench, Case, Figures
from benchmarks.gpu.runs import fill_parameter, gradients, next_data, training_run
from benchmarks.gpu.sizes import Training
from launcher.parallel.world import World
from models.build import build_model
from models.decoder import Decoder
from models.families import model_spec

BFLOAT16 = {"model": {"model_config": {"compute_dtype": "bfloat16"}}}
FLOAT32 = {"model": {"model_config": {"compute_dtype": "float32"}}}
Found = tuple[float, dict[str, Tensor]]
"""A loss, and gradients by the names of parameters."""


def repeat(bench: Bench) -> Iterator[Case]:
    """Two identical steps, in two runs: the same bits."""
    sizes = bench.sizes
    for name, size, packed in (
        ("rows", sizes.small, False),
        ("packed", sizes.small, True),
        ("experts", sizes.small_experts, True),
    ):
        yield Case(
            name, lambda size=size, packed=packed: twice(bench, size, packed=packed)
        )  # fmt: skip
    yield Case("float32 against the CPU", lambda: against_the_cpu(bench))


def keeping_less(bench: Bench) -> Iterator[Case]:
    """Keys that keep or order things differently, against a run without them."""
    ways: dict[str, dict[str, Any]] = {
        "recompute": {"recompute_config": {"recompute": True}},
        "select_recompute": {"recompute_config": {"select_recompute": True}},
        "swap": {"swap_config": {"swap": True}},
        "compile": {"compile": bench.sizes.compiler},
    }
    for name, keys in ways.items():
        yield Case(name, lambda keys=keys: against_plain(bench, keys))
    yield Case("interleave", lambda: interleaved(bench))


def documents(bench: Bench) -> Iterator[Case]:
    """A packed row against its documents alone."""
    yield Case("packed row against its documents", lambda: packed_row(bench))


def found_by(
    bench: Bench, size: Training, keys: Mapping[str, Any], *, packed: bool,
    world: World | None = None,
) -> Found:  # fmt: skip
    """Loss and gradients of the first step of a run with these keys."""
    with training_run(bench, size, packed=packed, keys=dict(keys), world=world) as run:
        return gradients(run, next_data(run))


def twice(bench: Bench, size: Training, *, packed: bool) -> Figures:
    """Differences between two runs."""
    first = found_by(bench, size, BFLOAT16, packed=packed)
    return compared(first, found_by(bench, size, BFLOAT16, packed=packed))


def against_plain(bench: Bench, keys: dict[str, Any]) -> Figures:
    """Differences to a run without `keys`, in which nothing is compiled."""
    plain = found_by(bench, bench.sizes.small, BFLOAT16 | {"compile": False}, packed=True)
    changed = BFLOAT16 | {"compile": False} | keys
    return compared(plain, found_by(bench, bench.sizes.small, changed, packed=True))


def interleaved(bench: Bench) -> Figures:
    """Two chunks again and again: a race between their streams would show in one of the steps."""
    half = Training(bench.sizes.small.model, bench.sizes.small.length, bench.sizes.small.rows // 2)
    keys = BFLOAT16 | {"compile": False}
    plain = found_by(bench, bench.sizes.small, keys, packed=True)
    keys = keys | {"micro_batch_interleave_num": 2}
    with training_run(bench, half, packed=True, keys=keys) as run:
        data = next_data(run)
        every = [gradients(run, data) for _ in range(bench.sizes.repeats)]
    same = sum(compared(every[0], other)["is_equal"] for other in every)
    return {
        **compared(plain, every[0]),
        "steps": len(every),
        "steps_equal_to_the_first": same,
    }


def against_the_cpu(bench: Bench) -> Figures:
    """float32 on the device and on the CPU, of two layers: differences in the order of sums."""
    model = bench.sizes.small.model | {"num_hidden_layers": 2, "vocab_size": 256}
    size = Training(model, min(bench.sizes.small.length, 256), 1)
    cpu = World(0, 1, torch.device("cpu"))
    with training_run(bench, size, packed=True, keys=FLOAT32, world=cpu) as run:
        data = next_data(run)
        there = gradients(run, data)
        weights = {n: p.detach().clone() for n, p in run.model.parts.all_named()}
    with training_run(bench, size, packed=True, keys=FLOAT32) as run, torch.no_grad():
        for name, parameter in run.model.parts.all_named():
            parameter.copy_(weights[name])
        with torch.enable_grad():
            here = gradients(run, next_data(run))
    return compared(there, here)


def compared(first: Found, second: Found) -> dict[str, Any]:
    """How far two steps are apart: equal to the bit, and the largest difference of a gradient as a
    share of its largest value."""
    (loss, one), (other_loss, two) = first, second
    assert one.keys() == two.keys()
    two = {name: gradient.to(one[name].device) for name, gradient in two.items()}
    worst = max(one, key=lambda name: _difference(one[name], two[name]))
    return {
        "is_equal": loss == other_loss and all(torch.equal(one[n], two[n]) for n in one),
        "loss": loss,
        "loss_difference": abs(loss - other_loss),
        "worst_gradient": worst,
        "gradient_difference": _difference(one[worst], two[worst]),
    }


def _difference(one: Tensor, two: Tensor) -> float:
    largest = float(one.abs().max())
    return float((one - two).abs().max()) / (largest or 1.0)


def packed_row(bench: Bench) -> Figures:
    """Logits of a row of seven documents twice, and of each document in a row of its own."""
    length, count = bench.sizes.documents_length, 7
    model = build_model(
        model_spec(bench.sizes.small.model, None), dtype=torch.bfloat16, device=bench.device
    )
    assert isinstance(model, Decoder)
    generator = torch.Generator(bench.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill_parameter(name, parameter, generator)
    ends = [length * (index + 1) // count for index in range(count)]
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    ids = torch.randint(1, 200, (1, length), device=bench.device, generator=generator)
    document_ids = torch.repeat_interleave(
        torch.arange(count, device=bench.device), torch.tensor(lengths, device=bench.device)
    )[None]
    positions = torch.cat([torch.arange(n, device=bench.device) for n in lengths])[None]
    model.train()
    with torch.no_grad(), nullcontext():
        packed = [
            model(ids, document_ids=document_ids, position_ids=positions) for _ in range(2)
        ]  # fmt: skip
        alone = torch.cat([model(part) for part in ids.split(lengths, 1)], 1)
    return {
        "is_repeated": torch.equal(packed[0], packed[1]),
        "difference": _difference(alone.float(), packed[0].float()),
        "documents": count,
        "length": length,
    }
