"""Console, logs, metrics, loss curve and trackers."""

from __future__ import annotations

import io
import json

import pytest

from launcher.errors import UserError
from launcher.report.aside import move_to_numbered_folder, write_new
from launcher.report.console import Console, close_logs, open_logs
from launcher.report.curves import MAX_SOURCES, draw_loss, source_losses
from launcher.report.metrics import MetricsLog, Start, read_rows
from launcher.report.progress import Pace, bar, duration, progress_line
from launcher.report.trackers import flatten, open_trackers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_progress_is_one_line_below_the_messages() -> None:
    stream = Terminal()
    console = Console(enabled=True, stream=stream)
    console.progress("step 1")
    console.log("saved")
    console.progress("step 2", last=True)
    assert stream.getvalue() == "\r\033[Kstep 1\r\033[Ksaved\nstep 1\r\033[Kstep 2\n"


def test_elsewhere_progress_is_a_plain_line_per_interval() -> None:
    stream = io.StringIO()
    console = Console(enabled=True, stream=stream)
    for step in range(100):
        console.progress(f"step {step}")
    console.progress("step 100", last=True)
    assert stream.getvalue() == "step 0\nstep 100\n"


def test_only_the_main_process_prints_but_every_rank_has_a_log(tmp_path) -> None:
    stream = io.StringIO()
    open_logs(tmp_path, 3)
    Console(enabled=False, stream=stream).log("here")
    close_logs()
    assert stream.getvalue() == ""
    assert "here" in (tmp_path / "log/rank_3/info.log").read_text()
    assert (tmp_path / "log/rank_3/error.log").read_text() == ""


def test_names_that_are_not_utf_8_reach_the_log(
    tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_logs(tmp_path, 0)
    Console(enabled=True, stream=io.TextIOWrapper(io.BytesIO(), "utf-8")).log(
        "data: caf\udce9.json"
    )
    close_logs()
    assert "data: caf\\udce9.json" in (tmp_path / "log/rank_0/info.log").read_text()
    assert "Logging error" not in capsys.readouterr().err


def test_the_progress_line() -> None:
    line = progress_line(step=3, total=12, loss=2.5, lr=1e-4, grad_norm=0.5,
                         tokens_per_second=12345.6, remaining_seconds=75)  # fmt: skip
    assert line == ("█████··············· step 3/12  loss 2.5000  lr 0.0001  grad norm 0.500  "
                    "12,346 tokens/s  1:15 left")  # fmt: skip
    line = progress_line(step=3, total=12, loss=2.5, lr=1e-4, grad_norm=0.5,
                         tokens_per_second=12345.6, remaining_seconds=75,
                         source_losses={"code": 1.234, "wiki": 3})  # fmt: skip
    assert "  loss 2.5000 (code 1.23, wiki 3.00)  lr 0.0001" in line
    line = progress_line(step=3, total=12, loss=2.5, lr=1e-4, grad_norm=0.5,
                         tokens_per_second=12345.6, remaining_seconds=75, mfu=0.4312,
                         peak_memory_bytes=61 << 30, data_share=0.041)  # fmt: skip
    assert line.endswith("12,346 tokens/s  MFU 43.1%  61.0 GiB  data 4%  1:15 left")
    assert (bar(0), bar(1)) == ("·" * 20, "█" * 20)
    assert (duration(59), duration(3723)) == ("0:59", "1:02:03")


def test_the_pace_forgets_a_slow_first_step() -> None:
    pace = Pace()
    pace.remaining(1, 101, 60.0)
    for step in range(2, 101):
        left = pace.remaining(step, 101, 1.0)
    assert left == pytest.approx(1.0, abs=0.1)


def test_a_resumed_run_drops_the_rows_it_makes_again(tmp_path) -> None:
    with MetricsLog(tmp_path, Start.FRESH) as log:
        for step in range(1, 6):
            log.add({"step": step, "loss": float(step), "consumed_samples": 8 * step})
            log.add({"step": step, "eval_loss": 1.0})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 6, "lo')  # cut by a crash
    with MetricsLog(tmp_path, Start.SAME, 24) as log:
        log.add({"step": 4, "loss": float("nan")})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4]
    assert rows[-1]["loss"] is None


