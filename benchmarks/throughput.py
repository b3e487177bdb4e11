"""Tokens per second of training steps, against Trainer.

    python -m benchmarks.throughput [--rounds 9] [--threads 2] [--rows 8 4] [--write]

The job is that of `benchmarks/jobs.py`, in rows of 128 and of 512 tokens. Four comparisons:

    plain rows       one document a row, no padding: causal attention on both sides
    kept apart       packed text, attention inside documents on both sides
    packed           packed text, kept apart by Slipway, mixed by Trainer (what each does unasked)
    compiled         plain rows, `compile: True` and `torch_compile=True`

All processes of a shape are started once and take turns, a block of steps each: a round is a block
of every process, and the first one, which is not counted, warms up and compiles. Time runs from the
start of a block to the end of its last step and holds everything a user waits for: data, step,
clipping, update, callbacks, progress and metrics as each tool has them by itself.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.jobs import Command, Job, full_rows, quickstart_data, slipway, trainer
from benchmarks.measure import Paced, Spread, in_turns, parser, ratios, report, table

SHAPES = {(8, 128): 8, (4, 512): 4}
"""(rows, tokens a row) of a step to the number of steps of a block."""
HEADER = ("job", "Slipway, tokens/s", "Trainer, tokens/s", "ratio (above 1: Slipway is faster)")


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.throughput", __doc__, rounds=9)
    arguments_parser.add_argument("--threads", type=int, nargs="+", default=[2])
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
    """The lines of one shape and number of threads."""
    batch_size, seq_length = shape
    steps = SHAPES[shape]

    def job(source: Path, *, apart: bool = False, compiled: bool = False) -> Job:
        # One block more than is asked for: nothing of the end of a run is in a round.
        return Job(
            source=source, batch_size=batch_size, seq_length=seq_length,
            steps=steps * (rounds + 2), separate_documents=apart, compiled=compiled, block=steps,
        )  # fmt: skip

    jobs: dict[str, tuple[Command, Job]] = {
        "Slipway plain": (slipway, job(plain)),
        "Trainer plain": (trainer, job(plain)),
        "Slipway packed": (slipway, job(packed, apart=True)),
        "Trainer apart": (trainer, job(packed, apart=True)),
        "Trainer mixed": (trainer, job(packed)),
        "Slipway compiled": (slipway, job(plain, compiled=True)),
        "Trainer compiled": (trainer, job(plain, compiled=True)),
    }
    with ExitStack() as stack:
        processes = {}
        for name, (command, what) in jobs.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            processes[name] = Paced(command(what, folder), folder, threads)
            stack.callback(processes[name].close)
        seconds = in_turns({name: each.block for name, each in processes.items()}, rounds)
    tokens = batch_size * seq_length * steps
    speed = {name: [tokens / taken for taken in each] for name, each in seconds.items()}
    text = f"{batch_size} x {seq_length}, {threads} thread{'s' if threads > 1 else ''}"
    return [
        (
            f"{text}: {name}",
            Spread.of(speed[ours]).text(",.0f"),
            Spread.of(speed[theirs]).text(",.0f"),
            ratios(speed[ours], speed[theirs]).text(),
        )
        for name, ours, theirs in (
            ("plain rows", "Slipway plain", "Trainer plain"),
            ("kept apart", "Slipway packed", "Trainer apart"),
            ("packed", "Slipway packed", "Trainer mixed"),
            ("compiled", "Slipway compiled", "Trainer compiled"),
        )
    ]


if __name__ == "__main__":
    main()
