"""How long the ranks of a pipeline wait, for each schedule.

    python -m benchmarks.bubble [--ranks 4] [--micro_batches 8 16 32] [--costs F B I W]
                                [--png pipelines.png] [--rounds 15] [--write]

Nothing is sent. Each schedule of torch runs with stages that only write down what they are told to
do; these lists are then replayed with the cost of each operation on one layer, measured here or
given by --costs in any unit: forward, whole backward, and the two parts of a backward pass that is
done apart, gradients of inputs and of weights. A rank does one thing at a time, in its order; a
forward waits for that of the stage before, a backward for that of the stage behind; messages take
no time. The first stage has no inputs to make gradients of: its whole backward is done late.

bubble: the share of the time that ranks wait. formula: the same as textbooks have it, for equal
stages. step: the whole time, over that of work without any waiting and with undivided backward
passes; it is what counts, because parts of a backward pass may cost more than the whole.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed.pipelining._backward import (
    stage_backward,
    stage_backward_input,
    stage_backward_weight,
)

from benchmarks.measure import parser, report, table
from launcher.parallel.schedules import SCHEDULES, broken_rule, build_schedule
from models.decoder import Decoder
from models.families import model_spec
from models.stage import stage_rank

PER_RANK = {"gpipe": (1, 2), "1f1b": (1,), "interleaved_1f1b": (2, 4),
            "interleaved_zero_bubble": (1, 2), "zero_bubble_v": (2,)}  # fmt: skip
"""Numbers of stages a rank that are shown."""
MODEL = {"type": "Qwen3Config", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704,
         "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "head_dim": 64}  # fmt: skip
ROWS, LENGTH = 2, 256
"""Of the micro-batch that is measured."""
COLOURS = {"F": "#4c78a8", "B": "#f58518", "I": "#e45756", "W": "#72b7b2"}
WIDTH = 96
"""Characters of a timeline."""


@dataclass(frozen=True)
class Costs:
    """Time of one layer and micro-batch, in any unit."""

    forward: float
    backward: float
    inputs: float
    weights: float

    def of(self, kind: str, stage: int) -> float:
        """Of an operation of a stage with one layer."""
        if stage == 0 and kind in "IW":
            return 0.0 if kind == "I" else self.backward
        return {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weights}[kind]


@dataclass(frozen=True)
class Operation:
    """`kind`: F forward, B backward, I and W its parts for inputs and weights."""

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Event:
    """An operation at its time."""

    operation: Operation
    start: float
    end: float


class RecordingStage:
    """A stage for torch's schedules that computes and sends nothing."""

    def __init__(self, stage: int, stages: int, rank: int, ranks: int, done: list[Operation]):
        self.stage_index, self.num_stages = stage, stages
        self.group_rank, self.group_size = rank, ranks
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.submod, self.device, self.has_backward = None, "cpu", True
        self.args_recv_info: dict[int, tuple[()]] = {0: ()}
        self.act_send_info: dict[int, list[int]] = {}
        self._done = done

    def forward_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self._done.append(Operation("F", self.stage_index, micro_batch))

    def backward_one_chunk(
        self, micro_batch: int, *_: Any, full_backward: bool = True, **__: Any
    ) -> None:
        self._done.append(Operation("B" if full_backward else "I", self.stage_index, micro_batch))

    def backward_weight_one_chunk(self, micro_batch: int, *_: Any, **__: Any) -> None:
        self._done.append(Operation("W", self.stage_index, micro_batch))

    def _nothing(self, *_: Any, **__: Any) -> list[Any]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = _nothing
    _get_init_p2p_neighbors_ops = _prepare_forward_infra = _prepare_backward_infra = _nothing
    set_local_fwd_input = set_local_bwd_input = get_local_bwd_output = _nothing
    clear_runtime_states = perform_reduce_grad = _nothing


def orders(name: str, ranks: int, per_rank: int, micro_batches: int) -> list[list[Operation]]:
    """What each rank does, in order, as torch's own schedule tells its stages."""
    count, v_shaped, result = ranks * per_rank, SCHEDULES[name].v_shaped, []
    for rank in range(ranks):
        done: list[Operation] = []
        stages: list[Any] = [
            RecordingStage(stage, count, rank, ranks, done)
            for stage in range(count)
            if stage_rank(stage, ranks, v_shaped=v_shaped) == rank
        ]
        schedule = build_schedule(name, stages, micro_batches, lambda output, labels: labels)
        schedule.step(target=torch.zeros(micro_batches), return_outputs=False)
        result.append(done)
    return result


