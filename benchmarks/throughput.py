"""Tokens per second of training steps, against Trainer.

    python -m benchmarks.throughput [--rounds 9] [--threads 1 2] [--rows 8 4] [--write]

The job is that of `benchmarks/jobs.py`, in rows of 128 and of 512 tokens, with one and two threads.
Three comparisons:

    plain rows       one document a row, no padding: causal attention on both sides
    kept apart       packed text, attention inside documents on both sides
    packed           packed text, kept apart by Slipway, mixed by Trainer (what each does unasked)

Time runs from the end of the warm-up to the end of the last step and holds everything a user waits
for: data, step, clipping, update, callbacks, progress and metrics as each tool has them by itself.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from benchmarks.jobs import Command, Job, full_rows, quickstart_data, slipway, step_ends, trainer
from benchmarks.measure import Spread, in_turns, parser, ratios, report, table

WARMUP_STEPS = 4
SHAPES = {(8, 128): 16, (4, 512): 8}
"""(rows, tokens a row) of a step to the number of steps that are measured."""
HEADER = ("job", "Slipway, tokens/s", "Trainer, tokens/s", "ratio (above 1: Slipway is faster)")


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.throughput", __doc__, rounds=9)
    arguments_parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments_parser.add_argument(
        "--rows", type=int, nargs="+", default=[shape[0] for shape in SHAPES], help="8: 8 x 128; 4"
    )
    arguments = arguments_parser.parse_args()
    packed = quickstart_data() / "heldout"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plain = full_rows(Path(folder, "rows.jsonl"), count=200)
        for threads in arguments.threads:
            for shape in (shape for shape in SHAPES if shape[0] in arguments.rows):
                rows += compare(shape, threads, arguments.rounds, plain, packed)
    report("Throughput", "benchmarks.throughput", arguments, table(HEADER, rows))


def compare(
    shape: tuple[int, int], threads: int, rounds: int, plain: Path, packed: Path
) -> list[tuple[str, ...]]:
    """The three lines of one shape and number of threads; all five processes run in turns."""
    batch_size, seq_length = shape
    steps = WARMUP_STEPS + SHAPES[shape]

    def measure(command: Command, source: Path, *, apart: bool = False) -> partial[float]:
        job = Job(source=source, batch_size=batch_size, seq_length=seq_length, steps=steps,
                  separate_documents=apart)  # fmt: skip
        return partial(tokens_per_second, command, job, threads)

    speed = in_turns(
        {
            "Slipway plain": measure(slipway, plain),
            "Trainer plain": measure(trainer, plain),
            "Slipway packed": measure(slipway, packed, apart=True),
            "Trainer apart": measure(trainer, packed, apart=True),
            "Trainer mixed": measure(trainer, packed),
        },
        rounds,
        warm_up=False,  # each process warms itself up
    )
    job = f"{batch_size} x {seq_length}, {threads} thread{'s' if threads > 1 else ''}"
    return [
        (
            f"{job}: {name}",
            Spread.of(speed[ours]).text(",.0f"),
            Spread.of(speed[theirs]).text(",.0f"),
            ratios(speed[ours], speed[theirs]).text(),
        )
        for name, ours, theirs in (
            ("plain rows", "Slipway plain", "Trainer plain"),
            ("kept apart", "Slipway packed", "Trainer apart"),
            ("packed", "Slipway packed", "Trainer mixed"),
        )
    ]


def tokens_per_second(command: Command, job: Job, threads: int) -> float:
    """Over all steps behind the warm-up."""
    ends = step_ends(command, job, threads)
    measured = ends[WARMUP_STEPS - 1 :]
    tokens = job.batch_size * job.seq_length * (len(measured) - 1)
    return tokens / (measured[-1] - measured[0])


if __name__ == "__main__":
    main()
