"""The state of a run: global facts, never facts of a rank.

Owns what is written to `checkpoint/state/*.json` beside the tensors. From these numbers, the seed
and its own rank number each rank derives its share, so a run may go on with any number of ranks.
Random numbers need no entry: they are functions of (seed, step, sample, layer).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from launcher.errors import UserError

STATE_VERSION = 1
_ABSENT_IN_OLDER_FILES = {"good_steps": 0, "skipped_in_a_row": 0}


@dataclass
class TrainState:
    """How far a run has come."""

    global_step: int = 0
    """Optimizer steps done, counted in the present global batch; the place on the schedule."""
    updates: int = 0
    """Updates the optimizer's moments have seen; equals `global_step` unless the batch changed or
    steps overflowed."""
    consumed_samples: int = 0
    """Samples trained on."""
    data_position: int = 0
    """Next sample of the global order; equals `consumed_samples` unless a resume skipped data."""
    consumed_tokens: int = 0
    """Tokens trained on, padding apart."""
    loss_scale: float = 1.0
    """Factor on the loss of the next step; 1.0 where the loss is not scaled."""
    good_steps: int = 0
    """Steps without overflow since a dynamic loss scale last moved."""
    skipped_in_a_row: int = 0
    """Newest steps that changed nothing because of their gradient norm."""

    def advance(self, samples: int, tokens: int) -> None:
        """Count one optimizer step. Its update, if it made one, is counted where it was made."""
        self.global_step += 1
        self.consumed_samples += samples
        self.data_position += samples
        self.consumed_tokens += tokens

    def with_global_batch(self, global_batch: int) -> TrainState:
        """The same place in a run whose steps have `global_batch` samples."""
        return replace(self, global_step=self.consumed_samples // global_batch)


def to_json(state: TrainState, metadata: dict[str, Any]) -> dict[str, Any]:
    """The content of a state file: the state, and facts about the run that a resume checks."""
    return {"version": STATE_VERSION, **asdict(state), **metadata}


def from_json(content: dict[str, Any], where: str) -> TrainState:
    """The state of a state file. Raises `UserError` when a number is absent or no number."""
    values: dict[str, Any] = {}
    for field in fields(TrainState):
        value = content.get(field.name, _ABSENT_IN_OLDER_FILES.get(field.name))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"{field.name} = {value!r}",
                where=where,
                rule="it must be a number",
                advice="Resume from another checkpoint",
            )
        values[field.name] = value
    return TrainState(**values)


def epoch_and_step(global_step: int, steps_per_epoch: int) -> tuple[int, int]:
    """(epoch from 1, step inside it from 1) of the `global_step`-th optimizer step (from 1)."""
    epoch, step = divmod(global_step - 1, steps_per_epoch)
    return epoch + 1, step + 1
