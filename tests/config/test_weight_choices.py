"""Which weights are loaded where a directory has more than one set, which assertions are only
warned about, and files that are not weights: pointers, web pages, empty ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.layout.mesh import Mesh
from tests import messages
from tests.config.interpreter import Report, run_many
from tests.config.test_weights import Case
from tests.config.weight_files import TORCH_ZIP, rank_files, safetensors
from tests.config.workspace import RIGHT, build

POINTER = ("version https://git-lfs.github.com/spec/v1\noid sha256:" + 64 * "a"
           + "\nsize 4976698672\n").encode()  # fmt: skip
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>"
PULL = "git lfs pull"
INDEX = "model.safetensors.index.json"

CASES = (
    Case(name="a new whole file and old shards", yaml="load_checkpoint: stale\n"),
    Case(name="shards that are gone", yaml="load_checkpoint: gone\n"),
    Case(name="a variant", yaml="load_checkpoint: variant\n"),
    Case(name="two models", errors=1, yaml="load_checkpoint: models\n",
         says=("models", "model.safetensors", INDEX, "`w`", "[2]", "[3]")),
    Case(name="two models in the folder of the model", errors=1, mode="finetune",
         yaml="pretrained_model_dir: models\n", says=("models", "model.safetensors", INDEX)),
    Case(name="a map of MindSpore", errors=1, yaml="load_checkpoint: mapped\n",
         says=("mapped", "model.safetensors", "param_name_map.json")),
    Case(name="two sets of torch", errors=1, yaml="load_checkpoint: bins\n",
         says=("bins", "pytorch_model.bin", "pytorch_model.bin.index.json")),
    Case(name="rank folders beside", errors=1, yaml="load_checkpoint: beside\n",
         says=("beside", "model.safetensors", "rank_0/")),
    Case(name="rank folders beside the weights of the model", mode="finetune",
         yaml="pretrained_model_dir: beside\n"),
    Case(name="one level above", errors=1, yaml="load_checkpoint: above\n",
         says=("did you mean `above/weights`?",)),
    Case(name="rank0", yaml="load_checkpoint: above/weights\n"),
    Case(name="the format without load_checkpoint", mode="finetune",
         yaml="load_ckpt_format: ckpt\nload_checkpoint: ''\npretrained_model_dir: stale\n",
         says=("load_ckpt_format = 'ckpt': no effect", "stale")),
    Case(name="the other format without load_checkpoint", mode="finetune",
         yaml="load_ckpt_format: safetensors\npretrained_model_dir: torch\n",
         says=("load_ckpt_format = 'safetensors': no effect", "torch")),
    Case(name="the format of a run's own saves",
         yaml="load_ckpt_format: ckpt\nresume_training: True\noutput_dir: earlier\n",
         says=("load_ckpt_format = 'ckpt': no effect", "earlier/checkpoint")),
    Case(name="copies are there, against the assertion",
         yaml="load_checkpoint: ranks\nremove_redundancy: True\n",
         says=("remove_redundancy = True: no effect, ranks/rank_0/CKP_rank_0-1_10.safetensors",)),
    Case(name="no limit of checkpoints", no_log=("keep_checkpoint_max",),
         yaml="callbacks: [{type: CheckpointMonitor, keep_checkpoint_max: null}]\n"),
    Case(name="a pointer", errors=1, yaml="load_checkpoint: pointer\n",
         says=("pointer/model.safetensors", "git-lfs pointer", PULL)),
    Case(name="a pointer among shards", errors=1, yaml="load_checkpoint: shard\n",
         says=("shard/model-00002-of-00002.safetensors",)),
    Case(name="a pointer to a file of torch", errors=1, yaml="load_checkpoint: bin\n",
         says=("bin/pytorch_model.bin",)),
    Case(name="a pointer to an index", errors=1, yaml="load_checkpoint: index\n",
         says=(f"index/{INDEX}",)),
    Case(name="a pointer of a rank", errors=1, yaml="load_checkpoint: rank\n",
         says=("rank/rank_0/CKP_rank_0-1_10.safetensors",)),
    Case(name="a pointer to config.json", errors=1, yaml="pretrained_model_dir: config\n",
         says=("config/config.json",)),
    Case(name="pointers to a tokenizer", errors=2,
         yaml="processor: {tokenizer: {pretrained_model_dir: words}}\n",
         says=("words/tokenizer.json",
               "words/tokenizer.model")),
    Case(name="pointers to data", errors=1,
         yaml="eval_dataset: {data_loader: {type: TextDataLoader, dataset_dir: data}}\n",
         mode="eval", says=("data/b.txt",), no_log=("a.txt",)),
    Case(name="a page", errors=1, yaml="load_checkpoint: page\n",
         says=("page/model.safetensors", "`<!DOCTYPE html> <html><head><title>")),
    Case(name="an answer", errors=1, yaml="load_checkpoint: answer\n",
         says=("answer/model.safetensors", "`Entry not found`")),
    Case(name="an index as a file of weights", errors=1, yaml=f"load_checkpoint: stale/{INDEX}\n",
         says=(f"stale/{INDEX}", "weight_map")),
    Case(name="an empty file", errors=1, yaml="load_checkpoint: nothing.ckpt\n",
         says=("nothing.ckpt",)),
    Case(name="an empty file of safetensors", errors=1, yaml="load_checkpoint: empty\n",
         says=("empty/model.safetensors",)),
    Case(name="a download that was not finished", errors=1, yaml="load_checkpoint: coming\n",
         says=("load_checkpoint = 'coming'", "model.safetensors.incomplete")),
    Case(name="one of the hub's", errors=1, yaml="load_checkpoint: hub\n",
         says=("model-00002-of-00002.safetensors", ".cache/huggingface/download/x.incomplete")),
)  # fmt: skip


def files(folder: Path) -> None:
    build(folder)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = json.dumps({"weight_map": {"w": shards[0], "lm_head.weight": shards[1]}})
    for name in ("stale", "gone", "variant", "models", "mapped", "beside"):
        safetensors(folder / name / "model.safetensors")
    for name in ("stale", "gone", "models", "shard", "hub"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / INDEX).write_text(weight_map)
    for name, rows in (("stale", 2), ("models", 3), ("shard", 2), ("hub", 2)):
        safetensors(folder / name / shards[0], rows=rows)
    for name in ("stale", "models"):
        (folder / name / shards[1]).write_bytes(b"\2" + bytes(7) + b"{}")
        shutil.copy(folder / "qwen/config.json", folder / name)
    shutil.copy(folder / "qwen/config.json", folder / "beside")
    safetensors(folder / "variant/model.fp16.safetensors", rows=3)
    (folder / "mapped/param_name_map.json").write_text('{"w": "part0.safetensors"}')
    safetensors(folder / "mapped/part0.safetensors")
    for name in ("bins", "torch", "bin"):
        (folder / name).mkdir()
        (folder / name / "pytorch_model.bin").write_bytes(POINTER if name == "bin" else TORCH_ZIP)
        shutil.copy(folder / "qwen/config.json", folder / name)
    (folder / "bins/a.bin").write_bytes(TORCH_ZIP)
    (folder / "bins/pytorch_model.bin.index.json").write_text('{"weight_map": {"w": "a.bin"}}')
    for name in ("beside", "ranks", "rank", "above/weights", "earlier/checkpoint"):
        rank_files(folder / name, Mesh())
    (folder / "above/weights/rank_0").rename(folder / "above/weights/rank0")
    (folder / "rank/rank_0/CKP_rank_0-1_10.safetensors").write_bytes(POINTER)
    (folder / "shard" / shards[1]).write_bytes(POINTER)
    for name, content in (("pointer", POINTER), ("page", PAGE), ("answer", b"Entry not found"),
                          ("empty", b"")):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(content)
    for name, file in (("index", INDEX), ("config", "config.json"),
                       ("coming", "model.safetensors.incomplete")):  # fmt: skip
        shutil.copytree(folder / "qwen", folder / name)
        for weights in (folder / name).glob("*.safetensors"):
            weights.unlink()
        (folder / name / file).write_bytes(POINTER)
    (folder / "nothing.ckpt").touch()
    shutil.copytree(folder / "tokenizer", folder / "words")
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / "words" / name).write_bytes(POINTER)
    (folder / "data").mkdir()
    (folder / "data/a.txt").write_text("version https://git-lfs is what a pointer begins with")
    (folder / "data/b.txt").write_bytes(POINTER)
    (folder / "hub/.cache/huggingface/download").mkdir(parents=True)
    (folder / "hub/.cache/huggingface/download/x.incomplete").touch()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Every case, in one interpreter."""
    folder = tmp_path_factory.mktemp("choices")
    files(folder)
    commands: list[dict[str, Any]] = []
    for index, case in enumerate(CASES):
        written = [line.partition(":")[0] for line in case.yaml.splitlines()]
        right = _without(RIGHT, written)
        (folder / f"{index}.yaml").write_text(right + case.yaml)
        argv = ["--config", f"{index}.yaml", "--run_mode", case.mode, "--check_config"]
        commands.append({"argv": argv, "cwd": str(folder), "env": {}})
    return dict(zip([case.name for case in CASES], run_many(commands), strict=True))


def _without(yaml: str, sections: list[str]) -> str:
    """The text without these sections at the top."""
    kept, keeps = [], True
    for line in yaml.splitlines(keepends=True):
        if not line.startswith((" ", "-")):
            keeps = line.partition(":")[0] not in sections
        kept += [line] if keeps else []
    return "".join(kept)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_chosen_and_what_is_reported(case: Case, reports: dict[str, Report]) -> None:
    report = reports[case.name]
    for text in case.says:
        assert text in report.err, report.err
    for text in case.no_log:
        assert text not in report.err, report.err
    assert report.err.count("error: ") == case.errors, report.err
    assert report.code == (2 if case.errors else 0)
    assert not report.torch_imported
    if case.says:
        index = CASES.index(case)
        messages.check("weight choices", case.name, report.err.replace(f"{index}.yaml", "x.yaml"))


def test_the_golden_file_holds_the_table() -> None:
    messages.check_cases("weight choices", [case.name for case in CASES if case.says])
