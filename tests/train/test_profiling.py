"""A profile of a run: exactly its steps, with named ranges, in files that other tools open."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.report import ranges
from launcher.train import profiling
from launcher.train.profiling import STEP, ProfileSettings, StepProfiler
from tests.ranks import run_job
from tests.workshop import Workshop

PLAIN = ProfileSettings(
    start=2, stop=3, shapes=False, flops=False, memory=False, stack=False, communication=False,
    memory_snapshot=False, nsight=False,
)  # fmt: skip
WINDOW = ["--profile", "true", "--profile_start_step", "3", "--profile_stop_step", "5"]


def events(path: Path) -> list[dict[str, Any]]:
    """What Perfetto reads."""
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def steps_in(found: list[dict[str, Any]]) -> list[int]:
    names = {str(event.get("name")) for event in found}
    return sorted(int(name.removeprefix(STEP)) for name in names if name.startswith(STEP))


def count(found: list[dict[str, Any]], name: str) -> int:
    return sum(event.get("name") == name and event.get("ph") == "X" for event in found)


def inside(found: list[dict[str, Any]], name: str, step: int) -> bool:
    """Whether a range lies in that of a step."""
    (outer,) = (event for event in found if event.get("name") == f"{STEP}{step}")
    return any(
        event.get("name") == name and outer["ts"] <= event["ts"] <= outer["ts"] + outer["dur"]
        for event in found if "dur" in event
    )  # fmt: skip


def test_a_run_records_its_window(workshop: Workshop) -> None:
    name = workshop.yaml(
        runner_config={"max_steps": 8, "gradient_accumulation_steps": 2, "batch_size": 2},
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 4}],
        parallel_config={"data_parallel": 2},
        profile_communication=True,
        profile_rank_ids=[1],
    )
    arguments = ["--config", name, "--run_mode", "train", *WINDOW]
    result = run_job(arguments, workshop.folder, 2)
    assert result.code == 0, result.stderr
    root = workshop.folder / "output" / "profile"
    assert [path.name for path in root.iterdir()] == ["rank_1"]
    kinds = ["communication.txt", "operations.txt", "trace.json.gz"]
    assert sorted(path.name for path in (root / "rank_1").iterdir()) == [
        f"steps_3-5.{kind}" for kind in kinds
    ]
    found = events(root / "rank_1" / "steps_3-5.trace.json.gz")
    assert steps_in(found) == [3, 4, 5]
    for range_name in (ranges.DATA, ranges.CLIP, ranges.OPTIMIZER):
        assert count(found, range_name) == 3
    for range_name in (ranges.FORWARD, ranges.BACKWARD):
        assert count(found, range_name) == 6, "one for each micro-batch"
    assert count(found, ranges.SAVE) == 1
    assert inside(found, ranges.SAVE, 4)
    assert any("Input Dims" in event.get("args", {}) for event in found)
    assert "aten::" in (root / "rank_1" / "steps_3-5.operations.txt").read_text()
    assert "all_reduce" in (root / "rank_1" / "steps_3-5.communication.txt").read_text()
    resumed = run_job(
        ["--config", name, "--run_mode", "train", "--resume_training", "CKP-1_4",
         "--load_checkpoint", "output/checkpoint", "--profile_output", "traces", *WINDOW],
        workshop.folder, 2,
    )  # fmt: skip
    assert resumed.code == 0, resumed.stderr
    rest = workshop.folder / "traces" / "rank_1" / "steps_5-5.trace.json.gz"
    assert steps_in(events(rest)) == [5]


def test_a_sink_is_recorded_step_by_step_and_the_last_save_too(workshop: Workshop) -> None:
    name = workshop.yaml(
        runner_config={"max_steps": 4, "sink_size": 4}, callbacks=None, profile_level=2,
        profile=True, profile_start_step=3, profile_stop_step=9,
    )  # fmt: skip
    assert run_job(["--config", name, "--run_mode", "train"], workshop.folder).code == 0
    (trace,) = (workshop.folder / "output" / "profile" / "rank_0").glob("*.json.gz")
    found = events(trace)
    assert steps_in(found) == [3, 4]
    assert count(found, ranges.SAVE) == 1
    assert "FLOPs" in trace.with_name("steps_3-4.operations.txt").read_text()


def recorded(folder: Path, first: int, last: int, settings: ProfileSettings = PLAIN) -> list[str]:
    """The lines of a profiler that saw these steps."""
    lines: list[str] = []
    with StepProfiler(settings, folder, torch.device("cpu"), lines.append) as profiler:
        for step in range(first, last + 1):
            profiler.begin_step(step)
            torch.ones(2) + 1
            profiler.end_steps(step)
    return lines


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(1, 6, "2-3"), (3, 6, "3-3"), (1, 2, "2-2"), (4, 6, None), (1, 1, None)],
)
def test_parts_of_the_window(tmp_path: Path, first: int, last: int, expected: str | None) -> None:
    (line,) = recorded(tmp_path, first, last)
    names = [path.name for path in tmp_path.glob("*.json.gz")]
    assert names == ([] if expected is None else [f"steps_{expected}.trace.json.gz"])
    assert ("nothing was recorded" in line) == (expected is None)


def test_steps_of_a_sink_need_no_end_of_their_own(tmp_path: Path) -> None:
    with StepProfiler(PLAIN, tmp_path, torch.device("cpu"), print) as profiler:
        for step in range(1, 6):
            profiler.begin_step(step)
    assert steps_in(events(tmp_path / "steps_2-3.trace.json.gz")) == [2, 3]


def test_from_the_start_of_the_job(tmp_path: Path) -> None:
    settings = replace(PLAIN, start=0, stop=1)
    with StepProfiler(settings, tmp_path, torch.device("cpu"), print) as profiler:
        torch.linspace(0, 1, 5)
        profiler.begin_step(1)
        profiler.end_steps(1)
    found = events(tmp_path / "steps_0-1.trace.json.gz")
    assert count(found, "aten::linspace") > 0
    assert steps_in(found) == [1]


def test_a_run_that_fails_leaves_what_was_recorded(tmp_path: Path) -> None:
    def fail() -> None:
        with StepProfiler(PLAIN, tmp_path, torch.device("cpu"), print) as profiler:
            profiler.begin_step(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert steps_in(events(tmp_path / "steps_2-2.trace.json.gz")) == [2]
    assert not list(tmp_path.glob("writing-*"))


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = recorded(tmp_path / "file" / "rank_0", 1, 4)
    assert line.startswith("warning: profile")
    assert "Not a directory" in line


class FakeCuda:
    """What a profiler asks of CUDA, in order."""

    def __init__(self, calls: list[str]) -> None:
        self.memory, self._calls = self, calls

    def synchronize(self) -> None:
        self._calls.append("synchronize")

    def _record_memory_history(self, enabled: str | None = "all", **_: Any) -> None:
        self._calls.append("history" if enabled else "no history")

    def _dump_snapshot(self, path: str) -> None:
        self._calls.append("snapshot")
        Path(path).write_bytes(b"")


def test_memory_is_recorded_on_cuda_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wanted in (False, True):
        calls: list[str] = []
        monkeypatch.setattr(profiling.torch, "cuda", FakeCuda(calls))
        settings = replace(PLAIN, memory_snapshot=wanted)
        profiler = StepProfiler(settings, tmp_path, torch.device("cuda"), print)
        monkeypatch.setattr(profiling, "profile", FakeRecorder)
        with profiler:
            profiler.begin_step(2)
        more = ["snapshot", "no history"] if wanted else []
        assert calls == [*(["history"] if wanted else []), "synchronize", *more]
    assert (tmp_path / "steps_2-2.memory.pickle").exists()


class FakeRecorder:
    """torch's, on a machine with CUDA."""

    def __init__(self, *, activities: list[Any], **_: Any) -> None:
        assert torch.profiler.ProfilerActivity.CUDA in activities

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_bytes(b"")

    def key_averages(self, **_: Any) -> FakeRecorder:
        return self

    def table(self, *, sort_by: str, **_: Any) -> str:
        assert sort_by == "self_device_time_total"
        return ""


def test_ranges_cost_nothing_while_nothing_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(ranges, "record_function", fails)
    with ranges.named_range(ranges.DATA):
        pass
