"""Loading, writing, merging and slicing weights: against raw reads and writes, and against peers.

    python -m benchmarks.weights [--what load write tools] [--sizes 2 8] [--ranks 1 4] [--rounds 5]
                                 [--systems Slipway raw ...] [--folder DIR] [--write]

Every figure comes from freshly forked processes that have imported all they need (`forks.py`), in
turns. Loading ends when every byte of every parameter is resident: what maps files is touched page
by page. Writing ends with fsync. `raw` reads or writes the same number of bytes in long portions
and knows nothing of tensors. A cold cache is made with posix_fadvise; a warm one is what a cold
load of ours leaves, for the system keeps a file in pages as large as whoever read it first asked
for. The memory that a measure asks for is at hand (`forks.py`). Each process loads a small model of
the same kind before the clock starts: a fork gets a copy of a page of the interpreter when it first
touches it, which a process that began by itself does not pay. Weights of other sizes leave the page
cache, so that "warm" ones and what is loaded find room beside each other.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.checkpoints import CONFIGS, SMALL, make
from benchmarks.forks import Measured, forget, measure
from benchmarks.measure import Spread, parser, ratios, report, table
from benchmarks.peers import loading, storing

MODULE = "benchmarks.weights"
SYSTEMS = ("Slipway", "raw", "transformers", "DCP")
"""Ways to load; all are measured unless some are named."""
Measure = Callable[[], Measured]
GIGABYTE = 10**9
ROOM = 3
"""Memory that is at hand for a measure, by the size of the weights: theirs, that of their files in
the page cache, and what peers copy on the way."""


def in_turns(measures: Mapping[str, Measure], rounds: int) -> dict[str, list[Measured]]:
    """`rounds` values of each, one after the other, the order turning by one each round."""
    found: dict[str, list[Measured]] = {name: [] for name in measures}
    names = list(measures)
    for number in range(rounds):
        turned = names[number % len(names) :] + names[: number % len(names)]
        for name in turned:
            found[name].append(measures[name]())
        latest = ", ".join(f"{name} {taken[-1].seconds:.2f}" for name, taken in found.items())
        print(f"  round {number + 1}/{rounds}: {latest}", flush=True)
    return found


def rows_of(label: Sequence[str], found: dict[str, list[Measured]], ours: str) -> list[list[str]]:
    """A table row for each system: seconds, ours divided by it, peak memory."""
    seconds = {name: [m.seconds for m in taken] for name, taken in found.items()}
    return [
        [
            " ".join(label), name, Spread.of(seconds[name]).text(),
            "" if name == ours else ratios(seconds[ours], seconds[name]).text(),
            f"{statistics.median(m.peak_bytes for m in taken) / 1e6:,.0f}",
        ]
        for name, taken in found.items()
    ]  # fmt: skip


HEADER = ("what", "system", "seconds", "Slipway / system (below 1: Slipway is faster)",
          "peak memory of a rank, MB")  # fmt: skip


def load(
    folder: Path, sizes: Sequence[int], worlds: Sequence[int], rounds: int,
    systems: Sequence[str] = SYSTEMS,
) -> str:  # fmt: skip
    """The table of loading; re-slicing is measured where all of `systems` are."""
    rows = []
    for kind, size in CONFIGS:
        if size not in sizes:
            continue
        source = folder / f"{kind}{size}"
        make(source, CONFIGS[kind, size])
        make(small_one(source), SMALL[kind])
        forget(other for other in folder.iterdir() if other != source)
        for ranks in worlds:
            for cache in ("warm", "cold"):
                label = (kind, f"{size} GB,", f"{ranks} rank{'s' * (ranks > 1)},", cache)
                print(*label)
                measures = {
                    name: partial(one_load, name, source, ranks, cold=cache == "cold")
                    for name in systems
                }
                if cache == "warm":  # as a first load of the same job leaves it, for all systems
                    one_load("Slipway", source, ranks, cold=True)
                rows += rows_of(label, in_turns(measures, rounds), "Slipway")
        if len(systems) == len(SYSTEMS):
            rows += reshard(folder, kind, size, rounds)
    return table(HEADER, rows)


def one_load(name: str, source: Path, ranks: int, *, cold: bool = False) -> Measured:
    """One load by the system `name`, behind one of `small_one(source)`."""
    if cold:
        forget([source])
    loader = loading.LOADERS[name]
    return measure(
        lambda _, rank, count: loader(source, rank, count), ranks,
        group=ranks > 1 and loading.is_group_needed(name),
        before=lambda rank, count: loader(small_one(source), rank, count),
        at_hand=ROOM * sum(path.stat().st_size for path in source.rglob("*.safetensors")),
    )  # fmt: skip


def small_one(source: Path) -> Path:
    """Where the small model of the kind of `source` lies."""
    return source.with_name(f"{source.name}-small")


def reshard(folder: Path, kind: str, size: int, rounds: int) -> list[list[str]]:
    """From four ranks that share parameters by rows to four that are tensor parallel."""
    saved = folder / f"{kind}{size}-sharded"
    storing.make_sharded(saved, CONFIGS[kind, size])
    storing.make_sharded(small_one(saved), SMALL[kind])
    names = ("Slipway re-sliced", "DCP re-sharded")
    found = in_turns({name: partial(one_load, name, saved, 4) for name in names}, rounds)
    shutil.rmtree(saved)
    shutil.rmtree(small_one(saved))
    return rows_of((kind, f"{size} GB,", "4 shards to 4 tensor-parallel ranks"), found, names[0])


def write(folder: Path, sizes: Sequence[int], worlds: Sequence[int], rounds: int) -> str:
    """The table of writing, on disk and in memory."""
    forget([folder])
    rows = []
    places = {"disk": folder, "tmpfs": Path("/dev/shm")}
    for size in sizes:
        for place, root in places.items():
            if place == "tmpfs" and size > 2:
                continue  # in memory it would stand beside the model itself
            for ranks in worlds:
                label = (f"{size} GB,", f"{ranks} rank{'s' * (ranks > 1)},", place)
                print(*label)
                measures = {
                    name: partial(one_write, name, root, size, ranks) for name in storing.WRITERS
                }
                rows += rows_of(label, in_turns(measures, rounds), "Slipway")
    return table(HEADER, rows)


def one_write(name: str, root: Path, size: int, ranks: int) -> Measured:
    """One save by the system `name` of the dense model of `size` gigabytes; the tensors are in
    memory before the clock starts."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        state = partial(storing.state, CONFIGS["dense", size])
        run = partial(storing.WRITERS[name], Path(folder))
        return measure(
            run, ranks, group=ranks > 1 and name == "DCP", before=state,
            at_hand=ROOM * size * GIGABYTE,
        )  # fmt: skip


