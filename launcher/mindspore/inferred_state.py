"""The state of a run whose save has no state file, inferred from what MindFormers writes instead.

Owns the source of each number:

    steps        `step_num` in the files, else `global_step`, else epoch and step in the name
    updates      `global_step`, which skips steps that overflowed, else the steps
    samples      the steps x `global_batch_size` in the files, else x the batch of this run
    loss scale   `loss_scale`, where the loss scale of this run is dynamic

Tokens are counted from 0. Data, configuration and versions are not in such a save: they are assumed
to be those of this run, which the resume report states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from launcher.builders.resume_report import InferredState
from launcher.checkpoint.names import global_step_of_name
from launcher.checkpoint.resume import Chosen
from launcher.errors import UserError
from launcher.layout.mesh import layout_text
from launcher.mindspore.names import BATCH, EPOCH, SCALE, STEPS
from launcher.train.run import TrainRun
from launcher.train.state import TrainState, to_json
from launcher.weights.reading.scalars import scalars_of
from launcher.weights.source import Source

USED = (*STEPS, BATCH, SCALE, EPOCH)


def infer_state(run: TrainRun, chosen: Chosen) -> InferredState:
    """The state in which `run` resumes from the save `chosen`. Raises `UserError` when the number
    of steps is not known, or a number is not valid."""
    numbers = scalars_of(chosen.source)
    counters = {name: _count(chosen, name, numbers[name]) for name in (*STEPS, BATCH)
                if name in numbers}  # fmt: skip
    steps, steps_from = _steps(run, chosen, counters)
    batch = counters.get(BATCH) or run.loader.global_batch
    scale = numbers.get(SCALE, 0.0)
    has_scale = run.metadata["loss_scaling"] == "dynamic" and scale > 0 and math.isfinite(scale)
    state = TrainState(
        global_step=steps,
        updates=counters.get("global_step", steps),
        consumed_samples=steps * batch,
        data_position=steps * batch,
        loss_scale=scale if has_scale else run.state.loss_scale,
    )
    unused = tuple(sorted(chosen.source.extras.keys() - {*USED}))
    saved = to_json(state, {**run.metadata, BATCH: batch})
    return InferredState(
        saved, _ranks_text(chosen.source), steps_from, BATCH in counters, has_scale, unused
    )


def _ranks_text(source: Source) -> str:
    if source.kind != "distributed":
        return "complete weights"
    return layout_text(source.world_size, source.mesh or {})


def _steps(run: TrainRun, chosen: Chosen, counters: Mapping[str, int]) -> tuple[int, str]:
    """(steps done, where the number comes from)."""
    found = next((name for name in STEPS if name in counters), None)
    if found is not None:
        return counters[found], f"{found} in the files"
    if chosen.name is None:
        raise UserError(
            f"{chosen.label} does not give the number of steps done",
            where=str(chosen.root),
            rule=f"its files have neither {' nor '.join(STEPS)} nor a name such as "
            "CKP_rank_0-1_10.safetensors",
            advice="Rename the files, or use run_mode finetune to start from weights alone",
        )
    epoch, step = chosen.name.epoch, chosen.name.step
    steps = global_step_of_name(epoch, step, run.steps_per_epoch, run.sink_size)
    if run.sink_size > 1 and step == run.sink_size:
        return steps, f"{epoch} sinks of {step}, from the name"
    how = f"an epoch has {run.steps_per_epoch} in this run"
    return max(steps, 0), f"step {step} of epoch {epoch} in the name; {how}"


def _count(chosen: Chosen, name: str, value: float) -> int:
    if not math.isfinite(value) or value < 0 or value != int(value):
        raise UserError(
            f"{name} = {value}",
            where=str(chosen.source.extras[name][0].file),
            rule="it must be an integer, 0 or more",
            advice="Resume from another checkpoint",
        )
    return int(value)