def replay(
    order: Sequence[Sequence[Operation]], stages: int, cost: Callable[[str, int], float]
) -> list[list[Event]]:
    """When each rank does what; `cost` of (kind, stage). Raises RuntimeError if ranks wait for each
    other."""
    ends: dict[tuple[str, int, int], float] = {}
    timeline: list[list[Event]] = [[] for _ in order]
    while any(len(events) < len(own) for events, own in zip(timeline, order, strict=True)):
        before = len(ends)
        for events, own in zip(timeline, order, strict=True):
            while len(events) < len(own):
                operation = own[len(events)]
                needed = _needed(operation, stages)
                if needed is not None and needed not in ends:
                    break
                ready = 0.0 if needed is None else ends[needed]
                start = max(ready, events[-1].end if events else 0.0)
                end = start + cost(operation.kind, operation.stage)
                events.append(Event(operation, start, end))
                ends[_key(operation)] = end
        if len(ends) == before:
            raise RuntimeError("the ranks wait for each other")
    return timeline


def _key(operation: Operation) -> tuple[str, int, int]:
    kind = "B" if operation.kind == "I" else operation.kind
    return kind, operation.stage, operation.micro_batch


def _needed(operation: Operation, stages: int) -> tuple[str, int, int] | None:
    """The operation of another stage that has to be done before."""
    kind, stage, micro_batch = _key(operation)
    if kind == "F" and stage > 0:
        return "F", stage - 1, micro_batch
    if kind == "B" and stage < stages - 1:
        return "B", stage + 1, micro_batch
    return None


def duration(timeline: list[list[Event]]) -> float:
    """Until the last rank is done."""
    return max(events[-1].end for events in timeline)


def bubble(timeline: list[list[Event]]) -> float:
    """The share of the time that ranks wait."""
    busy = sum(event.end - event.start for events in timeline for event in events)
    return 1.0 - busy / (duration(timeline) * len(timeline))


def formula(name: str, ranks: int, per_rank: int, micro_batches: int) -> float | None:
    """The bubble as textbooks have it, where they do."""
    if "zero_bubble" in name:
        return None
    return (ranks - 1) / (per_rank * micro_batches + ranks - 1)


def measured_costs(rounds: int) -> Costs:
    """Milliseconds of one layer of a stage in the middle, in float32 on this machine."""
    spec = model_spec(MODEL, None)
    assert spec.decoder is not None
    stage = Decoder(spec.decoder)
    stage.embeds = stage.ends = False
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(0.0, 0.02)
    layers = list(stage.model.layers.parameters())
    taken: dict[str, list[float]] = {kind: [] for kind in "FBIW"}
    for number in range(rounds + 2):
        values = _measure_once(stage, layers)
        if number >= 2:
            for kind, value in values.items():
                taken[kind].append(1e3 * value / len(stage.model.layers))
    return Costs(*(median(taken[kind]) for kind in "FBIW"))


def _measure_once(stage: Decoder, layers: list[torch.nn.Parameter]) -> dict[str, float]:
    """Seconds of each operation, done as torch's stages do it."""
    states = torch.randn(ROWS, LENGTH, stage.config.hidden_size, requires_grad=True)
    gradient = torch.randn_like(states)
    times = [time.perf_counter()]

    def stamp() -> None:
        times.append(time.perf_counter())

    output = stage(states)
    stamp()
    stage_backward((output,), (gradient,), (states,))
    stamp()
    output = stage(states)
    stamp()
    _, groups = stage_backward_input([output], [gradient], [states], iter(layers))
    stamp()
    stage_backward_weight(iter(layers), groups)
    stamp()
    seconds = [after - before for before, after in pairwise(times)]
    return {"F": seconds[0], "B": seconds[1], "I": seconds[3], "W": seconds[4]}


def drawn(timeline: list[list[Event]], ranks: int) -> str:
    """A line a rank: the kind of what is done, small letters for all stages but its first."""
    scale = WIDTH / duration(timeline)
    lines = []
    for rank, events in enumerate(timeline):
        line = ["."] * WIDTH
        for event in events:
            kind = event.operation.kind
            letter = kind if event.operation.stage < ranks else kind.lower()
            begin, end = round(event.start * scale), round(event.end * scale)
            line[begin:end] = letter * (end - begin)
        lines.append(f"{rank} {''.join(line)}")
    return "\n".join(lines)


