"""Saving in a real run: beside training, by time, what is saved, and when it fails."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from launcher.checkpoint.catalog import published
from launcher.weights.ranks.saves import open_any_format
from tests.ranks import JobResult, run_job
from tests.weights.content import content
from tests.workshop import Workshop

FOUR = {"parallel_config": {"data_parallel": 2, "model_parallel": 2},
        "runner_config": {"batch_size": 4}}  # fmt: skip


def train(
    workshop: Workshop, output: str, monitor: dict[str, Any], world: int = 1, **changes: Any
) -> JobResult:
    """A run with this CheckpointMonitor; the user's own callbacks come after it."""
    more = changes.pop("more", [])
    callbacks = [{"type": "CheckpointMonitor", "save_checkpoint_steps": 5, **monitor}, *more]
    name = workshop.yaml(f"{output}.yaml", callbacks=callbacks, output_dir=output, **changes)
    return run_job(["--config", name, "--run_mode", "train"], workshop.folder, world)


def files(workshop: Workshop, output: str) -> dict[str, bytes]:
    """Rank files and states, by path."""
    root = workshop.folder / output / "checkpoint"
    found = [*root.glob("rank_*/*.safetensors"), *root.glob("state/*.json")]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(found)}


@pytest.mark.parametrize("world", [1, 4])
def test_a_save_beside_training_is_the_save_of_its_step(workshop: Workshop, world: int) -> None:
    changes = FOUR if world == 4 else {}
    for output, how in (("waits", False), ("beside", True)):
        result = train(workshop, output, {"async_save": how}, world, **changes)
        assert result.code == 0, result.stderr
    assert "in the background, training waited" in result.stdout
    assert "saved step 20 as CKP-1_20" in result.stdout
    assert len(published(workshop.folder / "beside/checkpoint")) == 4
    waited, beside = files(workshop, "waits"), files(workshop, "beside")
    assert [*waited] == [*beside]
    assert len(waited) == 4 * (world + 1)
    for name, raw in waited.items():
        if name.endswith(".safetensors"):
            assert raw == beside[name], name
    assert workshop.losses("waits") == workshop.losses("beside")
    if world == 1:
        saves_on_a_late_device(workshop, waited)


LATE = """
from launcher.streams import STREAMS
from launcher.train.callbacks import Callback
from tests.streams import LateStreams

STREAMS["cpu"] = lambda device: LATE
LATE = LateStreams()

class Late(Callback):
    \"\"\"Copies are made when somebody waits for them. Reports what was called.\"\"\"

    def on_train_end(self, run):
        for call in LATE.calls:
            run.log(f"late: {call.what} in {call.thread}")
"""


def saves_on_a_late_device(workshop: Workshop, expected: dict[str, bytes]) -> None:
    """As late as an update allows: a wait that is missing would save values of the next step."""
    (workshop.folder / "late.py").write_text(LATE)
    more = {"register_path": "late.py", "more": [{"type": "Late"}]}
    result = train(workshop, "late", {"async_save": True}, **more)
    assert result.code == 0, result.stderr
    calls = [line.partition("late: ")[2] for line in result.stdout.splitlines() if "late: " in line]
    assert calls.count("register in pin") == 1
    assert calls.count("current waits in MainThread") == 3, "before the update after each save"
    assert calls.count("synchronize in save") == 4
    assert workshop.losses("late") == workshop.losses("waits")
    found = files(workshop, "late")
    assert [*found] == [*expected]
    for name, raw in expected.items():
        assert raw == found[name] or not name.endswith(".safetensors"), name


