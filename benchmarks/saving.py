"""Saving beside training: how long a step waits, how long a save takes, what steps cost meanwhile.

    python -m benchmarks.saving [--rounds 7] [--megabytes 512] [--folder DIR] [--write]

One process, one rank. The state is as many tensors as a small model and its AdamW moments have. A
plain copy of the state is the floor of the time a step waits; `torch.distributed.checkpoint`
(async_save, thread, default staging) is the peer. A save ends when it can be resumed from: ours is
durable and published then, that of the peer durable. Steps are matrix products on one thread, on a
machine whose other core is free for the writer.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.measure import Spread, parser, ratios, report, table
from launcher.checkpoint.monitor import CheckpointMonitor
from launcher.checkpoint.savable import Origin
from launcher.config.schema import CheckpointMonitorSection
from launcher.layout.box import Shape, full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.world import World

MODULE = "benchmarks.saving"
TENSORS = 96
STEPS = 20
SAVES_IN_A_ROW = 20


@dataclass
class Run:
    """What CheckpointMonitor asks of a run, without the training."""

    output_dir: Path
    state: dict[str, torch.Tensor]
    world: World = field(default_factory=lambda: World(0, 1, torch.device("cpu")))
    mesh: Mesh = field(default_factory=Mesh)
    steps_per_epoch: int = 10**6
    total_steps: int = 10**6
    sink_size: int = 1
    origin: Origin = field(default_factory=Origin)
    global_step: int = 0
    is_consistent: bool = True

    def weights(self) -> dict[str, Shard]:
        return {n: Shard(tuple(t.shape), full_box(t.shape), t) for n, t in self.state.items()}

    def state_names(self) -> dict[str, tuple[str, ...]]:
        return {}

    def optimizer_state(self) -> dict[str, Shard]:
        return {}

    def state_itemsize(self, weight_itemsize: int) -> int:
        return weight_itemsize

    def replica_ranks(self) -> dict[str, Any]:
        return {}

    def shapes_in_files(self, *, optimizer: bool) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def state_record(self) -> dict[str, Any]:
        return {"global_step": self.global_step}

    def add_pending_read(self, wait: Callable[[], None]) -> None:
        pass  # nothing changes the state

    def write_model_files(self, directory: Path) -> None:
        pass

    def log(self, text: str) -> None:
        if "not saved" in text or "is saved, but" in text:
            raise RuntimeError(text)


class Ours:
    """CheckpointMonitor with async_save."""

    def __init__(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        self.run = Run(folder, state)
        options = CheckpointMonitorSection(async_save=True, keep_checkpoint_max=1)
        self.monitor = CheckpointMonitor(options)
        self.monitor.on_train_begin(self.run)

    def begin(self) -> None:
        self.run.global_step += 1
        self.monitor.on_steps_end(self.run, [])

    def is_done(self) -> bool:
        return not self.monitor.is_writing

    def end(self) -> None:
        self.monitor.on_train_end(self.run)


class Peer:
    """torch.distributed.checkpoint.async_save."""

    def __init__(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        self.folder, self.state, self.count = folder, state, 0
        self.future: Any = None

    def begin(self) -> None:
        self.count += 1
        target = self.folder / f"step{self.count % 2}"
        future = dcp.async_save(
            self.state, storage_writer=dcp.FileSystemWriter(target, overwrite=True)
        )
        self.future = getattr(future, "upload_completion", future)

    def is_done(self) -> bool:
        done: bool = self.future.done()
        return done

    def end(self) -> None:
        self.future.result()


def step() -> float:
    """Seconds of one step of work."""
    a = step.a  # type: ignore[attr-defined]
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    return time.perf_counter() - started


step.a = torch.randn(768, 768)  # type: ignore[attr-defined]


def waited_and_total(saver: Ours | Peer) -> tuple[float, float, float]:
    """Seconds that a step waits for a save, that the save takes, and the median step meanwhile."""
    started = time.perf_counter()
    saver.begin()
    waited = time.perf_counter() - started
    steps = [step()]
    while not saver.is_done():
        steps.append(step())
    saver.end()
    return waited, time.perf_counter() - started, statistics.median(steps)


def resident() -> int:
    """Resident memory of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def plain_copy(state: dict[str, torch.Tensor]) -> Callable[[], float]:
    """A function that copies the state into memory that is there, and gives the seconds it took."""
    copies = {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    def copy() -> float:
        started = time.perf_counter()
        for name, tensor in state.items():
            copies[name].copy_(tensor)
        return time.perf_counter() - started

    return copy


def main() -> None:
    """Measure and print; see the module's text."""
    made = parser(MODULE, __doc__, rounds=7)
    made.add_argument("--megabytes", type=int, default=512)
    made.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = made.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rows = arguments.megabytes * 10**6 // TENSORS // 4 // 1024
    state = {f"t{i}": torch.randn(rows, 1024) for i in range(TENSORS)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        ours, peer = Ours(Path(folder) / "ours", state), Peer(Path(folder) / "peer", state)
        copy = plain_copy(state)
        found: dict[str, list[float]] = {}
        for number in range(-1, arguments.rounds):
            taken = {"copy": copy(), "step": statistics.median(step() for _ in range(STEPS))}
            for name, saver in (("ours", ours), ("peer", peer)):
                values = waited_and_total(saver)
                taken |= dict(zip((f"{name} waited", f"{name} took", f"{name} step"), values,
                                  strict=True))  # fmt: skip
            if number >= 0:  # the first round allocates
                for name, value in taken.items():
                    found.setdefault(name, []).append(value)
            print(", ".join(f"{name} {value:.3f}" for name, value in taken.items()), flush=True)
        before = resident()
        for _ in range(SAVES_IN_A_ROW):
            ours.begin()
        ours.end()
        growth = resident() - before
    dist.destroy_process_group()
    report("Saving beside training", MODULE, arguments, text(found, arguments.megabytes, growth))


def text(found: dict[str, list[float]], megabytes: int, growth: int) -> str:
    """The section of the page."""
    lines = []
    for what, ours, other, name in (
        ("a step waits", "ours waited", "copy", "plain copy of the state"),
        ("a step waits", "ours waited", "peer waited", "DCP async_save"),
        ("a save takes", "ours took", "peer took", "DCP async_save"),
        ("a step while it is written", "ours step", "step", "a step alone"),
        ("a step while it is written", "ours step", "peer step", "DCP async_save"),
    ):
        lines.append(
            [what, Spread.of(found[ours]).text(".3f"), name, Spread.of(found[other]).text(".3f"),
             ratios(found[ours], found[other]).text()]
        )  # fmt: skip
    body = table(("what", "Slipway, seconds", "against", "seconds", "ratio"), lines)
    return (
        f"A state of {megabytes} MB in {TENSORS} tensors, on disk.\n\n{body}\n\n"
        f"{SAVES_IN_A_ROW} saves in a row: resident memory grew by {growth / 1e6:,.1f} MB."
    )


if __name__ == "__main__":
    main()