def test_a_fresh_run_moves_older_metrics_aside(tmp_path) -> None:
    for run in range(3):
        with MetricsLog(tmp_path, Start.FRESH) as log:
            log.add({"step": run})
    found = {path.name: read_rows(path)[0]["step"] for path in tmp_path.glob("metrics*.jsonl")}
    assert found == {"metrics-1.jsonl": 0, "metrics-2.jsonl": 1, "metrics.jsonl": 2}


def test_a_run_resumed_from_an_earlier_save_keeps_the_later_rows(tmp_path) -> None:
    with MetricsLog(tmp_path, Start.FRESH) as log:
        for step in range(1, 6):
            log.add({"step": step, "consumed_samples": 8 * step})
    with MetricsLog(tmp_path, Start.BRANCH, 16) as log:
        log.add({"step": 3, "consumed_samples": 24})
    steps = {path.name: [row["step"] for row in read_rows(path)] for path in tmp_path.iterdir()}
    assert steps == {"metrics.jsonl": [1, 2, 3], "metrics-1.jsonl": [1, 2, 3, 4, 5]}


def test_files_of_an_earlier_run_go_to_a_numbered_folder(tmp_path) -> None:
    folder = tmp_path / "strategy"
    folder.mkdir()
    for text in "ab":
        for rank in "01":
            (folder / rank).write_text(text)
            move_to_numbered_folder(folder / rank)
    found = {f"{p.parent.name}/{p.name}": p.read_text() for p in tmp_path.glob("strategy-*/*")}
    assert found == {"strategy-1/0": "a", "strategy-1/1": "a", "strategy-2/0": "b",
                     "strategy-2/1": "b"}  # fmt: skip


def test_text_of_an_earlier_run_is_moved_aside_once(tmp_path) -> None:
    path = tmp_path / "resolved.yaml"
    for text in ("a", "a", "b", "b", "c"):
        write_new(path, text)
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {"resolved.yaml": "c", "resolved-1.yaml": "a", "resolved-2.yaml": "b"}


def test_the_curve_is_a_picture(tmp_path) -> None:
    rows = [{"step": s, "loss": 5.0 / s} for s in range(1, 30)]
    rows += [{"step": 29, "eval_loss": 1.0}, {"step": 30, "loss": None}]
    assert draw_loss(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    assert not draw_loss([], tmp_path / "none.png")


def test_sources_of_a_mixture_have_curves(tmp_path) -> None:
    rows = [{"step": 1, "loss": 2.0, "loss/a": 1.0, "loss/b": 3.0},
            {"step": 2, "loss": 2.0, "loss/b": 2.5, "loss/c": None}]  # fmt: skip
    assert source_losses(rows) == {"a": [(1, 1.0)], "b": [(1, 3.0), (2, 2.5)]}
    assert draw_loss(rows, tmp_path / "loss.png")
    many = [{"step": 1, "loss": 2.0, **{f"loss/{n}": 1.0 for n in range(MAX_SOURCES + 1)}}]
    assert source_losses(many) == {}


def test_tensorboard_gets_the_numbers(tmp_path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {"seed": 1, "a": {"b": [1]}}, cpu=True)
    tracker.log({"loss": 2.5}, step=3)
    tracker.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "rank_0")).Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (3, 2.5)
    assert flatten({"a": {"b": 1, "c": None, "d": [1]}}) == {"a.b": 1, "a.d": "[1]"}


def test_a_tracker_that_is_not_installed_is_named(tmp_path) -> None:
    with pytest.raises(
        UserError, match=r"trackers: comet_ml is not installed.* pip install comet-ml"
    ):
        open_trackers(["comet_ml"], tmp_path, {}, cpu=True)
    assert open_trackers([], tmp_path, {}, cpu=True) == []
