"""Memory of the head and the loss: all logits at once, and in chunks of tokens.

    python -m benchmarks.head_loss [--rounds 3] [--tokens 4096] [--dtype bfloat16] [--write]

A head of 512 x 32,768 on the CPU, its weights and states given: the growth of the process over the
loss and its backward pass, and the seconds these take. Each figure is of a process of its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import time

import torch

from benchmarks.measure import Spread, parser, report, table
from launcher.train.head_loss import HeadLoss
from launcher.train.loss import token_loss_sum
from models.layers import Linear

HIDDEN, VOCABULARY = 512, 32_768
CHUNKS = (0, 2048, 1024, 512, 256)
"""Tokens of a chunk; 0: all at once."""
MEGABYTE = 1 << 20
HEADER = ("tokens at a time", "logits of these, MB", "growth, MB", "seconds")


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.head_loss", __doc__, rounds=3)
    arguments_parser.add_argument("--tokens", type=int, default=4096)
    arguments_parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = arguments_parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    torch.set_num_threads(1)  # processes are forked
    rows = []
    for chunk in CHUNKS:
        found = [in_a_process(arguments.tokens, chunk, dtype) for _ in range(arguments.rounds)]
        at_once = (chunk or arguments.tokens) * VOCABULARY * dtype.itemsize / MEGABYTE
        growth, seconds = (Spread.of(column) for column in zip(*found, strict=True))
        rows.append((
            f"{chunk or arguments.tokens:,}{'' if chunk else ' (all)'}", f"{at_once:,.0f}",
            growth.text(",.0f"), seconds.text(),
        ))  # fmt: skip
    report("Head and loss", "benchmarks.head_loss", arguments, table(HEADER, rows))


def in_a_process(tokens: int, chunk: int, dtype: torch.dtype) -> tuple[float, float]:
    """Megabytes and seconds, from a fork of this process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sender.send(measure(tokens, chunk, dtype))
    )
    process.start()
    found: tuple[float, float] = receiver.recv()
    process.join()
    return found


def measure(tokens: int, chunk: int, dtype: torch.dtype) -> tuple[float, float]:
    """Megabytes and seconds of one backward pass, in this process."""
    torch.manual_seed(0)
    head = Linear(HIDDEN, VOCABULARY).to(dtype)
    torch.nn.init.normal_(head.weight, std=0.02)
    states = torch.randn(1, tokens, HIDDEN).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (1, tokens))
    step(head, states[:, :64], labels[:, :64], 32 if chunk else 0)  # warms up
    before, started = peak_bytes(), time.perf_counter()
    step(head, states, labels, chunk)
    return (peak_bytes() - before) / MEGABYTE, time.perf_counter() - started


def step(head: Linear, states: torch.Tensor, labels: torch.Tensor, chunk: int) -> None:
    """Loss and gradients."""
    if chunk:
        objective, _ = HeadLoss(head, token_loss_sum, chunk).objective(states, labels, 1e-3)
    else:
        objective = token_loss_sum(head(states), labels) * 1e-3
    torch.autograd.grad(objective, [states, head.weight])


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
