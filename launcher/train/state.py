"""The state of a run: global facts, never facts of a rank.

Owns the content of `checkpoint/state/*.json`, beside the tensors. Each rank derives its share from
these numbers, the seed and its rank, so a run may resume on any number of ranks. Random numbers
need no entry: they are functions of (seed, step, sample, layer).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from launcher.errors import UserError
from launcher.train.stopping import StoppingState, stopping_from_json

STATE_VERSION = 1
DATA_CURSOR = "data_cursor"
"""Key of a state file: where to begin reading a stream, so that nothing before is read."""
STOPPING = "stopping"
"""Key of a state file: what EarlyStopping has seen."""
_ABSENT_IN_OLDER_FILES = {"good_steps": 0, "skipped_in_a_row": 0}


@dataclass
class TrainState:
    """How far a run has come."""

    global_step: int = 0
    """Optimizer steps done, in units of the present global batch; the position on the schedule."""
    updates: int = 0
    """Updates the optimizer has made; equals `global_step` unless the batch size changed or steps
    overflowed."""
    consumed_samples: int = 0
    """Samples trained on."""
    data_position: int = 0
    """Next sample of the global order; equals `consumed_samples` unless data was skipped."""
    consumed_tokens: int = 0
    """Tokens trained on, without padding."""
    loss_scale: float = 1.0
    """Factor on the loss of the next step; 1.0 where the loss is not scaled."""
    good_steps: int = 0
    """Steps without overflow since a dynamic loss scale last moved."""
    skipped_in_a_row: int = 0
    """How many of the newest steps were skipped because limits were passed."""
    stopping: StoppingState = field(default_factory=StoppingState)
    """What EarlyStopping has seen."""

    def advance(self, samples: int, tokens: int) -> None:
        """Count one optimizer step; `updates` is counted by the step itself."""
        self.global_step += 1
        self.consumed_samples += samples
        self.data_position += samples
        self.consumed_tokens += tokens

    def with_global_batch(self, global_batch: int) -> TrainState:
        """The same position in a run whose steps have `global_batch` samples."""
        return replace(self, global_step=self.consumed_samples // global_batch)


def to_json(state: TrainState, metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of a state file: the state, and metadata of the run that a resume compares."""
    content = asdict(state)
    if not state.stopping.metric:
        del content[STOPPING]
    return {"version": STATE_VERSION, **content, **metadata}


def from_json(content: dict[str, Any], where: str) -> TrainState:
    """The state in a state file. Raises `UserError` for a missing value, or one that is not a
    number."""
    values: dict[str, Any] = {}
    for key in fields(TrainState):
        if key.name == STOPPING:
            values[key.name] = stopping_from_json(content.get(STOPPING), where)
            continue
        value = content.get(key.name, _ABSENT_IN_OLDER_FILES.get(key.name))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{key.name} = {value!r}",
                where=where,
                rule="it must be a number",
                advice="Resume from another checkpoint",
            )
        values[key.name] = value
    return TrainState(**values)


def epoch_and_step(global_step: int, steps_per_epoch: int) -> tuple[int, int]:
    """(epoch from 1, step inside it from 1) of the `global_step`-th optimizer step (from 1)."""
    epoch, step = divmod(global_step - 1, steps_per_epoch)
    return epoch + 1, step + 1
