"""The resume report: what was restored from where, and what has changed since.

    resumed: CKP-1_10 of output/checkpoint, step 10 of 20
      saved by       8 ranks (pp 2 x dp_shard 2 x tp 2) after 80 samples, 2560 tokens
      restored       weights, optimizer state, schedule, data position, random numbers
    changed since:
      layout         8 ranks (pp 2 x dp_shard 2 x tp 2) -> 4 ranks (tp 4)
      configuration  parallel_config.data_parallel: 2 -> 1
      versions       torch: 2.11.0 -> 2.12.0

Owns the text and what it compares. At most twenty lines, and ten for a mixture whose shares have
changed. It promises a bitwise identical run only where the layout, every effective key, the
versions and the data position are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.layout.mesh import Mesh, layout_text
from launcher.train.state import TrainState

KEYS_SHOWN = 10
VALUE_WIDTH = 30
MODEL_KEYS = "model.model_config."
_LABEL_WIDTH = 15


@dataclass(frozen=True)
class InferredState:
    """The state of a run whose save has no state file, and where it comes from."""

    saved: dict[str, Any]
    """In the form of a state file."""
    saved_by: str
    """Its ranks, or that it is complete weights."""
    steps_from: str
    """`step_num in the files`."""
    has_batch: bool
    """Whether the global batch size is in the files."""
    has_scale: bool
    """Whether the loss scale is from the files."""
    unused: tuple[str, ...]
    """Numbers in the files that are not used."""


@dataclass(frozen=True, kw_only=True)
class ResumeDetails:
    """What was restored, and the run that resumes."""

    name: str
    folder: str
    saved: Mapping[str, Any]
    """The state file: state and metadata of the run that saved."""
    saved_ranks: int
    saved_mesh: Mapping[str, int]
    """Axis to size; empty where it is not known."""
    state: TrainState
    """Where this run resumes."""
    metadata: Mapping[str, Any]
    """Metadata of this run, by the keys of the state file."""
    mesh: Mesh
    total_steps: int
    data_position_is_set: bool
    """Whether the configuration sets the data position."""
    derived: InferredState | None = None
    """The inferred state, of a save without a state file."""
    mixture: tuple[str, ...] = ()
    """What has changed in the shares of the sources of a mixture."""


def resume_report(details: ResumeDetails) -> list[str]:
    """The lines of the report."""
    state, saved = details.state, details.saved
    head = (
        f"resumed: {details.name} of {details.folder}, "
        f"step {state.global_step} of {details.total_steps}"
    )
    if details.derived is not None:
        return [head, *_without_state(details, details.derived)]
    lines = [
        head,
        _line("saved by", f"{layout_text(details.saved_ranks, details.saved_mesh)} after "
              f"{saved['consumed_samples']} samples, {saved['consumed_tokens']} tokens"),
        _line("restored", ", ".join(_restored(details))),
    ]  # fmt: skip
    changes = [*_changes(details)]
    if not changes:
        return [*lines, "nothing changed: the run continues bit for bit"]
    return [*lines, "changed since:", *changes]


def _without_state(details: ResumeDetails, derived: InferredState) -> Iterator[str]:
    """For a save without a state file: what was found, assumed, and is not known."""
    saved, state = derived.saved, details.state
    batch = saved["global_batch_size"]
    steps = f"{saved['global_step']} steps ({derived.steps_from})"
    yield _line("saved by", f"{derived.saved_by} after {steps}, without a state file")
    restored = ["weights", "optimizer state", "step"]
    if state.updates != saved["global_step"]:
        restored.append(f"{state.updates} updates of the optimizer (global_step in the files)")
    if derived.has_scale:
        restored.append(f"loss scale {state.loss_scale:g}")
    yield _line("restored", ", ".join(restored))
    whose = "from the files" if derived.has_batch else "that of this run"
    yield _line("assumed", f"{saved['consumed_samples']} samples trained on, a global batch of "
                f"{batch} ({whose}), in the order of this run")  # fmt: skip
    yield _line("not known", "data, configuration and versions of the run that saved")
    if derived.unused:
        shown = ", ".join(derived.unused[:KEYS_SHOWN]) + " ..." * (len(derived.unused) > KEYS_SHOWN)
        yield _line("not used", shown)
    changes = [*_layout(details), *_samples(details), *_data(details)]
    yield from ["changed since:", *changes] if changes else []


def _line(label: str, text: str) -> str:
    return f"  {label:<{_LABEL_WIDTH}}{text}"


def _restored(details: ResumeDetails) -> Iterator[str]:
    """What was restored; what the configuration now sets otherwise is left out."""
    saved, present = details.saved, details.metadata
    yield from ("weights", "optimizer state")
    if saved.get("schedule") == present["schedule"]:
        yield "schedule"
    if saved.get("loss_scaling") == present["loss_scaling"] == "dynamic":
        yield f"loss scale {details.state.loss_scale:g}"
    if not details.data_position_is_set:
        yield "data position"
    if saved.get("seed") == present["seed"]:
        yield "random numbers"


def _changes(details: ResumeDetails) -> Iterator[str]:
    saved, present = details.saved, details.metadata
    yield from _layout(details)
    yield from _samples(details)
    if "configuration" in saved:
        yield from _configuration(saved["configuration"], present["configuration"])
        model = _model_changes(saved, present)
        if model:
            yield _line("model", ", ".join(model))
        software = differences(saved.get("versions", {}), present["versions"])
        if software:
            yield _line("versions", ", ".join(software))
    else:
        yield _line("configuration", "not compared: the save was written by an older version")
    yield from _mixture(details)
    yield from _data(details)


def _layout(details: ResumeDetails) -> Iterator[str]:
    mesh = details.mesh
    if details.saved_ranks != mesh.world_size or _other_axes(details.saved_mesh, mesh):
        before = layout_text(details.saved_ranks, details.saved_mesh)
        yield _line("layout", f"{before} -> {layout_text(mesh.world_size, mesh.sizes())}")


def _samples(details: ResumeDetails) -> Iterator[str]:
    present, state = details.metadata["global_batch_size"], details.state
    batch = details.saved.get("global_batch_size")
    if batch != present:
        yield _line("samples", f"global batch was {batch}, is {present}: resuming after "
                    f"{state.consumed_samples} samples, as step {state.global_step}")  # fmt: skip


def _data(details: ResumeDetails) -> Iterator[str]:
    if details.data_position_is_set:
        other = "other data, " if details.saved.get("data") != details.metadata["data"] else ""
        yield _line(
            "data", f"{other}beginning at sample {details.state.data_position}, as configured"
        )


def _model_changes(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What has changed in config.json, apart from keys that the configuration sets."""
    if "model" not in saved:
        return []
    before, now = saved["configuration"], present["configuration"]
    written = {key for key in {*before, *now} if before.get(key) != now.get(key)}
    set_here = {key.removeprefix(MODEL_KEYS) for key in written if key.startswith(MODEL_KEYS)}
    return [
        text for text in differences(saved["model"], present["model"])
        if text.partition(":")[0] not in set_here
    ]  # fmt: skip


