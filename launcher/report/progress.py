"""The text of a progress line: step, loss, throughput, time left."""

from __future__ import annotations

from collections.abc import Mapping

BAR_WIDTH = 20
SHOWN_DATA_SHARE = 0.02
GIBIBYTE = 1 << 30
MAX_SOURCES = 4
"""Sources whose losses fit into a progress line."""


def duration(seconds: float) -> str:
    """`1:02:03` or `4:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def bar(fraction: float) -> str:
    """A bar of `BAR_WIDTH` characters, filled to `fraction`."""
    full = round(fraction * BAR_WIDTH)
    return "█" * full + "·" * (BAR_WIDTH - full)


class Pace:
    """Estimates the remaining time of a run by a moving average, which forgets slow first steps."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def remaining(self, step: int, total: int, seconds_per_step: float) -> float:
        """Seconds left after `step` of `total` steps; the last one took `seconds_per_step`."""
        before = self._seconds if self._seconds is not None else seconds_per_step
        self._seconds = 0.9 * before + 0.1 * seconds_per_step
        return (total - step) * self._seconds


def progress_line(
    *,
    step: int,
    total: int,
    loss: float,
    lr: float,
    grad_norm: float,
    tokens_per_second: float,
    remaining_seconds: float,
    source_losses: Mapping[str, float] | None = None,
    mfu: float | None = None,
    peak_memory_bytes: int | None = None,
    data_share: float = 0.0,
) -> str:
    """The progress line of one step; `source_losses`: of the sources of a mixture; `data_share`:
    part of the time that the step waited for data, shown from `SHOWN_DATA_SHARE` on."""
    each = ""
    if source_losses and len(source_losses) <= MAX_SOURCES:
        each = " (" + ", ".join(f"{name} {own:.2f}" for name, own in source_losses.items()) + ")"
    return (
        f"{bar(step / total)} step {step}/{total}  loss {loss:.4f}{each}  lr {lr:.3g}  "
        f"grad norm {grad_norm:.3f}  {tokens_per_second:,.0f} tokens/s  "
        f"{_cost_text(mfu, peak_memory_bytes, data_share)}{duration(remaining_seconds)} left"
    )


def _cost_text(mfu: float | None, peak_memory_bytes: int | None, data_share: float) -> str:
    """`MFU 43.1 %  61.2 GiB  data 4 %  `, as far as there is something to show."""
    parts = [
        "" if mfu is None else f"MFU {mfu:.1%}",
        "" if peak_memory_bytes is None else f"{peak_memory_bytes / GIBIBYTE:.1f} GiB",
        f"data {data_share:.0%}" if data_share >= SHOWN_DATA_SHARE else "",
    ]
    return "".join(f"{part}  " for part in parts if part)
