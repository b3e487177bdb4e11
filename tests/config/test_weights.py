"""Which weights may be loaded, by how many processes, under which assertions: the table of
docs/weights.md, row by row, through the command line, without importing torch."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.config.checks.found import HEADER_BYTES, LOOKED_AT
from launcher.layout.mesh import Mesh
from launcher.weights.offline.copy_record import RECORD, write_record
from tests import messages
from tests.config.interpreter import Report, run_many
from tests.config.weight_files import MINDSPORE_CKPT, TORCH_ZIP, rank_files, safetensors
from tests.config.workspace import RIGHT, build

EITHER = (None, False)
ANY = (None, True, False)
LOADS = ""
COMPLETE = "auto_trans_ckpt = False: full contains complete weights"
NOTHING = "auto_trans_ckpt = True: "
PAIR, ALONE = "2 ranks (dp_replicate 2)", "1 rank (not cut)"


def other(files: str) -> str:
    return f"auto_trans_ckpt = False: {files} was written by "


ROWS: tuple[tuple[str, int, tuple[bool | None, ...], tuple[bool | None, ...], str], ...] = (
    # files, processes, use_parallel, auto_trans_ckpt, the error
    ("full", 1, EITHER, ANY, LOADS),
    ("full", 2, (None, True), (None, True), LOADS),
    ("full", 2, (None, True), (False,), COMPLETE),
    ("full", 1, (True,), (None, True), LOADS),
    ("full", 1, (True,), (False,), COMPLETE),
    ("full/model.safetensors", 1, EITHER, ANY, LOADS),
    ("full/model.safetensors", 2, (None, True), (None, True), LOADS),
    ("full/model.safetensors", 2, (None, True), (False,),
     COMPLETE.replace("full", "full/model.safetensors")),
    ("two", 2, (None, True), ANY, LOADS),
    ("four", 2, (None, True), (None, True), LOADS),
    ("four", 2, (None, True), (False,), other("four") + "4 ranks (dp_shard 4)"),
    ("tensor", 2, (None, True), (False,), other("tensor") + "2 ranks (tp 2)"),
    ("two", 1, EITHER, (None, True), LOADS),
    ("two", 1, EITHER, (False,), other("two") + PAIR),
    ("two/rank_1/CKP_rank_1-1_10.safetensors", 1, EITHER, (False,),
     other("two/rank_1/CKP_rank_1-1_10.safetensors") + PAIR),
    ("one", 1, EITHER, ANY, LOADS),
    ("foreign", 1, EITHER, (False,), other("foreign") + "2 ranks"),
    ("foreign", 2, (None, True), ANY, LOADS),
    ("", 1, EITHER, (True,), NOTHING),
    ("", 2, (None, True), (True,), NOTHING),
    ("", 1, EITHER, EITHER, LOADS),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command line, and what its output must name."""

    name: str
    yaml: str
    world: int = 1
    mode: str = "train"
    says: tuple[str, ...] = ()
    no_log: tuple[str, ...] = ()
    """Texts that are not in the output."""
    errors: int = 0
    env: Mapping[str, str] = field(default_factory=dict)


def table() -> Iterator[Case]:
    for files, world, parallel, automatic, outcome in ROWS:
        for use_parallel, auto_trans_ckpt in itertools.product(parallel, automatic):
            keys = {"use_parallel": use_parallel, "auto_trans_ckpt": auto_trans_ckpt}
            written = {key: value for key, value in keys.items() if value is not None}
            text = "".join(f"{key}: {value}\n" for key, value in written.items())
            yield Case(
                name=f"{files or 'nothing'}, {world} processes, {written}",
                yaml=f"{text}load_checkpoint: '{files}'\n" + (
                    "parallel_config: {data_parallel: 2}\n" if world == 2 else ""),
                world=world,
                says=(outcome,) if outcome else (),
                errors=int(outcome != LOADS),
            )  # fmt: skip


