"""Weights that MindFormers wrote train and predict as the Hugging Face directory of the same model.

The files are tiny models of each family (see the README beside them). Every form of a family holds
the tensors of `hf/`, so a run from it has the same losses, and greedy prediction the same tokens,
bit for bit on the same layout.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.mindspore.twins import TWINS, Twin, folder_of
from tests.ranks import run_job

PROMPT = "def sum(a"
STEPS: dict[str, Any] = {
    "seed": 3,
    "processor": {"tokenizer": {"pretrained_model_dir": "tokenizer"}},
    "train_dataset": {
        "data_loader": {"type": "TextDataLoader", "dataset_dir": "text.txt"},
        "seq_length": 16,
        "packing": True,
    },
    "runner_config": {"batch_size": 2, "max_steps": 2},
    "optimizer": {"type": "AdamW", "eps": 1e-4},
    "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-3},
    "generation_config": {"max_new_tokens": 6, "do_sample": False},
    "context": {"device_target": "CPU"},
    "final_checkpoint": False,
}  # fmt: skip
LAYOUTS = {
    "one": (1, []),
    "dp2tp2": (4, ["--parallel_config.data_parallel", "2",
                   "--parallel_config.model_parallel", "2", "--batch_size", "1"]),
    "pp2": (2, ["--parallel_config.pipeline_stage", "2", "--parallel_config.micro_batch_num", "2",
                "--batch_size", "1"]),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A folder with text and a tokenizer of 96 characters, and what ran in it."""

    folder: Path
    known: dict[tuple[str, ...], list[Any]] = field(default_factory=dict)

    def losses(self, family: str, weights: Path, layout: str, *more: str) -> list[float]:
        """Training losses from `weights`."""
        world, degrees = LAYOUTS[layout]
        self._run(family, world, "finetune", weights, *degrees, *more)
        rows = (self.folder / "output" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    def tokens(self, family: str, weights: Path, world: int, *more: str) -> list[int]:
        """New tokens that `weights` predict, tensor-parallel on `world` ranks."""
        degrees = ["--parallel_config.model_parallel", str(world)] if world > 1 else []
        self._run(family, world, "predict", weights, "--predict_data", PROMPT, *degrees, *more)
        text = (self.folder / "output" / "text_generation_result.jsonl").read_text()
        tokens: list[int] = json.loads(text)["tokens"]
        return tokens

    def _run(self, family: str, world: int, mode: str, weights: Path, *more: str) -> None:
        shutil.rmtree(self.folder / "output", ignore_errors=True)
        arguments = ["--config", "steps.yaml", "--run_mode", mode, "--pretrained_model_dir",
                     str(folder_of(family, "hf")), "--load_checkpoint", str(weights)]  # fmt: skip
        result = run_job([*arguments, *more], self.folder, world)
        assert result.code == 0, result.stderr + result.stdout

    def of_hugging_face(self, what: str, family: str, layout: str | int) -> list[Any]:
        """The same from the Hugging Face directory, computed once."""
        key = (what, family, str(layout))
        if key not in self.known:
            self.known[key] = getattr(self, what)(family, folder_of(family, "hf"), layout)
        return self.known[key]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("twins")
    characters = ["<unk>", *(chr(code) for code in range(32, 126)), "\n"]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" \n", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    (folder / "steps.yaml").write_text(yaml.safe_dump(STEPS))
    return Bench(folder)


def _forms(*, sample: bool) -> list[Any]:
    """Every form of every family; a sample is the first form of each."""
    forms = [pytest.param(twin, id=twin.name) for twin in TWINS]
    firsts = {twin.family: twin for twin in reversed(TWINS)}
    return [f for f in forms if (f.values[0] in firsts.values()) == sample]


def _check(bench: Bench, twin: Twin, layout: str, predicts_on: int) -> None:
    weights = folder_of(twin.family, twin.form)
    ours = bench.losses(twin.family, weights, layout, *twin.options)
    assert ours == bench.of_hugging_face("losses", twin.family, layout)
    tokens = bench.tokens(twin.family, weights, predicts_on, *twin.options)
    assert tokens == bench.of_hugging_face("tokens", twin.family, predicts_on)


@pytest.mark.parametrize("twin", _forms(sample=True))
def test_runs_as_its_hugging_face_directory(bench: Bench, twin: Twin) -> None:
    _check(bench, twin, "one", 1)


@pytest.mark.long
@pytest.mark.parametrize("twin", _forms(sample=False))
def test_other_forms_run_as_well(bench: Bench, twin: Twin) -> None:
    _check(bench, twin, "one", 1)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["dp2tp2", "pp2"])
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_runs_on_several_ranks(bench: Bench, twin: Twin, layout: str) -> None:
    _check(bench, twin, layout, 2)
