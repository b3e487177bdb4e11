"""The progress of a preparation, and tallies that are added up."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pytest

from launcher.data import progress as room
from launcher.data.progress import Meter, Progress, about, short
from launcher.data.tally import Tally

from .conftest import Build


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (812, "812"), (1_234, "1.2k"), (35_400, "35k"), (1.24e6, "1.2M"), (3e9, "3.0G")],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1, "about 1 s"), (42, "about 42 s"), (120, "about 2 min"), (9000, "about 2.5 h")],
)
def test_times_are_about(seconds: float, text: str) -> None:
    assert about(seconds) == text


def test_a_report_has_percent_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    reports: list[Progress] = []
    meter = Meter("tokenize", 1000, reports.append)
    meter.add(100)
    clock[0] += 1.9
    meter.tick()
    assert reports == [], "what ends soon is not worth a line"
    clock[0] += 68.1
    meter.tokens = 84_000_000
    meter.add(250)
    meter.tick()
    (report,) = reports
    assert report.detail == "35 %, 1.2M tokens/s, about 2 min left"
    assert (report.gerund, report.fraction) == ("tokenizing", 0.35)
    meter.finish_file(600)  # read by other means
    clock[0] += 1
    meter.add(9999)
    assert reports[-1].fraction == 1.0


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_the_bytes_of_a_file_are_counted_as_they_are_on_disk(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(room, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(room, "REPORT_SECONDS", 0.0)
    folder = tmp_path / "data"
    folder.mkdir()
    texts = [random.Random(n).randbytes(3000).hex().encode() for n in range(4)]
    for number, text in enumerate(texts):
        packed = gzip.compress(text) if suffix.endswith("gz") else text
        (folder / f"{number}{suffix}").write_bytes(packed)
    reports: list[Progress] = []
    build(dataset_dir=str(folder), suffixes=[suffix], on_progress=reports.append)
    read = sorted({round(r.fraction or 0, 2) for r in reports if r.verb == "tokenize"})
    assert read == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.02)
    assert {r.verb for r in reports} == {"read", "tokenize"}
    assert "tokens/s" in reports[-1].detail


def test_tallies_add_up_to_one() -> None:
    """Whatever is cut where: also the same place twice in a row, which counts once."""
    chance = random.Random(3)

    def add(tally: Tally, event: tuple[Any, ...]) -> None:
        kind, name, where = event
        if kind == "count":
            tally.documents += 1
        elif kind == "known":
            tally.known_fields.add(name)
        elif kind == "place":
            tally.too_short.add(where)
        else:
            tally.unused_fields.add(name, where)

    for _ in range(50):
        events = [
            (chance.choice(["count", "known", "place", "field"]), chance.choice("ab"),
             f"f:{chance.randrange(3)}")
            for _ in range(20)
        ]  # fmt: skip
        whole, parts, part = Tally(), Tally(), Tally()
        for event in events:
            add(whole, event)
            add(part, event)
            if chance.random() < 0.3:
                parts.merge(part.take())
        parts.merge(part.take())
        assert parts == whole
        assert part == Tally()