CASES = (
    Case(name="one process asserts several", yaml="load_checkpoint: full\nuse_parallel: True\n",
         says=("use_parallel = True: ",)),
    Case(name="one process need not cut", yaml="load_checkpoint: full\nauto_trans_ckpt: True\n",
         says=("auto_trans_ckpt = True: not needed",)),
    Case(name="two processes cut", world=2, no_log=("not needed",),
         yaml="load_checkpoint: full\nauto_trans_ckpt: True\nuse_parallel: True\n"
              "parallel_config: {data_parallel: 2}\n"),
    Case(name="weights of the model's folder", world=2, mode="finetune", errors=1,
         yaml="pretrained_model_dir: full\nauto_trans_ckpt: False\n"
              "parallel_config: {data_parallel: 2}\n", says=(COMPLETE,)),
    Case(name="a folder of torch files", yaml="load_checkpoint: torch\n", mode="finetune"),
    Case(name="torch files, as asserted", yaml="load_checkpoint: torch\nload_ckpt_format: ckpt\n"),
    Case(name="torch files, asserted to be safetensors", errors=1,
         yaml="load_checkpoint: torch\nload_ckpt_format: safetensors\n",
         says=("load_ckpt_format = 'safetensors': ", "Nearest: ckpt.")),
    Case(name="by content, not by name", errors=1,
         yaml="load_checkpoint: disguised/model.ckpt\nload_ckpt_format: ckpt\n",
         says=("disguised/model.ckpt", "Nearest: safetensors.")),
    Case(name="a .ckpt of MindSpore", yaml="load_checkpoint: old\nload_ckpt_format: ckpt\n"),
    Case(name="a .ckpt of MindSpore, asserted to be safetensors", errors=1,
         yaml="load_checkpoint: old\nload_ckpt_format: safetensors\n",
         says=(".ckpt files of MindSpore", "Nearest: ckpt.")),
    Case(name="rank files of MindSpore in .ckpt",
         yaml="load_checkpoint: old_ranks\nload_ckpt_format: ckpt\n"),
    Case(name="rank files of torch", errors=1, yaml="load_checkpoint: torch_ranks\n",
         says=("CKP_rank_0-1_1.ckpt", "launcher.tools.ckpt_to_safetensors")),
    Case(name="a file cut short", errors=1, yaml="load_checkpoint: cut\n",
         says=("cut/model.safetensors", "4104", "4100")),
    Case(name="a header that claims more than there is", errors=1,
         yaml="load_checkpoint: lying/model.safetensors\n",
         says=("lying/model.safetensors", "4104")),
    Case(name="an index that names what is not there", errors=1,
         yaml="pretrained_model_dir: part\n", mode="finetune",
         says=("model-00002-of-00002.safetensors",
               f"{len(RIGHT.splitlines()) + 1}: part/model.safetensors.index.json")),
    Case(name="an index alone", errors=1, yaml="load_checkpoint: alone\n",
         says=("alone/model.safetensors.index.json",)),
    Case(name="one tensor in two files", errors=1, yaml="load_checkpoint: twice\n",
         says=("twice", "`w`", "model-1.safetensors", "model-2.safetensors")),
    Case(name="damage is reported by the first rank of each machine", errors=1, world=2,
         yaml="load_checkpoint: cut\nparallel_config: {data_parallel: 2}\n",
         env={"RANK": "1", "LOCAL_RANK": "0"},
         says=("[rank 1] error: ", "cut/model.safetensors")),
    Case(name="damage is not reported by every rank", world=2,
         yaml="load_checkpoint: cut\nparallel_config: {data_parallel: 2}\n",
         env={"RANK": "1", "LOCAL_RANK": "1"}),
    Case(name="damage of what is not loaded",
         yaml="load_checkpoint: full\npretrained_model_dir: part\n"),
    Case(name="damage of what a strategy does not need",
         yaml="only_save_strategy: True\nload_checkpoint: cut\n"),
    Case(name="damage before a prediction", mode="predict", errors=1,
         yaml="load_checkpoint: cut\ninput_data: a prompt\n",
         says=("cut/model.safetensors",)),
    Case(name="a folder of one rank", yaml="load_checkpoint: grown/rank_0\n"),
    Case(name="more files than are looked at", yaml="load_checkpoint: many\n"),
    Case(name="longer headers than are looked at", yaml="load_checkpoint: talkative\n"),
    Case(name="files of torch, beside one that transformers would not take", errors=1,
         yaml="load_checkpoint: mixed\n",
         says=("mixed/pytorch_model.bin",)),
    Case(name="a pipe that no index names", yaml="load_checkpoint: piped\n"),
    Case(name="a path with a typo", errors=1, yaml="load_checkpoint: ful\n",
         says=("load_checkpoint = 'ful': ", "did you mean `full`?")),
    Case(name="a path with nothing similar", errors=1, yaml="load_checkpoint: busy/hole\n",
         says=("load_checkpoint = 'busy/hole': ", "unified_checkpoint")),
    Case(name="copies were left out, as asserted",
         yaml="load_checkpoint: spared\nremove_redundancy: True\n"),
    Case(name="copies were left out, denied",
         yaml="load_checkpoint: spared\nremove_redundancy: False\n",
         says=("remove_redundancy = False: ", "spared/rank_0/CKP_rank_0-1_10.safetensors")),
    Case(name="the newest save decides", yaml="load_checkpoint: grown\nremove_redundancy: True\n"),
    Case(name="complete weights are never redundant",
         yaml="load_checkpoint: full\nremove_redundancy: True\n"),
    Case(name="a strategy that is not needed",
         yaml="load_checkpoint: two\nsrc_strategy_path_or_dir: strategy\n",
         says=("src_strategy_path_or_dir = 'strategy': not needed",)),
    Case(name="a strategy for complete weights",
         yaml="load_checkpoint: full\nsrc_strategy_path_or_dir: strategy\n",
         says=("src_strategy_path_or_dir = 'strategy': not needed",)),
    Case(name="a strategy that is needed", no_log=("not needed",),
         yaml="load_checkpoint: foreign\nsrc_strategy_path_or_dir: strategy\n"),
    Case(name="a strategy that is not there", errors=1,
         yaml="load_checkpoint: foreign\nsrc_strategy_path_or_dir: strategi\n",
         says=("src_strategy_path_or_dir = 'strategi': ", "did you mean `strategy`?")),
    Case(name="a complete copy of complete weights",
         yaml="load_checkpoint: full\nsave_unified_checkpoint: True\n",
         says=("save_unified_checkpoint = True: not needed",)),
    Case(name="a converted copy of rank files",
         yaml="load_checkpoint: two\nsave_converted_checkpoint: True\n",
         says=("save_converted_checkpoint = True: no effect",)),
    Case(name="a converted copy of what is converted",
         yaml="load_checkpoint: mindspore\nsave_converted_checkpoint: True\n",
         says=("save_converted_checkpoint = True: no effect",)),
    Case(name="a copy over somebody's work", errors=1,
         yaml="load_checkpoint: two\nsave_unified_checkpoint: True\noutput_dir: busy\n",
         says=("busy/unified_checkpoint", "thesis.txt")),
    Case(name="a copy over a former one", no_log=("again/unified_checkpoint",),
         yaml="load_checkpoint: two\nsave_unified_checkpoint: True\noutput_dir: again\n"),
    Case(name="an own checkpoint of another layout, not to be resharded", errors=1,
         yaml="resume_training: True\nauto_trans_ckpt: False\noutput_dir: earlier\n",
         says=("earlier/checkpoint", PAIR, ALONE)),
    Case(name="nothing to resume from yet", yaml="resume_training: True\nauto_trans_ckpt: True\n"),
    Case(name="finetune from a folder without weights", mode="finetune", errors=1,
         yaml="pretrained_model_dir: no_weights\n",
         says=("no_weights",)),
    Case(name="a strategy alone reads no weights",
         yaml="only_save_strategy: True\nload_checkpoint: old\nauto_trans_ckpt: False\n"
              "src_strategy_path_or_dir: nowhere\nsave_unified_checkpoint: True\n"
              "output_dir: busy\n"),
)  # fmt: skip


