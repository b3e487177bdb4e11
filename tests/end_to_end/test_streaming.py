"""A run on a stream: killed and resumed, moved to another number of ranks, with another cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.tools import inspect_data
from tests.end_to_end.test_machines import Machines
from tests.end_to_end.test_processes import TORCHRUN, start
from tests.ranks import run_job, start_job
from tests.workshop import Workshop

STEPS = 16
LOADER = {"type": "HFDataLoader", "dataset_files": ["shards"], "dataset_dir": "",
          "streaming": True, "shuffle_buffer": 20}  # fmt: skip

PAUSE = """\
import signal

from launcher.train.callbacks import Callback


class Pause(Callback):
    \"\"\"Waits to be killed after step 10, where the save of step 8 is published.\"\"\"

    def on_steps_end(self, run, records):
        if run.global_step == 10:
            signal.pause()
"""


@pytest.fixture(scope="module")
def shop(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """With shards of JSON lines and Parquet: the lines of the corpus in small documents."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    workshop = materials.copy_to(tmp_path_factory.mktemp("streams"))
    lines = [line for path in sorted((workshop.folder / "corpus").iterdir())
             for line in path.read_text().splitlines() if line.strip()]  # fmt: skip
    texts = ["\n".join(lines[at : at + 3]) for at in range(0, len(lines), 3)]
    folder = workshop.folder / "shards"
    folder.mkdir()
    third = len(texts) // 3
    for number, part in enumerate((texts[:third], texts[third : 2 * third])):
        records = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{number}.jsonl").write_text(records)
    write_table(pa.table({"text": texts[2 * third :]}), folder / "2.parquet", row_group_size=50)
    return workshop


