"""Metrics, curve, logs, trackers, the resolved configuration, and callbacks of the user."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

LOSS_LINE = re.compile(
    r"\{ Epoch:\[ *(\d+)/ *(\d+)\], step:\[ *(\d+)/ *(\d+)\], loss: [\d.]+, per_step_time: \d+ms, "
    r"lr: [\d.e-]+, overflow cond: False, loss_scale: 1.0, global_norm: \[[\d.]+\], "
    r"train_throughput_per_npu: [\d.]+ samples/s/p \}"
)


def train(workshop: Workshop, name: str, *more: str, world: int = 1) -> JobResult:
    return run_job(["--config", name, "--run_mode", "train", *more], workshop.folder, world)


def test_metrics_curve_logs_and_the_original_loss_line(workshop: Workshop) -> None:
    name = workshop.yaml(
        do_eval=True,
        eval_step_interval=10,
        eval_dataset={
            "data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus", "num_samples": 1},
            "seq_length": 32,
            "packing": True,
        },
        callbacks=[{"type": "MFLossMonitor", "per_print_times": 5}],
        runner_config={"batch_size": 4},
        parallel_config={"data_parallel": 2},
        tensorboard={"tensorboard_dir": "board"},
        device_peak_tflops=1e-6,
    )
    arguments = ["--config", name, "--run_mode", "train"]
    result = run_job(arguments, workshop.folder, 2, draws=True)
    assert result.code == 0, result.stderr
    steps = [row for row in workshop.rows() if "loss" in row]
    keys = {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second",
            "consumed_samples", "mfu", "peak_memory_bytes", "data_wait_seconds"}  # fmt: skip
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert all(keys <= row.keys() for row in steps)
    assert all(0 <= row["data_wait_seconds"] <= row["seconds"] for row in steps)
    assert len({round(row["mfu"] / row["tokens_per_second"], 6) for row in steps}) == 1
    assert "  MFU " in result.stdout
    evaluations = [row for row in workshop.rows() if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [10, 20]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    lines = LOSS_LINE.findall(result.stdout)
    assert [int(step) for _, _, step, _ in lines] == [5, 10, 15, 20]
    output = workshop.folder / "output"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    for rank in (0, 1):
        assert "step:[    5/" in (output / f"log/rank_{rank}/info.log").read_text()
    assert list((workshop.folder / "board/rank_0").glob("events.out.tfevents.*"))


def test_the_resolved_configuration_gives_the_same_run(workshop: Workshop) -> None:
    name = workshop.yaml()
    assert train(workshop, name, "--batch_size", "4").code == 0
    resolved = workshop.folder / "output" / "resolved.yaml"
    assert "# command line: --batch_size" in resolved.read_text()
    assert yaml.safe_load(resolved.read_text())["runner_config"]["batch_size"] == 4
    again = run_job(["--config", str(resolved), "--output_dir", "again"], workshop.folder)
    assert again.code == 0, again.stderr
    assert workshop.losses("again") == workshop.losses("output")


CALLBACKS = """
from launcher.train.callbacks import Callback

class Recorder(Callback):
    def __init__(self, path, flavour="plain"):
        if not isinstance(path, str):
            raise TypeError("a path is a text")
        self.path = path

    def note(self, text):
        with open(self.path, "a") as file:
            file.write(text + "\\n")

    def on_train_begin(self, run):
        self.note("begin")

    def on_steps_end(self, run, records):
        self.note(" ".join(str(record.step) for record in records))

    def on_train_end(self, run):
        self.note("end")