def files(folder: Path) -> None:
    """Weights of every kind, beside the right configuration."""
    build(folder)
    config = (folder / "qwen/config.json").read_text()
    for name in ("full", "mindspore", "torch"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
    safetensors(folder / "full/model.safetensors")
    safetensors(folder / "mindspore/model-00001-of-00001.safetensors", {"format": "ms"})
    (folder / "mindspore/param_name_map.json").write_text(
        json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}})
    )
    (folder / "torch/pytorch_model.bin").write_bytes(TORCH_ZIP)
    safetensors(folder / "disguised/model.ckpt")
    damaged_files(folder, config)
    rank_files(folder / "one", Mesh())
    rank_files(folder / "two", Mesh(dp_replicate=2))
    rank_files(folder / "tensor", Mesh(tp=2))
    rank_files(folder / "four", Mesh(dp_shard=4))
    rank_files(folder / "foreign", Mesh(tp=2), is_ours=False)
    rank_files(folder / "spared", Mesh(dp_replicate=2), deduplicated=True)
    rank_files(folder / "grown", Mesh(), name="CKP_rank_{}-1_9")
    rank_files(folder / "grown", Mesh(), name="CKP_rank_{}-1_10", deduplicated=True)
    rank_files(folder / "earlier/checkpoint", Mesh(dp_replicate=2))
    for name, content in (("old_ranks", MINDSPORE_CKPT), ("torch_ranks", TORCH_ZIP)):
        (folder / name / "rank_0").mkdir(parents=True)
        (folder / name / "rank_0/CKP_rank_0-1_1.ckpt").write_bytes(content)
    (folder / "strategy").mkdir()
    (folder / "busy/unified_checkpoint").mkdir(parents=True)
    write_record(folder / "busy/unified_checkpoint", "save_unified_checkpoint")
    (folder / "busy/unified_checkpoint/thesis.txt").write_text("years of work")
    safetensors(folder / "again/unified_checkpoint/model.safetensors")
    write_record(folder / "again/unified_checkpoint", "save_unified_checkpoint")