def _other_axes(saved: Mapping[str, int], mesh: Mesh) -> bool:
    sizes = mesh.sizes()
    return bool(saved) and any(saved.get(axis, 1) != size for axis, size in sizes.items())


def _configuration(saved: Mapping[str, Any], present: Mapping[str, Any]) -> Iterator[str]:
    found = differences(saved, present)
    rest = len(found) - KEYS_SHOWN
    shown = found[:KEYS_SHOWN] + ([f"... and {rest} more"] if rest > 0 else [])
    for index, text in enumerate(shown):
        yield _line("" if index else "configuration", text)


def _mixture(details: ResumeDetails) -> Iterator[str]:
    rest = len(details.mixture) - KEYS_SHOWN
    shown = [*details.mixture[:KEYS_SHOWN], *([f"... and {rest} more"] if rest > 0 else [])]
    for index, text in enumerate(shown):
        yield _line("" if index else "mixture", text)


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` of every key whose value has changed, in the order of the present ones."""
    keys = [*present, *(key for key in saved if key not in present)]
    return [
        f"{key}: {_value(saved.get(key))} -> {_value(present.get(key))}"
        for key in keys
        if saved.get(key) != present.get(key)
    ]


def _value(value: Any) -> str:
    """A value, shortened in the middle: paths differ at their ends."""
    if value is None:
        return "left out"
    text = " ".join(str(value).split()) or "''"
    if len(text) <= VALUE_WIDTH:
        return text
    half = (VALUE_WIDTH - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
