"""Disk space and time of saves: numbers, and when they are a warning."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.checkpoint import cost
from launcher.checkpoint.cost import Forecast, SaveOverhead, forecast
from launcher.checkpoint.retention import kept_saves
from launcher.checkpoint.store import Store
from launcher.parallel.filesystems import FilesystemGroups
from launcher.parallel.world import World
from tests.checkpoint.crew import together

GB = 10**9


def of(**changes: object) -> Forecast:
    known = {"save_bytes": 2 * GB, "kept": 5, "present": 0, "free_bytes": 100 * GB}
    return Forecast(**{**known, "root": Path("out"), **changes})  # type: ignore[arg-type]


def test_the_line_has_all_numbers() -> None:
    line = "out: each save takes 2.0 GB, 5 kept: 10.0 GB together, 100.0 GB are free"
    assert str(of()) == line
    assert str(of(free_bytes=None)) == "out: each save takes 2.0 GB, 5 kept: 10.0 GB"
    every = "out: each save takes 500.0 MB, all are kept, 100.0 GB are free"
    assert str(of(save_bytes=GB // 2, kept=None)) == every


@pytest.mark.parametrize(
    ("changes", "warns"),
    [
        ({}, False), ({"free_bytes": 19 * GB}, True), ({"free_bytes": 21 * GB}, False),
        ({"free_bytes": 19 * GB, "present": 1}, False), ({"free_bytes": None}, False),
        ({"kept": None, "free_bytes": 3 * GB}, True), ({"present": 9, "free_bytes": 3 * GB}, True),
    ],
)  # fmt: skip
def test_more_than_half_of_what_is_free_is_a_warning(changes: dict[str, int], warns: bool) -> None:
    assert bool(of(**changes).warning) == warns


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"steps": 10, "limit": 5, "done": 0, "last": 20}, 2),
        ({"steps": 1, "limit": 5, "done": 0, "last": 20}, 5),
        ({"steps": 10, "limit": 0, "done": 0, "last": 25}, 3),
        ({"steps": 10, "limit": 0, "done": 20, "last": 25}, 1),
        ({"steps": 0, "seconds": 9, "limit": 0, "done": 0, "last": 25}, None),
        ({"steps": 0, "seconds": 9, "limit": 4, "done": 0, "last": 25}, 4),
        ({"steps": 0, "limit": 4, "done": 0, "last": 25}, 1),
    ],
)
def test_how_many_saves_stay(arguments: dict[str, int], expected: int | None) -> None:
    assert kept_saves(**arguments) == expected


def test_each_file_system_is_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "free_bytes", lambda root: 30 if root.name == "a" else 1000)
    filesystems = FilesystemGroups(((0, 1), (2,)))

    def work(world: World) -> list[Forecast]:
        root = tmp_path / ("a" if world.rank < 2 else "b")
        return forecast(Store(root, "CKP", 0, 5, filesystems=filesystems), [3, 4, 5], 2, world)

    found = together(3, work)[0]
    assert [(f.save_bytes, f.free_bytes) for f in found] == [(7, 30), (5, 1000)]


@pytest.mark.parametrize(
    ("save_seconds", "step_seconds", "suggested"), [(1.0, 9.5, None), (1.0, 1.0, 9), (2.0, 6.0, 3)]
)
def test_more_than_a_tenth_of_the_time_is_a_warning(
    save_seconds: float, step_seconds: float, suggested: int | None
) -> None:
    overhead, now, logged = SaveOverhead(), 0.0, []
    for step in range(1, 8):
        now += step_seconds
        logged.append(overhead.add(step, now, now + save_seconds))
        now += save_seconds
    warnings = [line for line in logged if line]
    assert len(warnings) == (suggested is not None)
    if suggested:
        assert f"set save_checkpoint_steps to {suggested} or more" in warnings[0]