def yaml(workshop: Workshop, output: str, world: int = 1, *, pauses: bool = False) -> str:
    (workshop.folder / "pause.py").write_text(PAUSE)
    monitor = {"type": "CheckpointMonitor", "save_checkpoint_steps": 4}
    return workshop.yaml(
        f"{output}{pauses}.yaml", output_dir=output, train_dataset={"data_loader": LOADER},
        runner_config={"batch_size": 8 // world, "max_steps": STEPS},
        parallel_config={"data_parallel": world}, resume_training=True,
        callbacks=[monitor, {"type": "Pause"}] if pauses else [monitor],
        register_path="pause.py",
    )  # fmt: skip


def has_steps(workshop: Workshop, output: str, steps: int) -> bool:
    path = workshop.folder / output / "metrics.jsonl"
    return path.exists() and len(path.read_text().splitlines()) >= steps


@pytest.fixture(scope="module")
def whole(shop: Workshop) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of the run that is not interrupted."""
    result = run_job(["--config", yaml(shop, "whole"), "--run_mode", "train"], shop.folder)
    assert result.code == 0, result.stderr
    assert "data: streaming" in result.stdout
    assert not list((shop.folder / "whole").rglob("ring-*"))
    return shop.rows("whole")


def test_a_run_that_is_killed_continues_bit_for_bit(
    shop: Workshop, whole: list[dict[str, Any]]
) -> None:
    paused, name = yaml(shop, "parts", pauses=True), yaml(shop, "parts")
    job = start_job(["--config", paused, "--run_mode", "train"], shop.folder)
    while not has_steps(shop, "parts", 10):
        assert job.process.is_alive(), job.end()
        time.sleep(0.005)
    job.process.kill()
    assert job.end()[0] == -signal.SIGKILL
    rings = list((shop.folder / "parts").rglob("ring-*"))
    shutil.copytree(shop.folder / "parts", shop.folder / "moved")
    result = run_job(["--config", name, "--run_mode", "train"], shop.folder)
    assert result.code == 0, result.stderr
    assert [row["loss"] for row in shop.rows("parts")[-8:]] == [row["loss"] for row in whole[-8:]]
    one, other = shop.saved("parts", "1_16"), shop.saved("whole", "1_16")
    for name, content in one.items():
        assert content == other[name] or name.endswith(".json")  # it has the name of the folder
    assert not any(ring.exists() for ring in rings)


def test_other_ranks_without_the_cache_train_on_the_same_samples(
    shop: Workshop, whole: list[dict[str, Any]]
) -> None:
    """The cursor in the checkpoint is enough: no block before it is made."""
    shutil.rmtree(shop.folder / "moved/dataset_cache")
    result = run_job(["--config", yaml(shop, "moved", 2), "--run_mode", "train"], shop.folder, 2)
    assert result.code == 0, result.stderr
    after = shop.rows("moved")
    for row, same in zip(after[-4:], whole[-4:], strict=True):
        assert row["tokens"] == same["tokens"]
        assert row["consumed_samples"] == same["consumed_samples"]
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)
    journal = next((shop.folder / "moved/dataset_cache").glob("stream-*/journal")).read_bytes()
    [state] = (shop.folder / "moved/checkpoint/state").glob("*-1_8.json")
    cursor = json.loads(state.read_text())["data_cursor"]
    assert cursor["block"] > 0
    assert int.from_bytes(journal[:8], "little") == cursor["block"] + 1


def test_other_data_are_refused(shop: Workshop, whole: list[dict[str, Any]]) -> None:
    changes = {"train_dataset": {"data_loader": LOADER | {"shuffle_buffer": 21}}}
    name = shop.yaml("other.yaml", output_dir="whole", resume_training=True,
                     runner_config={"max_steps": STEPS + 4}, **changes)  # fmt: skip
    result = run_job(["--config", name, "--run_mode", "train"], shop.folder)
    assert result.code == 2
    assert "the training data is not that of the checkpoint" in result.stderr
    assert "shuffle_buffer" in result.stderr


def test_a_wrong_record_ends_all_ranks(shop: Workshop, tmp_path: Path) -> None:
    folder = shop.folder / "wrong"
    shutil.copytree(shop.folder / "shards", folder)
    with (folder / "1.jsonl").open("a") as file:
        file.write("{\n")
    changed = {"data_loader": LOADER | {"dataset_files": ["wrong"]}}
    name = shop.yaml(
        "wrong.yaml", output_dir="output_wrong", train_dataset=changed, callbacks=[],
        runner_config={"batch_size": 4, "max_steps": 1000},
        parallel_config={"data_parallel": 2},
    )  # fmt: skip
    result = run_job(["--config", name, "--run_mode", "train"], shop.folder, 2)
    assert result.codes == [2, 2]
    assert "wrong/1.jsonl:" in result.stderr
    assert "is not JSON" in result.stderr


@pytest.mark.long
def test_ranks_that_are_killed_leave_no_producer(
    shop: Workshop, whole: list[dict[str, Any]]
) -> None:
    """Real processes of torchrun; the resume is bitwise the uninterrupted run of as many ranks."""

    def started(output: str, *, pauses: bool = False) -> Any:
        name = yaml(shop, output, 2, pauses=pauses)
        return start(shop, "--config", name, "--run_mode", "train", launcher=TORCHRUN)

    uninterrupted = started("two")
    assert uninterrupted.wait() == 0, uninterrupted.communicate()
    process = started("two_parts", pauses=True)
    while not has_steps(shop, "two_parts", 10):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    ranks = _processes(process.pid)
    producers = [pid for rank in ranks for pid in _processes(rank) if _is_producer(pid)]
    assert len(producers) == 1
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    while any(_is_producer(pid) for pid in producers):
        time.sleep(0.01)
    resumed = started("two_parts")
    assert resumed.wait() == 0, resumed.communicate()
    assert shop.losses("two_parts") == shop.losses("two")
    assert shop.losses("two") == pytest.approx([row["loss"] for row in whole], rel=1e-4)


def _processes(parent: int) -> list[int]:
    """The children of a process."""
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for thread in Path(f"/proc/{parent}/task").iterdir():
        found += (thread / "children").read_text().split()
    return sorted({int(pid) for pid in found})


def _is_producer(pid: int) -> bool:
    try:
        return "launcher.data.streaming.worker" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.long
def test_machines_without_a_shared_folder_have_a_producer_each(
    shop: Workshop, workshop: Workshop
) -> None:
    machines = Machines(workshop)
    for node in machines.workshops.values():
        shutil.copytree(shop.folder / "shards", node.folder / "shards")
    changes = {"train_dataset": {"data_loader": LOADER}}
    machines.run("--output_dir", "whole", **changes)
    machines.run("--output_dir", "parts", "--runner_config.stop_step", "2", **changes)
    resumed = machines.run("--output_dir", "parts", "--resume_training", "True", **changes)
    assert "training: steps 3 to 4" in resumed.output[0]
    assert machines.losses("parts") == machines.losses("whole")
    for node in machines.workshops.values():
        assert len(list((node.folder / "whole/dataset_cache").glob("stream-*/journal"))) == 1
        assert not list((node.folder / "whole").rglob("ring-*"))
    with (machines.workshops["b"].folder / "shards/0.jsonl").open("a") as file:
        file.write('{"text": "one more document"}\n')
    ended = machines.start("--output_dir", "other", **changes).end()
    assert ended.codes == [2] * 4
    assert "differs from that of rank 0" in ended.output[0]


def test_data_are_prepared_but_not_inspected(shop: Workshop) -> None:
    name = yaml(shop, "prepared")
    result = run_job(["--config", name, "--run_mode", "train", "--prepare_data"], shop.folder)
    assert result.code == 0, result.stderr
    assert "prepared train_dataset: the index of its stream" in result.stdout
    assert not list((shop.folder / "prepared").rglob("ring-*"))
    words = ["--config", str(shop.folder / name)]
    with contextlib.chdir(shop.folder):
        assert inspect_data.main(words) == 2
