"""Callbacks for this launcher (`register_path`) that set a run beside plain torch code.

`Turns` stops the clock every few steps and lets the peer train as many, in the same processes, on
the same tokens, from the same weights. `Memory` writes down what a run alone took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.plain import AXES, Batches, Trained, status
from launcher.parallel.local import local
from launcher.train.callbacks import Callback
from launcher.train.run import TrainRun
from launcher.train.step import StepRecord

TOLERANCE = 1e-3
"""How far, relatively, the losses of both may be apart at any step."""


class Taken(NamedTuple):
    """Seconds: on the clock, and of this process on a processor."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, start: Taken | None, run: TrainRun) -> Taken:
        """When every rank is here: what went by since `start`, or else since an unknown time."""
        run.world.barrier()
        now = cls(time.perf_counter(), time.process_time())
        return now if start is None else cls(now.wall - start.wall, now.cpu - start.cpu)


class Turns(Callback):
    """Rounds of `each` steps of the run and `each` of the peer, the order changing every round.

    Writes what both took, round by round, and their losses. The first round is the warm-up.
    """

    def __init__(self, job: str, each: int) -> None:
        self.job: dict[str, Any] = json.loads(Path(job).read_text())
        self.each = each
        self.ours: list[Taken] = []
        self.theirs: list[Taken] = []
        self.losses: list[float] = []
        self.peer_losses: list[float] = []

    def on_train_begin(self, run: TrainRun) -> None:
        self.peer: Trained = AXES[self.job["axis"]](self.job)
        self.batches = Batches(self.job)
        weights = {
            name: local(p).detach() for name, p in run.model.parts.named_parameters().items()
        }
        missing, unknown = self.peer.model.load_state_dict(weights, strict=False)
        assert not missing, missing
        assert not unknown, unknown
        self.started = Taken.since(None, run)

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        self.losses += [record.loss for record in records]
        if len(self.losses) % self.each:
            return
        self.ours.append(Taken.since(self.started, run))
        # O P P O O P P O: of two neighbours, each is first as often as the other.
        if len(self.ours) % 2:
            is_last = run.state.global_step >= run.total_steps
            for _ in range(1 if is_last else 2):
                self._peer_turn(run)
        self.started = Taken.since(None, run)

    def on_train_end(self, run: TrainRun) -> None:
        worst = max(abs(a - b) / b for a, b in zip(self.losses, self.peer_losses, strict=False))
        assert worst < TOLERANCE, f"losses differ by {worst:.1e}"
        result: dict[str, Any] = {"worst": worst, "losses": [self.losses, self.peer_losses]}
        for side in ("ours", "theirs"):
            turns = getattr(self, side)[1:]
            ranks = run.world.gather([turn.cpu for turn in turns])
            result[side] = [turn.wall for turn in turns]
            result[f"{side}_cpu"] = [sum(turn) for turn in zip(*ranks, strict=True)]
        if run.world.is_main:
            (Path(self.job["results"]) / "turns.json").write_text(json.dumps(result))

    def _peer_turn(self, run: TrainRun) -> None:
        started = Taken.since(None, run)
        for _ in range(self.each):
            self.peer_losses.append(self.peer.step(self.batches.batch(len(self.peer_losses))))
        self.theirs.append(Taken.since(started, run))


class Memory(Callback):
    """Writes [kB after the imports, kB at the peak] of each rank."""

    def __init__(self, job: str) -> None:
        # What a run imports later counts as imports too.
        import transformers  # noqa: F401
        from transformers import AutoTokenizer  # noqa: F401

        self.job: dict[str, Any] = json.loads(Path(job).read_text())
        self.before = status("VmRSS")

    def on_train_end(self, run: TrainRun) -> None:
        result = Path(self.job["results"]) / f"ours_{run.world.rank}.json"
        result.write_text(json.dumps([self.before, status("VmHWM")]))
