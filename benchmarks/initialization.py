"""Random initial weights: seconds for a model, on one thread and on several.

    python -m benchmarks.initialization [--rounds 5] [--threads 2] [--millions 100] [--write]

Values are the same in both cases. `resident` is what the process grew by beyond the parameters
themselves while they were drawn: no full tensor is held beside them. With `--device cuda` they are
drawn in pinned blocks and copied beside the drawing.
"""

from __future__ import annotations

import resource
import time
from functools import partial

import torch

from benchmarks.measure import Spread, in_turns, parser, ratios, report, table
from launcher.layout.box import full_box
from launcher.layout.shard import Shard
from models.families import model_spec
from models.initialize import fill_initial

MODULE = "benchmarks.initialization"
WIDTH = 2048


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    made = parser(MODULE, __doc__, rounds=5)
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--millions", type=int, default=100, help="of parameters")
    made.add_argument("--device", default="cpu")
    arguments = made.parse_args()
    rows = arguments.millions * 10**6 // WIDTH // 4
    held = {
        f"model.layers.{layer}.mlp.up_proj.weight": Shard(
            (rows, WIDTH), full_box((rows, WIDTH)),
            torch.zeros(rows, WIDTH, device=arguments.device),
        )
        for layer in range(4)
    }  # fmt: skip
    before = peak_megabytes()
    found = in_turns(
        {str(n): partial(seconds, held, n) for n in (1, arguments.threads)}, arguments.rounds
    )
    growth = peak_megabytes() - before
    one, several = found["1"], found[str(arguments.threads)]
    lines = [
        ("1", Spread.of(one).text(), ""),
        (str(arguments.threads), Spread.of(several).text(), ratios(one, several).text()),
    ]
    body = table(("threads", "seconds", "times as fast as one"), lines)
    text = (
        f"{arguments.millions} million parameters on {arguments.device}; resident: {growth:,.0f} MB"
    )
    report("Initial weights", MODULE, arguments, f"{text}\n\n{body}")


def seconds(held: dict[str, Shard], threads: int) -> float:
    """Seconds to fill all of it."""
    spec = model_spec({"type": "LlamaConfig", "hidden_size": WIDTH, "num_layers": 4}, None)
    started = time.perf_counter()
    fill_initial(held, spec, 0, threads=threads)
    return time.perf_counter() - started


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
