"""`python -m benchmarks.gpu`: all of it in small on the CPU, and its driver."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.driver import Bench, Case, Figures, Report, Section, run_sections
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sizes import TINY
from launcher.parallel.world import World
from tests.ranks import run_ranks

MUST_BE_EQUAL = ("rows", "packed", "experts", "recompute", "select_recompute", "swap",
                 "recompute_operations")  # fmt: skip
OPTIONAL = {"torchtitan, rows, compiled", "packed, FP8"}
"""Cases that need another package, or a GPU."""


def run_tiny(output: str) -> int:
    return main(["--tiny", "--device", "cpu", "--minutes", "60", "--output", output])


def test_every_section_runs_in_small(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    assert run_ranks(1, run_tiny, str(output)) == [0]
    lines: list[dict[str, Any]] = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line for line in lines if "error" in line] == []
    assert list(dict.fromkeys(line["section"] for line in lines)) == [
        *(section.name for section in SECTIONS), "end",
    ]  # fmt: skip
    assert {line["case"] for line in lines if "skipped" in line} <= OPTIONAL
    by_case = {(line["section"], line.get("case")): line for line in lines}
    for (section, case), line in by_case.items():
        if section in ("repeat", "memory_keys") and case in MUST_BE_EQUAL:
            assert line["is_equal"], line
    assert by_case["documents", "packed row against its documents"]["difference"] < 0.05
    assert by_case["memory_keys", "interleave"]["steps_equal_to_the_first"] == TINY.repeats
    speeds = [line["tokens_per_second"] for line in lines if line["section"] == "train_1b"
              and "skipped" not in line]  # fmt: skip
    assert len(speeds) == 7
    assert len(by_case["save", "async_save"]["stall_seconds"]) == 2
    tokens = [by_case["decode", f"{who}, 1"]["tokens"] for who in ("Slipway", "generate")]
    assert tokens[0] == tokens[1]


def outcome(sections: list[Section], tmp_path: Path, minutes: float = 1.0) -> list[dict[str, Any]]:
    text = io.StringIO()
    bench = Bench(world=World(0, 1, torch.device("cpu")), sizes=TINY, folder=tmp_path)
    run_sections(sections, bench, Report(files=[text]), minutes=minutes)
    return [json.loads(line) for line in text.getvalue().splitlines()]


def fails() -> Figures:
    raise ZeroDivisionError("of this case")


def of(*cases: Case) -> Section:
    return Section("some", lambda bench: iter(cases))


def broken(bench: Bench) -> Iterator[Case]:
    yield Case("first", dict)
    raise OSError("no room")


def test_a_case_that_fails_leaves_the_others(tmp_path: Path) -> None:
    good = Case("good", lambda: {"speed": 123.456789, "lost": float("nan"), "many": [1, 2.0]})
    lines = outcome([of(Case("bad", fails), good), Section("broken", broken), of(good)], tmp_path)
    assert [line.get("case") for line in lines] == ["bad", "good", "first", None, "good"]
    assert lines[0]["error"] == "ZeroDivisionError: of this case"
    assert any("in fails" in line for line in lines[0]["traceback"])
    assert (lines[1]["speed"], lines[1]["lost"], lines[1]["many"]) == (123.5, "nan", [1, 2.0])
    assert lines[3]["error"] == "OSError: no room"


def test_nothing_begins_after_the_deadline(tmp_path: Path) -> None:
    lines = outcome([of(Case("late", fails)), of()], tmp_path, minutes=0.0)
    assert [("skipped" in line, "error" in line) for line in lines] == [(True, False)] * 2


def test_without_a_device_it_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["--sections", "environment"]) == 2
    assert "--tiny --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--output", "."], "--output"),
        (["--output", "missing/lines.jsonl"], "--output"),
        (["--scratch", "missing"], "--scratch"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
    ],
)
def test_wrong_options_end_before_anything_runs(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--tiny", "--device", "cpu", *words])
    assert stop.value.code == 2
    assert f"error: {option}" in capsys.readouterr().err
