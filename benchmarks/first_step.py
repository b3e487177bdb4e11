"""From the start of the command to the end of the first training step, against Trainer.

    python -m benchmarks.first_step [--rounds 9] [--threads 2] [--write]

The job is that of `benchmarks/jobs.py` with packed text, 8 rows of 128 tokens. Nothing is kept
between runs: text is tokenised every time. Once with the whole corpus of the quickstart (9 MB),
once with its held-out files alone (0.2 MB), where little is left but starting up.
"""

from __future__ import annotations

from functools import partial

from benchmarks.jobs import Command, Job, quickstart_data, slipway, step_ends, trainer
from benchmarks.measure import Spread, in_turns, parser, ratios, report, table


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.first_step", __doc__, rounds=9)
    arguments_parser.add_argument("--threads", type=int, default=2, help="of torch's kernels")
    arguments = arguments_parser.parse_args()
    data = quickstart_data()
    jobs = {
        name: Job(source=data / folder, batch_size=8, seq_length=128, steps=1)
        for name, folder in {"whole corpus": "train", "held-out files": "heldout"}.items()
    }
    rows = []
    for name, job in jobs.items():
        commands: dict[str, Command] = {"Slipway": slipway, "Trainer": trainer}
        seconds = in_turns(
            {
                tool: partial(first_step, command, job, arguments.threads)
                for tool, command in commands.items()
            },
            arguments.rounds,
        )
        ratio = ratios(seconds["Slipway"], seconds["Trainer"])
        rows.append((name, *(Spread.of(values).text() for values in seconds.values()),
                     ratio.text()))  # fmt: skip
    header = ("text", "Slipway, seconds", "Trainer, seconds", "ratio (below 1: Slipway is faster)")
    report("First step", "benchmarks.first_step", arguments, table(header, rows))


def first_step(command: Command, job: Job, threads: int) -> float:
    """Seconds to the end of step 1."""
    return step_ends(command, job, threads)[0]


if __name__ == "__main__":
    main()
