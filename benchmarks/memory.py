"""What is kept for the backward pass, with each way of keeping less.

    python -m benchmarks.memory [--rounds 3] [--rows 4] [--write]

The layers are those of `configs/quickstart.yaml`, in rows of 512 tokens, float32, on the CPU; the
logits and the loss are outside, as nothing here touches them. Four figures:

    kept       storages that the backward pass will need, each once, parameters apart: what stays on
               the device between forward and backward
    moved      what is in host memory instead
    peak       growth of the process over forward and backward; swapping copies nothing on a CPU, so
               it cannot be seen there
    seconds    of a forward and backward pass
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.measure import ROOT, Spread, parser, report, table
from launcher.config.schema.parallel import RecomputeSection, SwapSection
from launcher.parallel.offload import Swap, apply_offload, offloaded_parts
from launcher.parallel.recompute import apply_recompute, recompute_plan, recomputed_modules
from models.build import build_model, initialize
from models.decoder import Decoder
from models.families import model_spec
from models.stage import StageSplit

TOKENS = 512
MEGABYTE = 1 << 20
HEADER = ("configuration", "kept, MB", "moved, MB", "peak, MB", "seconds")
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "select_recompute: True": ({"select_recompute": True}, {}),
    "select_recompute: [mlp]": ({"select_recompute": ["mlp"]}, {}),
    "select_recompute: [self_attn, mlp]": ({"select_recompute": ["self_attn", "mlp"]}, {}),
    "recompute: [2], select_recompute: True": ({"recompute": [2], "select_recompute": True}, {}),
    "recompute: True": ({"recompute": True}, {}),
    "swap: True": ({}, {"swap": True}),
    "recompute: True, swap: True": ({"recompute": True}, {"swap": True}),
}
"""Name -> keys of recompute_config and of swap_config."""


@dataclass(frozen=True)
class Figures:
    """What one process saw; bytes and seconds."""

    kept: int
    moved: int
    peak: int
    seconds: float


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.memory", __doc__, rounds=3)
    arguments_parser.add_argument("--rows", type=int, default=4, help="rows of the batch")
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    found: dict[str, list[Figures]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in WAYS:
            found[way].append(in_a_process(way, arguments.rows))
        print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr)
    rows = [line(way, figures) for way, figures in found.items()]
    report("Memory", "benchmarks.memory", arguments, table(HEADER, rows))


def line(way: str, figures: list[Figures]) -> tuple[str, ...]:
    """The line of one way in the table."""
    peak = Spread.of([f.peak / MEGABYTE for f in figures])
    seconds = Spread.of([f.seconds for f in figures])
    kept, moved = figures[0].kept / MEGABYTE, figures[0].moved / MEGABYTE
    return way, f"{kept:,.1f}", f"{moved:,.1f}", peak.text(",.0f"), seconds.text()


def in_a_process(way: str, rows: int) -> Figures:
    """The figures of one way, from a fork of this process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sender.send(measure(way, rows))
    )
    process.start()
    figures: Figures = receiver.recv()
    process.join()
    return figures


def measure(way: str, rows: int) -> Figures:
    """The figures of one way, in this process, which must not have done another."""
    model, swap = quickstart(*WAYS[way])
    ids = torch.randint(model.config.vocab_size, (rows, TOKENS))
    model(ids[:1, :64]).sum().backward()  # warms up
    before, moved_before = peak_bytes(), swap.moved_bytes
    started = time.perf_counter()
    model(ids).sum().backward()
    seconds, peak = time.perf_counter() - started, peak_bytes() - before
    moved = swap.moved_bytes - moved_before
    return Figures(kept_bytes(model, ids), moved, peak, seconds)


def quickstart(recompute: dict[str, Any], swap: dict[str, Any]) -> tuple[Decoder, Swap]:
    """The layers of the quickstart model, keeping less in this way."""
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    spec = model_spec(config["model"]["model_config"], None)
    model = build_model(spec, dtype=torch.float32, device="cpu")
    assert isinstance(model, Decoder)
    initialize(model, spec, 0)
    model.ends = False
    layers = {int(number): layer for number, layer in model.model.layers.items()}
    whole = StageSplit((range(len(layers)),), (0,))
    again = recomputed_modules(layers, recompute_plan(RecomputeSection(**recompute), whole))
    apply_recompute(layers, again)
    moving = offloaded_parts(layers, SwapSection(**swap), again)
    return model, apply_offload(layers, moving, torch.device("cpu"))


def kept_bytes(model: Decoder, ids: Tensor) -> int:
    """Of all that a forward pass of `model` keeps and does not move, parameters apart."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        states = model(ids)
    total = sum_without(sizes, model.parameters())
    del states
    return total


def sum_without(sizes: dict[int, int], parameters: Iterable[Tensor]) -> int:
    """The sum of `sizes` by address, but for the memory of `parameters`."""
    apart = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    return sum(size for address, size in sizes.items() if address not in apart)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
