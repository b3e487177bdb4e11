"""Attention over packed rows: by documents against a mask, in peak memory and time.

    python -m benchmarks.packed_attention [--rounds 3] [--lengths 2048 4096 8192] [--write]

One layer of attention (8 heads of 64, 2 KV heads, float32) on the CPU, forward and backward, over
one row with documents of 1,000 tokens. `one document` is the row without documents, which scaled
dot product attention computes without a mask. Each figure is of a process of its own:

    peak       growth of the process over forward and backward, MB
    seconds    of both
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass

import torch

from benchmarks.measure import Spread, parser, report, table
from models.attention import AttentionMask, attend
from models.documents import document_lengths
from models.packed_attention import attend_documents

HEADS, KV_HEADS, SIZE = 8, 2, 64
DOCUMENT = 1000
WAYS = ("by documents", "with a mask", "one document")
MEGABYTE = 1 << 20
HEADER = ("tokens", "way", "peak, MB", "seconds")


@dataclass(frozen=True)
class Figures:
    """What one process saw; bytes and seconds."""

    peak: int
    seconds: float


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.packed_attention", __doc__, rounds=3)
    arguments_parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens of the row"
    )
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    cases = [(length, way) for length in arguments.lengths for way in WAYS]
    found: dict[tuple[int, str], list[Figures]] = {case: [] for case in cases}
    for number in range(arguments.rounds):
        for case in cases:
            found[case].append(in_a_process(*case))
        print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr)
    rows = [line(*case, figures) for case, figures in found.items()]
    report("Packed attention", "benchmarks.packed_attention", arguments, table(HEADER, rows))


def line(length: int, way: str, figures: list[Figures]) -> tuple[str, ...]:
    """The line of one case in the table."""
    peak = Spread.of([f.peak / MEGABYTE for f in figures])
    seconds = Spread.of([f.seconds for f in figures])
    return f"{length:,}", way, peak.text(",.0f"), seconds.text()


def in_a_process(length: int, way: str) -> Figures:
    """The figures of one case, from a fork of this process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sender.send(measure(length, way))
    )
    process.start()
    figures: Figures = receiver.recv()
    process.join()
    return figures


def measure(length: int, way: str) -> Figures:
    """The figures of one case, in this process, which must not have done another."""
    step(64, way)  # warms up
    before = peak_bytes()
    started = time.perf_counter()
    step(length, way)
    return Figures(peak_bytes() - before, time.perf_counter() - started)


def step(length: int, way: str) -> None:
    """Forward and backward over one row."""
    query, key, value = (
        torch.randn(1, heads, length, SIZE, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    ids = (torch.arange(length) // DOCUMENT)[None]
    if way == "one document":
        output = attend(query, key, value, None)
    elif way == "by documents":
        output = attend_documents(query, key, value, document_lengths(ids))
    else:
        mask = AttentionMask(length=length, total=length, device=ids.device, document_ids=ids)
        output = attend(query, key, value, mask.mask(None))
    output.sum().backward()


def peak_bytes() -> int:
    """The largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