SPOILER = """
import threading
import time
from launcher.train.callbacks import Callback

class Spoiler(Callback):
    \"\"\"Puts a file where a folder of the checkpoints should be, and takes it away again.\"\"\"

    def __init__(self, begin, end, raises=False):
        self.begin, self.end, self.raises = begin, end, raises

    def on_steps_end(self, run, records):
        rank = run.world.size - 1
        folder = run.output_dir / "checkpoint" / f"rank_{rank}"
        if run.world.rank == rank and records[-1].step == self.begin:
            while not (folder / "meta.json").exists():
                time.sleep(0.01)  # the save before may be under way
            folder.rename(folder.with_name("aside"))
            folder.write_text("not a folder")
        if run.world.rank == rank and records[-1].step == self.end:
            while any(thread.name == "save" for thread in threading.enumerate()):
                time.sleep(0.01)  # a save beside training has not failed yet
            folder.unlink()
            folder.with_name("aside").rename(folder)
        if self.raises and records[-1].step == self.end:
            raise RuntimeError("the user's own")
"""


@pytest.mark.parametrize("how", [False, True], ids=["waits", "beside"])
@pytest.mark.parametrize("world", [1, 4])
def test_a_run_goes_on_when_a_save_fails(workshop: Workshop, world: int, how: bool) -> None:
    (workshop.folder / "mine.py").write_text(SPOILER)
    changes = FOUR if world == 4 else {}
    spoiler = {"type": "Spoiler", "begin": 8, "end": 13}
    result = train(
        workshop, "output", {"async_save": how}, world, more=[spoiler],
        register_path="mine.py", **changes,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    assert "warning: step 10 was not saved: the checkpoint could not be saved" in result.stdout
    assert f"rank {world - 1}: " in result.stdout
    root = workshop.folder / "output/checkpoint"
    assert [c.manifest["global_step"] for c in published(root)] == [5, 15, 20]
    assert not [path for path in root.rglob("*") if "1_10" in path.name]
    assert len(workshop.losses()) == 20


@pytest.mark.parametrize("how", [False, True], ids=["waits", "beside"])
def test_a_run_that_is_to_stop_when_a_save_fails(workshop: Workshop, how: bool) -> None:
    (workshop.folder / "mine.py").write_text(SPOILER)
    spoiler = {"type": "Spoiler", "begin": 8, "end": 1000}
    result = train(
        workshop, "output", {"async_save": how, "on_save_error": "stop"}, 4, more=[spoiler],
        register_path="mine.py", **FOUR,
    )  # fmt: skip
    assert result.codes == [2, 2, 2, 2]
    assert "the checkpoint could not be saved: rank 3" in result.stderr
    assert 10 <= len(workshop.losses()) < 20
    root = workshop.folder / "output/checkpoint"
    assert [c.manifest["global_step"] for c in published(root)] == [5]


def test_a_last_save_that_fails_is_a_failed_run(workshop: Workshop) -> None:
    (workshop.folder / "mine.py").write_text(SPOILER)
    spoiler = {"type": "Spoiler", "begin": 12, "end": 1000}
    result = train(workshop, "output", {}, more=[spoiler], register_path="mine.py")
    assert result.code == 2
    assert "warning: step 15 was not saved" in result.stdout
    assert "the checkpoint could not be saved: rank 0" in result.stderr
    assert len(workshop.losses()) == 20


FAILING = """
from launcher.train.callbacks import Callback

class Failing(Callback):
    def on_steps_end(self, run, records):
        if records[-1].step == 8:
            raise RuntimeError("the user's own")
"""


@pytest.mark.parametrize("how", [False, True], ids=["waits", "beside"])
def test_a_run_that_fails_saves_its_last_complete_step(workshop: Workshop, how: bool) -> None:
    (workshop.folder / "mine.py").write_text(FAILING)
    monitor = {"exception_save": True, "async_save": how}
    result = train(workshop, "output", monitor, more=[{"type": "Failing"}], register_path="mine.py")
    assert result.code == 1
    assert "the user's own" in result.stderr
    root = workshop.folder / "output/checkpoint"
    assert [c.manifest["global_step"] for c in published(root)] == [5, 8]
    resumed = train(workshop, "output", {}, resume_training=True)
    assert resumed.code == 0, resumed.stderr
    assert train(workshop, "whole", {}).code == 0
    assert workshop.losses("output") == workshop.losses("whole")


SLOW = """
import time
from launcher.train.callbacks import Callback

class Slow(Callback):
    def on_steps_end(self, run, records):
        time.sleep(0.3)
"""


def test_saves_by_time(workshop: Workshop) -> None:
    """10 steps take 3 s at least: a save a second, or the last one alone."""
    (workshop.folder / "mine.py").write_text(SLOW)
    for seconds, more in ((1, [{"type": "Slow"}]), (3600, [])):
        monitor = {"save_checkpoint_steps": 0, "save_checkpoint_seconds": seconds}
        result = train(
            workshop, f"every_{seconds}", monitor | {"keep_checkpoint_max": 0},
            more=more, register_path="mine.py", runner_config={"max_steps": 10},
        )  # fmt: skip
        assert result.code == 0, result.stderr
        saved = published(workshop.folder / f"every_{seconds}/checkpoint")
        assert saved[-1].manifest["global_step"] == 10
        assert len(saved) >= 3 if more else len(saved) == 1


def test_a_limit_in_time_without_effect_is_logged(workshop: Workshop) -> None:
    limits = {"save_checkpoint_seconds": 60, "keep_checkpoint_per_n_minutes": 10}
    result = train(workshop, "output", limits, runner_config={"max_steps": 1})
    assert (
        "save_checkpoint_seconds: 60 has no effect: save_checkpoint_steps is 5. Set that to 0"
    ) in result.stdout
    assert "keep_checkpoint_per_n_minutes: 10 has no effect: keep_checkpoint_max is 5" in (
        result.stdout
    )


@pytest.mark.parametrize("how", [False, True], ids=["waits", "beside"])
def test_all_that_can_be_saved(workshop: Workshop, how: bool) -> None:
    everything = {
        "async_save": how, "integrated_save": True, "save_network_params": True,
        "save_trainable_params": True, "remove_redundancy": True, "keep_checkpoint_max": 2,
    }  # fmt: skip
    result = train(workshop, "output", everything, 4, **FOUR)
    assert result.code == 0, result.stderr
    output = workshop.folder / "output"
    kept = {"CKP-1_15", "CKP-1_20"}
    for folder in ("checkpoint", "checkpoint_network", "checkpoint_trainable"):
        assert {str(c.name) for c in published(output / folder)} == kept
    integrated = output / "checkpoint_integrated"
    assert {path.name for path in integrated.iterdir()} == kept
    full = content(open_any_format(output / "checkpoint", "1_20"))
    weights = {n: v for n, v in full.items() if not n.startswith(("exp_avg", "adam"))}
    network = content(open_any_format(output / "checkpoint_network", "1_20"))
    assert network == content(open_any_format(output / "checkpoint_trainable", "1_20"))
    assert network == {name: weights[name] for name in network}
    model = AutoModelForCausalLM.from_pretrained(integrated / "CKP-1_20")
    assert {name for name, _ in model.named_parameters()} == network.keys()
    assert content(open_any_format(integrated / "CKP-1_20")) == network


ASKING = """
from pathlib import Path
from launcher.train.callbacks import Callback

class Asking(Callback):
    def on_steps_end(self, run, records):
        if run.world.is_main and records[-1].step == 7:
            Path("exit.json").write_text('{"GracefulExit": 1}')
"""


@pytest.mark.parametrize("world", [1, 4])
def test_a_file_requests_a_stop(workshop: Workshop, world: int) -> None:
    (workshop.folder / "mine.py").write_text(ASKING)
    changes = FOUR if world == 4 else {}
    more = [{"type": "Asking"}, {"type": "OnRequestExit", "config_file": "exit.json"}]
    result = train(workshop, "output", {}, world, more=more, register_path="mine.py", **changes)
    assert set(result.codes) == {0}
    assert "stopped by a request to stop" in result.stdout
    assert "exit.json requests a stop: stopping after one more step" in result.stdout
    last = published(workshop.folder / "output/checkpoint")[-1].manifest["global_step"]
    assert last == len(workshop.losses()) in (8, 9)
    (workshop.folder / "exit.json").unlink()
    resumed = train(workshop, "output", {}, world, resume_training=True, **changes)
    assert resumed.code == 0, resumed.stderr
    assert len(workshop.losses()) == 20
