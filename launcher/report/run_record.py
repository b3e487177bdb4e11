"""What a run left about one of its saves: state, manifest, and the rows of `metrics.jsonl`.

Owns how these are read for a report, such as a model card. Everything is optional: what is missing,
damaged or of another run is left out. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.layout.mesh import layout_text
from launcher.report.metrics import FILE_NAME as METRICS_NAME
from launcher.weights.ranks.manifests import MANIFEST_FOLDER, STATE_FOLDER, read_manifest
from launcher.weights.ranks.rank_folders import label_of

INITIAL_WEIGHTS = "initial_weights"
"""Key of a state file: the path of the weights that the run began with; null: random ones."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One save of a run."""

    name: str
    """`CKP-1_20`."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """The content of its state file."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    last_row: Mapping[str, Any] = field(default_factory=dict)
    """The row of `metrics.jsonl` of its step."""
    evaluations: tuple[Mapping[str, Any], ...] = ()
    """The evaluation rows up to its step, oldest first."""

    @property
    def step(self) -> int | None:
        """Optimizer steps done."""
        found = self.state.get("global_step")
        return found if isinstance(found, int) else None

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The configuration that the run had, dotted key to value."""
        found = self.state.get("configuration")
        return found if isinstance(found, Mapping) else {}

    @property
    def layout(self) -> str:
        """The ranks that trained; empty where it is not known."""
        size = self.manifest.get("world_size")
        return layout_text(size, self.manifest.get("mesh")) if isinstance(size, int) else ""


def read_run_record(rank_file: Path) -> RunRecord:
    """What is recorded of the save that a rank file belongs to."""
    root, name = rank_file.parent.parent, label_of(rank_file)
    state = _read(root / STATE_FOLDER / f"{name}.json")
    manifest = read_manifest(root / MANIFEST_FOLDER / f"{name}.json") or {}
    last, evaluations = _rows(root.parent / METRICS_NAME, state)
    return RunRecord(
        name=name, state=state, manifest=manifest, last_row=last, evaluations=evaluations
    )


def _rows(
    path: Path, state: Mapping[str, Any]
) -> tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
    """The row of the step of `state`, and the evaluation rows up to it; none where the file is of
    another run, which has seen other numbers of samples."""
    step, evaluations, last = state.get("global_step"), [], None
    for row in _lines(path):
        if not isinstance(step, int) or not isinstance(row.get("step"), int):
            continue
        if row["step"] <= step and "eval_loss" in row:
            evaluations.append(row)
        elif row["step"] == step and "loss" in row:
            last = row
    if last is None or last.get("consumed_samples") != state.get("consumed_samples"):
        return {}, ()
    return last, tuple(evaluations)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # cut by a crash
                if isinstance(row, dict):
                    yield row
    except (OSError, UnicodeDecodeError):
        return


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