def damaged_files(folder: Path, config: str) -> None:
    """Complete weights that are not."""
    safetensors(folder / "cut/model.safetensors")
    with (folder / "cut/model.safetensors").open("r+b") as file:
        file.truncate(4100)
    safetensors(folder / "lying/model.safetensors")
    with (folder / "lying/model.safetensors").open("r+b") as file:
        file.write((1 << 62).to_bytes(8, "little"))
    shutil.copytree(folder / "full", folder / "part")
    (folder / "part/config.json").write_text(config)
    (folder / "part/model.safetensors").rename(folder / "part/model-00001-of-00002.safetensors")
    names = {"w": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    for name in ("part", "alone"):
        (folder / name).mkdir(exist_ok=True)
        index = folder / name / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))
    for number in (1, 2):
        safetensors(folder / f"twice/model-{number}.safetensors")
    for number in range(LOOKED_AT + 1):
        safetensors(folder / f"many/model-{number}.safetensors")  # `w` is in all of them
    for number in (1, 2):
        words = {"format": "pt", "words": "x" * HEADER_BYTES}
        safetensors(folder / f"talkative/model-{number}.safetensors", words)
    safetensors(folder / "mixed/adapter.safetensors")
    (folder / "mixed/pytorch_model.bin").write_bytes(b"PK, not for long")
    (folder / "mixed/pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"w": "pytorch_model.bin"}})
    )
    shutil.copytree(folder / "full", folder / "piped")
    (folder / "piped/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "model.safetensors"}})
    )
    os.mkfifo(folder / "piped/a.safetensors")


ALL = (*table(), *CASES)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Every case, in one interpreter."""
    folder = tmp_path_factory.mktemp("weights")
    files(folder)
    commands: list[dict[str, Any]] = []
    for index, case in enumerate(ALL):
        right = RIGHT.replace("output_dir: ./out\n", "") if "output_dir:" in case.yaml else RIGHT
        (folder / f"{index}.yaml").write_text(right + case.yaml)
        argv = ["--config", f"{index}.yaml", "--run_mode", case.mode, "--check_config"]
        env = {"WORLD_SIZE": str(case.world), **case.env}
        commands.append({"argv": argv, "cwd": str(folder), "env": env})
    return dict(zip([case.name for case in ALL], run_many(commands), strict=True))


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_what_is_loaded_and_what_is_reported(case: Case, reports: dict[str, Report]) -> None:
    report = reports[case.name]
    for text in case.says:
        assert text in report.err, report.err
    for text in case.no_log:
        assert text not in report.err, report.err
    assert report.err.count("error: ") == case.errors, report.err
    assert report.code == (2 if case.errors else 0)
    if case.errors and "auto_trans_ckpt:" in case.yaml:
        assert re.search(r"error: \d+\.yaml:\d+: auto_trans_ckpt = ", report.err), report.err
    assert "Traceback" not in report.err
    assert not report.torch_imported
    if case.says:
        index = ALL.index(case)
        messages.check("weights", case.name, report.err.replace(f"{index}.yaml", "x.yaml"))


def test_the_golden_file_holds_the_table() -> None:
    assert len({case.name for case in ALL}) == len(ALL)
    messages.check_cases("weights", [case.name for case in ALL if case.says])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "file"),
        ({RECORD: "{}"}, RECORD),
        ({RECORD: '{"key": "save_converted_checkpoint", "files": []}'}, RECORD),
        ({RECORD: "no json"}, "unified_checkpoint"),
        ({RECORD: '{"key": "save_unified_checkpoint", "files": 3}'}, "unified_checkpoint"),
    ],
)
def test_a_folder_is_ours_only_by_its_record(
    tmp_path: Path, content: dict[str, str], reason: str
) -> None:
    from launcher.weights.offline.copy_record import foreign

    folder = tmp_path / "unified_checkpoint"
    folder.mkdir()
    assert foreign(folder, "save_unified_checkpoint") == ""
    for name, text in (content or {"file": "x"}).items():
        (folder / name).write_text(text)
    assert reason in foreign(folder, "save_unified_checkpoint")
    mapping = tmp_path / "link"
    mapping.symlink_to(folder)
    assert str(mapping) in foreign(mapping, "save_unified_checkpoint")
