"""Trackers: TensorBoard, Weights & Biases and others, through accelerate's tracker interface.

Only the main process has trackers. accelerate takes seconds to import, so it is imported only when
a tracker is configured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import UserError

_PACKAGES = {"tensorboard": "tensorboard", "comet_ml": "comet-ml"}


def open_trackers(
    names: Sequence[str], folder: Path, configuration: Mapping[str, Any], *, cpu: bool
) -> list[Any]:
    """Start a tracker for each name and give it the configuration; some write into `folder`.

    Raises `UserError` when a tracker's package is not installed.
    """
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    PartialState(cpu=cpu)  # accelerate's logging needs it
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    trackers = []
    for name in names:
        if name not in available:
            raise UserError(
                f"trackers: {name} is not installed",
                advice=f"pip install {_PACKAGES.get(name, name)}",
            )
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind("rank_0", folder) if kind.requires_logging_directory else kind("slipway")
        tracker.main_process_only = False  # other processes have none
        try:
            tracker.start()
            tracker.store_init_configuration(flatten(configuration))
        except OSError as error:
            raise UserError(
                f"trackers: {name} cannot write to {folder}", rule=str(error.strerror)
            ) from error
        trackers.append(tracker)
    return trackers


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; other values than bool, number and string become strings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif value is not None:
            simple = isinstance(value, bool | int | float | str)
            flat[f"{prefix}{key}"] = value if simple else str(value)
    return flat
