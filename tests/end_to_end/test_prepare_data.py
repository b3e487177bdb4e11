"""Data that is prepared before a job (`--prepare_data`), or by one rank while the others wait."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import _job, run_job, run_ranks
from tests.workshop import Workshop

PREPARED = re.compile(r"prepared (\w+): ([\d,]+) rows of (\d+), ([\d,]+) tokens, in (\S+)")
EVALUATION = {
    "data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus/bisect.py"},
    "seq_length": 32, "packing": True,
}  # fmt: skip
SHORT = {"max_steps": 2, "batch_size": 2}
COLLECTIVE_SECONDS = 2.0


def test_data_for_64_ranks_is_prepared_by_one_process(workshop: Workshop) -> None:
    """Without weights and without the processes of the layout; the job then reads the cache."""
    name = workshop.yaml(
        parallel_config={"data_parallel": 16, "model_parallel": 4}, do_eval=True,
        eval_dataset=EVALUATION, runner_config=SHORT, load_checkpoint="on the cluster alone",
        data_cache={"dir": "tokens"},
    )  # fmt: skip
    first = run_job(["--config", name, "--prepare_data"], workshop.folder)
    assert (first.code, first.stderr) == (0, "")
    found = [PREPARED.fullmatch(line) for line in first.stdout.splitlines() if "prepared" in line]
    assert [match and match[1] for match in found] == ["train_dataset", "eval_dataset"]
    for match in found:
        assert match is not None
        folder = workshop.folder / match[5]
        tokens = (folder / "tokens.bin").stat().st_size // 4
        assert int(match[4].replace(",", "")) in (tokens, tokens - 1), "rows end before the last"
        assert folder.parent == workshop.folder / "tokens"
    assert not (workshop.folder / "output").exists(), "nothing but the cache is written"
    again = run_job(["--config", name, "--prepare_data"], workshop.folder)
    assert again.stdout.count("(from the cache tokens/") == 2

    name = workshop.yaml("job.yaml", do_eval=True, eval_dataset=EVALUATION, runner_config=SHORT,
                         data_cache={"dir": "tokens"})  # fmt: skip
    job = run_job(["--config", name, "--run_mode", "train"], workshop.folder)
    assert job.code == 0, job.stderr
    assert job.stdout.count("(from the cache tokens/") == 2
    assert not (workshop.folder / "output/dataset_cache").exists()


def test_the_mode_says_which_data_is_prepared(workshop: Workshop) -> None:
    name = workshop.yaml(eval_dataset=EVALUATION)
    for flags, expected in (
        ([], ["train_dataset"]),
        (["--run_mode", "eval"], ["eval_dataset"]),
        (["--run_mode", "finetune", "--do_eval", "true"], ["train_dataset", "eval_dataset"]),
        (["--run_mode", "predict", "~train_dataset"], ["eval_dataset"]),
    ):
        done = run_job(["--config", name, "--prepare_data", *flags], workshop.folder)
        assert done.code == 0, done.stderr
        assert re.findall(r"^prepared (\w+)", done.stdout, re.M) == expected


def test_what_is_wrong_with_the_data_is_an_error(workshop: Workshop) -> None:
    name = workshop.yaml(parallel_config={"data_parallel": 64})
    flags = ["--config", name, "--prepare_data", "--train_dataset_dir", "corpse"]
    done = run_job(flags, workshop.folder)
    assert done.code == 2
    assert "train_dataset.data_loader.dataset_dir = 'corpse'" in done.stderr
    assert "did you mean `corpus`?" in done.stderr
    assert "data_parallel" not in done.stderr
    source = {"name": "a", "type": "HFDataLoader", "dataset_files": "x.jsonl", "weight": 2}
    steps = [{"type": "shufle"}]
    (workshop.folder / "x.jsonl").write_text('{"text": "ships"}\n')
    sources = [{**source, "transforms": steps}, {**source, "weight": None}]
    name = workshop.yaml(train_dataset={"data_loader": sources})
    done = run_job(["--config", name, "--prepare_data"], workshop.folder)
    assert done.code == 2
    for problem in ("did you mean `shuffle`?", "0 has this name too", "the weights add up to 2"):
        assert problem in done.stderr
    done = run_job(["--config", name, "--prepare_data"], workshop.folder.parent)
    assert done.code == 2


def _slow_job(arguments: list[str], folder: str) -> tuple[int, str, str]:
    """A job whose rank 0 tokenizes until the other one has said that it waits, and for longer than
    a collective may take."""
    from launcher.builders import open_dataset as data
    from launcher.data import progress
    from launcher.data.loaders import text
    from launcher.parallel import world as worlds

    worlds.GROUP_TIMEOUT = worlds.LONG_TIMEOUT = timedelta(seconds=COLLECTIVE_SECONDS)
    data.LOG_SECONDS = data.PLAIN_SECONDS = 0.0
    data.FIRST_SECONDS = progress.FIRST_SECONDS = progress.REPORT_SECONDS = 0.0
    log = Path(folder) / "output/log/rank_1/info.log"
    tokenize = text.tokenize_documents
    began = time.monotonic()

    def slowly(*given: Any) -> Any:
        waits = "waiting for rank 0 to tokenize train_dataset: "
        while time.monotonic() - began < COLLECTIVE_SECONDS + 1 or waits not in log.read_text():
            time.sleep(0.05)
        return tokenize(*given)

    if os.environ["RANK"] == "0":
        text.tokenize_documents = slowly
    return _job(arguments, folder)


def test_a_long_preparation_does_not_time_out(workshop: Workshop) -> None:
    name = workshop.yaml(parallel_config={"data_parallel": 2}, runner_config=SHORT)
    arguments = ["--config", name, "--run_mode", "train"]
    (code, out, err), (other, _, _) = run_ranks(2, _slow_job, arguments, str(workshop.folder))
    assert (code, other) == (0, 0), err
    assert "tokenizing train_dataset: " in out
    log = (workshop.folder / "output/log/rank_1/info.log").read_text()
    assert re.search(r"waiting for rank 0 to tokenize train_dataset: \d+ %", log), log


@pytest.mark.long
def test_a_configuration_of_several_ranks_is_prepared_under_torchrun(workshop: Workshop) -> None:
    """One process on each machine prepares, the others of it end at once."""
    name = workshop.yaml(parallel_config={"data_parallel": 2})
    done = run_job(["--config", name, "--prepare_data"], workshop.folder, world_size=2)
    assert done.codes == [0, 0]
    assert "prepared train_dataset" in done.stdout