def save_png(timelines: dict[str, list[list[Event]]], ranks: int, path: Path) -> None:
    """All timelines under each other, on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 0.45 * (ranks + 2) * len(timelines)), layout="constrained")
    longest = max(map(duration, timelines.values()))
    for axes, (title, timeline) in zip(
        figure.subplots(len(timelines), squeeze=False)[:, 0], timelines.items(), strict=True
    ):
        for rank, events in enumerate(timeline):
            for event in events:
                axes.barh(
                    rank, event.end - event.start, left=event.start, height=0.9,
                    color=COLOURS[event.operation.kind], edgecolor="white", linewidth=0.4,
                    alpha=1.0 if event.operation.stage < ranks else 0.65,
                )  # fmt: skip
        axes.set(title=f"{title}: bubble {bubble(timeline):.1%}", xlim=(0, longest))
        axes.set_yticks(range(ranks))
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure or take the costs, replay, print, and keep the result when asked to."""
    arguments = _arguments()
    torch.set_num_threads(1)
    costs = Costs(*arguments.costs) if arguments.costs else measured_costs(arguments.rounds)
    rows, timelines = [], {}
    for micro_batches in arguments.micro_batches:
        for name, choices in PER_RANK.items():
            for per_rank in choices:
                numbers = {"ranks": arguments.ranks, "per_rank": per_rank}
                if broken_rule(name, micro_batches=micro_batches, **numbers):
                    continue
                row, timeline = _row(name, micro_batches, costs, **numbers)
                rows.append(row)
                timelines[f"{name}, {per_rank} a rank, {micro_batches} micro-batches"] = timeline
    shown = {key: found for key, found in timelines.items()
             if key.endswith(f" {arguments.micro_batches[0]} micro-batches")}  # fmt: skip
    if arguments.png:
        save_png(shown, arguments.ranks, arguments.png)
    header = ("schedule", "ranks", "micro-batches", "stages a rank", "bubble", "formula", "step")
    drawings = "\n\n".join(f"{key}\n{drawn(t, arguments.ranks)}" for key, t in shown.items())
    body = f"{_said(costs, arguments)}\n\n{table(header, rows)}\n\n```\n{drawings}\n```"
    report("Bubble", "benchmarks.bubble", arguments, body)


def _row(
    name: str, micro_batches: int, costs: Costs, *, ranks: int, per_rank: int
) -> tuple[tuple[str, ...], list[list[Event]]]:
    """A line of the table, and the timeline behind it; one layer in all for each rank."""
    order = orders(name, ranks, per_rank, micro_batches)
    timeline = replay(order, ranks * per_rank, lambda kind, stage: costs.of(kind, stage) / per_rank)
    known = formula(name, ranks, per_rank, micro_batches)
    undivided = micro_batches * (costs.forward + costs.backward)
    cells = (str(ranks), str(micro_batches), str(per_rank), f"{bubble(timeline):.1%}",
             "" if known is None else f"{known:.1%}",
             f"{duration(timeline) / undivided:.3f}")  # fmt: skip
    return (name, *cells), timeline


def _said(costs: Costs, arguments: argparse.Namespace) -> str:
    origin = "given" if arguments.costs else f"measured, ms a layer, {ROWS} x {LENGTH} tokens"
    return (
        f"Costs ({origin}): forward {costs.forward:.2f}, backward {costs.backward:.2f}, its parts "
        f"for inputs {costs.inputs:.2f} and weights {costs.weights:.2f}."
    )


def _arguments() -> argparse.Namespace:
    made = parser("benchmarks.bubble", __doc__, rounds=15)
    made.add_argument("--ranks", type=int, default=4, help="of the pipeline")
    made.add_argument("--micro_batches", type=int, nargs="+", default=[8, 16, 32],
                      help="timelines are drawn for the first number")  # fmt: skip
    made.add_argument("--costs", type=float, nargs=4, metavar=("F", "B", "I", "W"),
                      help="in place of measured ones")  # fmt: skip
    made.add_argument("--png", type=Path, help="a file for the timelines")
    return made.parse_args()


if __name__ == "__main__":
    main()