"""


def test_a_callback_of_the_user_sees_each_sink_once(workshop: Workshop) -> None:
    (workshop.folder / "mine.py").write_text(CALLBACKS)
    name = workshop.yaml(
        register_path="mine.py",
        callbacks=[{"type": "Recorder", "path": "seen.txt"}],
        runner_config={"sink_mode": True, "sink_size": 8},
    )
    result = train(workshop, name)
    assert result.code == 0, result.stderr
    assert (workshop.folder / "seen.txt").read_text().splitlines() == [
        "begin", "1 2 3 4 5 6 7 8", "9 10 11 12 13 14 15 16", "17 18 19 20", "end",
    ]  # fmt: skip
    assert len(workshop.losses()) == 20


WRONG = {
    "unknown class": (
        {"type": "Recorde"},
        ["callbacks.0.type = 'Recorde'", "did you mean `Recorder`?"],
    ),
    "constructor that fails": (
        {"type": "Recorder", "path": ["x"]},
        ["Recorder(path=['x']) failed: TypeError: a path is a text"],
    ),
    "unknown argument": (
        {"type": "Recorder", "path": "x", "flavor": "y"},
        ["unexpected keyword argument 'flavor'", "did you mean `flavour`?", "run.yaml:"],
    ),
    "missing argument": ({"type": "Recorder"}, ["missing a required argument: 'path'"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_for_a_callback_of_the_user(workshop: Workshop, case: str) -> None:
    entry, texts = WRONG[case]
    (workshop.folder / "mine.py").write_text(CALLBACKS)
    result = train(workshop, workshop.yaml(register_path="mine.py", callbacks=[entry]))
    assert result.code == 2
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr


def test_sinks_name_checkpoints_by_sink(workshop: Workshop) -> None:
    name = workshop.yaml(runner_config={"sink_mode": True, "sink_size": 5})
    assert train(workshop, name).code == 0
    files = {path.name for path in (workshop.folder / "output/checkpoint/rank_0").glob("*.saf*")}
    assert files == {"CKP_rank_0-2_5.safetensors", "CKP_rank_0-4_5.safetensors"}


def test_a_second_run_in_the_same_folder_takes_its_own_names(workshop: Workshop) -> None:
    name = workshop.yaml()
    assert train(workshop, name).code == 0
    first = workshop.saved("output", "1_20")
    assert train(workshop, name).code == 0
    names = {path.name for path in (workshop.folder / "output/checkpoint/manifest").iterdir()}
    assert names == {"CKP-1_10.json", "CKP-1_20.json", "CKP_1-1_10.json", "CKP_1-1_20.json"}
    root = workshop.folder / "output" / "checkpoint"
    assert all((root / path).read_bytes() == content for path, content in first.items())
    assert (root / "rank_0/CKP_rank_0_1-1_20.safetensors").read_bytes() == first[
        "rank_0/CKP_rank_0-1_20.safetensors"
    ], "the same seed gives the same run"


def test_a_step_that_is_not_finite_can_end_the_run_and_is_never_saved(workshop: Workshop) -> None:
    name = workshop.yaml(
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 1}],
        check_for_nan_in_loss_and_grad=True,
        lr_schedule={"learning_rate": 1e30, "warmup_steps": 0},
        runner_wrapper={"use_clip_grad": False},
    )
    result = train(workshop, name)
    assert result.code == 2
    assert "samples 8 to 15: step 2: loss" in result.stderr
    manifests = (workshop.folder / "output/checkpoint/manifest").iterdir()
    assert [path.name for path in manifests] == ["CKP-1_1.json"]
    assert [row["grad_norm"] for row in workshop.rows()][1] is None, "the row says what happened"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "mine.py:1: register_path = 'mine.py': this is not valid Python"),
        ("import nothing_of_that_name\nclass P: ...\n", "mine.py:1: register_path: importing"),
    ],
)
def test_a_broken_file_of_callbacks_is_a_mistake_of_the_user(
    workshop: Workshop, text: str, message: str
) -> None:
    (workshop.folder / "mine.py").write_text(text)
    result = train(workshop, workshop.yaml(register_path="mine.py", callbacks=[{"type": "P"}]))
    assert result.code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_that_is_no_longer_finite_warns_once(workshop: Workshop) -> None:
    name = workshop.yaml(lr_schedule={"learning_rate": 1e30, "warmup_steps": 0}, callbacks=[])
    result = train(workshop, name)
    assert result.code == 0
    assert result.stdout.count("warning: samples") == 1


def test_folders_that_cannot_be_written_are_errors_before_training(workshop: Workshop) -> None:
    (workshop.folder / "file").write_text("")
    name = workshop.yaml()
    for arguments in (
        ["--output_dir", "file/inside"],
        ["callbacks.0.directory=file"],
        ["tensorboard.tensorboard_dir=file"],
    ):
        result = train(workshop, name, *arguments)
        assert result.code == 2, arguments
        assert "Traceback" not in result.stderr
        assert not (workshop.folder / "output/metrics.jsonl").exists() or not workshop.rows()


def test_sinks_go_on_at_their_own_borders_after_a_resume(workshop: Workshop) -> None:
    name = workshop.yaml(
        runner_config={"sink_mode": True, "sink_size": 5},
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 5}],
    )
    assert train(workshop, name, "--runner_config.stop_step", "13").code == 0
    result = train(workshop, name, "--resume_training", "True")
    assert result.code == 0, result.stderr
    names = {path.name for path in (workshop.folder / "output/checkpoint/manifest").iterdir()}
    assert names == {
        "CKP-1_5.json", "CKP-2_5.json", "CKP-3_5.json", "CKP_1-3_5.json", "CKP_1-4_5.json",
    }  # fmt: skip
    assert "saved step 15 as CKP_1-3_5" in result.stdout


def test_what_a_finished_run_left_outlives_a_forgotten_resume(workshop: Workshop) -> None:
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 5, "keep_checkpoint_max": 1,
               "integrated_save": True}  # fmt: skip
    name = workshop.yaml(callbacks=[monitor])
    assert train(workshop, name).code == 0
    output = workshop.folder / "output"
    before = {
        path.relative_to(output): path.read_bytes()
        for folder in ("checkpoint", "checkpoint_integrated")
        for path in (output / folder).rglob("*") if path.is_file() and path.name != "meta.json"
    }  # fmt: skip
    rows, resolved = workshop.rows(), (output / "resolved.yaml").read_text()
    result = train(workshop, name, "--seed", "8", "--runner_config.stop_step", "10")
    assert result.code == 0, result.stderr
    assert "removed" not in result.stdout
    assert "1 save(s) of earlier runs (CKP) are kept" in result.stdout
    assert "renamed: output/metrics-1.jsonl, output/loss-1.png" in result.stdout
    assert {path: (output / path).read_bytes() for path in before} == before
    aside = (output / "metrics-1.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in aside] == rows
    assert (output / "resolved-1.yaml").read_text() == resolved
    names = {path.name for path in (output / "checkpoint/manifest").iterdir()}
    assert names == {"CKP-1_20.json", "CKP_1-1_10.json"}


def test_a_run_in_the_folder_of_another_one_keeps_its_metrics(workshop: Workshop) -> None:
    """Resumed from elsewhere: the rows in the folder are not those of the run it goes on from."""
    name = workshop.yaml()
    for output, more in (("store", ("--runner_config.stop_step", "10")), ("output", ())):
        assert train(workshop, name, "--output_dir", output, *more).code == 0
    rows = workshop.rows()
    arguments = ("--load_checkpoint", "store/checkpoint", "--resume_training", "True")
    assert train(workshop, name, *arguments).code == 0
    aside = (workshop.folder / "output/metrics-1.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in aside] == rows
    assert [row["step"] for row in workshop.rows()] == list(range(11, 21))


def test_the_history_of_a_run_is_that_of_the_save_it_goes_on_from(workshop: Workshop) -> None:
    """Going back in the newest run shares its first rows; in an older one they lie elsewhere."""
    name = workshop.yaml(
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 5,
                    "keep_checkpoint_max": 9}]
    )  # fmt: skip
    assert train(workshop, name).code == 0
    back = ("--resume_training", "CKP_rank_0-1_5")
    assert train(workshop, name, *back).code == 0
    assert [row["step"] for row in workshop.rows()] == list(range(1, 21))
    assert train(workshop, name, "--seed", "8").code == 0
    assert train(workshop, name, *back).code == 0
    assert [row["step"] for row in workshop.rows()] == list(range(6, 21))
    asides = [f"metrics-{number}.jsonl" for number in (1, 2, 3)]
    assert all((workshop.folder / "output" / aside).is_file() for aside in asides)


@pytest.mark.parametrize(("final", "saved"), [(True, ["CKP-1_20.json"]), (False, [])])
def test_a_run_without_a_monitor_saves_its_last_step(
    workshop: Workshop, final: bool, saved: list[str]
) -> None:
    name = workshop.yaml(callbacks=[], final_checkpoint=final)
    result = train(workshop, name)
    assert result.code == 0, result.stderr
    manifests = workshop.folder / "output/checkpoint/manifest"
    assert [path.name for path in manifests.glob("*")] == saved
    before_training = result.stdout.split("step 1/20")[0]
    if final:
        assert "the last step is saved to output/checkpoint (final_checkpoint: " in before_training
    else:
        assert "warning: nothing will be saved" in before_training


def test_the_size_of_saves_is_logged_before_the_first_step(workshop: Workshop) -> None:
    name = workshop.yaml(
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 2,
                    "keep_checkpoint_max": 3, "integrated_save": True,
                    "save_network_params": True}]
    )  # fmt: skip
    result = train(workshop, name)
    assert result.code == 0, result.stderr
    before_training, after = result.stdout.split("step 1/20")
    reported = re.search(
        r"checkpoint: each save takes ([\d.]+) MB, 3 kept: ([\d.]+) MB together, .* are free",
        before_training,
    )
    assert reported is not None, before_training
    folders = ("checkpoint/rank_0", "checkpoint_network/rank_0", "checkpoint_integrated/CKP-1_20")
    files = [f for d in folders for f in (workshop.folder / "output" / d).glob("*1_20.saf*")]
    files += (workshop.folder / "output" / folders[2]).glob("*.safetensors")
    assert len(files) == 3
    assert float(reported[1]) == pytest.approx(sum(f.stat().st_size for f in files) / 1e6, rel=0.15)
    assert float(reported[2]) == pytest.approx(3 * float(reported[1]), abs=0.2)
    assert after.count("set save_checkpoint_steps to ") == 1, (
        "steps of a toy are shorter than saves"
    )


@pytest.mark.parametrize(
    ("warmup", "stop", "warning"), [(20, 20, "run of 20"), (19, 20, ""), (5, 5, "stops at step 5")]
)
def test_a_warm_up_that_never_reaches_its_peak_is_logged(
    workshop: Workshop, warmup: int, stop: int, warning: str
) -> None:
    name = workshop.yaml(
        lr_schedule={"warmup_steps": warmup}, runner_config={"stop_step": stop}, callbacks=[],
        final_checkpoint=False,
    )  # fmt: skip
    result = train(workshop, name)
    assert ("the learning rate never reaches" in result.stdout) == bool(warning)
    assert warning in result.stdout
    reached = any(row["lr"] == 1e-2 for row in workshop.rows())
    assert reached != bool(warning)