def tools(folder: Path, sizes: Sequence[int], rounds: int) -> str:
    """The table of the offline tools."""
    forget([folder])
    rows = []
    for size in sizes:
        config = CONFIGS["dense", size]
        complete = folder / f"dense{size}"
        make(complete, config)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            jobs = storing.tool_jobs(Path(scratch), complete, config)
            for label, names in storing.TOOL_GROUPS.items():
                print(label)
                at_hand = ROOM * size * GIGABYTE
                measures = {name: partial(measure, jobs[name], 1, at_hand=at_hand)
                            for name in names}  # fmt: skip
                rows += rows_of((f"{size} GB,", label), in_turns(measures, rounds), names[0])
    return table(HEADER, rows)


def main() -> None:
    """Measure and print; see the module's text."""
    made = parser(MODULE, __doc__, rounds=5)
    made.add_argument("--what", nargs="+", default=["load", "write", "tools"])
    made.add_argument("--sizes", nargs="+", type=int, default=[2])
    made.add_argument("--ranks", nargs="+", type=int, default=[1, 4])
    made.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "weights-bench")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    loading.import_all()
    sizes, worlds, rounds = arguments.sizes, arguments.ranks, arguments.rounds
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if "load" in arguments.what:
        body = load(arguments.folder, sizes, worlds, rounds, arguments.systems)
        large = f", {' and '.join(map(str, sizes))} GB" if sizes != [2] else ""
        report(f"Loading weights{large}", MODULE, arguments, body)
    if "write" in arguments.what:
        body = write(arguments.folder, sizes, worlds, rounds)
        report("Writing weights", MODULE, arguments, body)
    if "tools" in arguments.what:
        report("Merging and slicing", MODULE, arguments, tools(arguments.folder, sizes, rounds))


if __name__ == "__main__":
    main()
