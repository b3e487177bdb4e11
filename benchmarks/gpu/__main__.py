"""Everything that a few minutes on one GPU can show, line by line.

    python -m benchmarks.gpu [--minutes 8] [--sections train_1b decode] [--output gpu.jsonl]
    python -m benchmarks.gpu --tiny --device cpu     the same code in seconds, on any machine

One process; every result is one JSON line on standard output, and in a file, as soon as it is
known. A case that fails is a line with `error`; nothing begins after the deadline. Measured beside
each other on the same device: training against a plain loop of PyTorch and, where it is installed,
torchtitan's own model; loading and decoding against transformers. The exit code is 1 if a case
failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.gpu.driver import Bench, Report, run_sections
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sizes import FULL, TINY
from launcher.parallel import world as worlds
from launcher.parallel.kernels import choose_kernels, set_variables

DEFAULT_OUTPUT = "gpu.jsonl"


def main(words: list[str] | None = None) -> int:
    """Run the sections. Returns the exit code."""
    started = time.perf_counter()
    options = arguments(words)
    chosen = [section for section in SECTIONS if section.name in options.sections]
    on_cuda = options.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        print("error: there is no CUDA device: add --tiny --device cpu", file=sys.stderr)
        return 2
    if on_cuda:
        set_variables(os.environ, deterministic="auto", expandable_segments=True)
    world = worlds.start(force_cpu=not on_cuda)
    if on_cuda:  # the rule of a job by default
        choose_kernels("auto", own_decoder=True, trains=True).apply()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=options.scratch))
        file = stack.enter_context(Path(options.output).open("w", encoding="utf-8"))
        report = Report(files=[sys.stdout, file], started=started)
        sizes = TINY if options.tiny else FULL
        bench = Bench(world=world, sizes=sizes, folder=Path(folder))
        run_sections(chosen, bench, report, minutes=options.minutes)
        report.add(
            "end", {"failed": report.failed, "minutes": (time.perf_counter() - started) / 60}
        )
    worlds.stop(world)
    return 1 if report.failed else 0


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [section.name for section in SECTIONS]
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing begins after these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: for a CPU")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="file of the lines")
    parser.add_argument("--scratch", help="folder for data, weights and checkpoints, 40 GB")
    options = parser.parse_args(words)
    output = Path(options.output)
    if output.is_dir() or not output.parent.is_dir():
        parser.error(f"--output {output}: must be a file in an existing directory")
    if options.scratch is not None and not Path(options.scratch).is_dir():
        parser.error(f"--scratch {options.scratch}: no such directory")
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g}: must be above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
