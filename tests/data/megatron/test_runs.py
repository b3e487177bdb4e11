"""Complete runs on files of tokens: in MindFormers' style, in our own, resumed, evaluated."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from launcher.data.megatron.writer import IndexedWriter, token_dtype
from tests.ranks import run_ranks
from tests.workshop import BASE, VOCABULARY, Workshop, merged

MEGATRON = "BlendedMegatronDatasetDataLoader"
MINDFORMERS = """\
seed: 42
output_dir: ./output
run_mode: 'train'
use_parallel: False
trainer:
  type: CausalLanguageModelingTrainer
  model_name: 'qwen3'
runner_config:
  epochs: 1
  batch_size: 4
  gradient_accumulation_steps: 1
  max_steps: 3
optimizer:
  type: AdamW
  betas: [0.9, 0.95]
  eps: 1.e-8
lr_schedule:
  type: ConstantWarmUpLR
  learning_rate: 1.e-4
  warmup_ratio: 0
train_dataset: &train_dataset
  data_loader:
    type: BlendedMegatronDatasetDataLoader
    datasets_type: "GPTDataset"
    sizes:
      - 40   # Number of samples in the training set
      - 0
      - 0
    config:
      seed: 1234
      split: "1, 0, 0"
      seq_length: 32
      eod_mask_loss: False
      reset_position_ids: False
      create_attention_mask: True
      reset_attention_mask: False
      create_compressed_eod_mask: False
      eod_pad_length: 128
      eod: 1
      pad: -1
      data_path:
        - '1'
        - "corpus_text_document"
  input_columns: ["input_ids", "labels", "loss_mask", "position_ids", "attention_mask"]
  construct_args_key: ["input_ids", "labels", "loss_mask", "position_ids", "attention_mask"]
  num_parallel_workers: 8
  python_multiprocessing: False
  drop_remainder: True
  numa_enable: False
  prefetch_size: 1
  seed: 1234
train_dataset_task:
  type: CausalLanguageModelDataset
  dataset_config: *train_dataset
context:
  mode: 0
  device_target: "CPU"
model:
  model_config:
    type: Qwen3Config
    vocab_size: 512
    hidden_size: 32
    intermediate_size: 48
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 2
    head_dim: 8
    max_position_embeddings: 128
"""


def _prepare(folder: Path) -> None:
    """Datasets of the corpus, and the configurations."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    eod = int(tokenizer.eos_token_id)
    texts = [path.read_text() for path in sorted((folder / "corpus").iterdir())]
    documents = [[*tokenizer.encode(part), eod] for text in texts for part in text.split("\n\n")]
    for name, part in (("corpus", documents), ("one", documents[::2]), ("two", documents[1::2])):
        prefix = folder / f"{name}_text_document"
        with IndexedWriter(prefix, dtype=token_dtype(VOCABULARY)) as writer:
            writer.add_documents(part)
            writer.finish()
    stream = [token for document in documents for token in document]
    np.array(stream, dtype="<u2").tofile(folder / "corpus.u16")
    (folder / "corpus.u16.json").write_text(json.dumps({"dtype": "uint16", "eos": eod}))
    (folder / "mindformers.yaml").write_text(MINDFORMERS)
    apart = {"eod": eod, "reset_position_ids": True, "reset_attention_mask": True}
    own = {
        "processor": None,
        "train_dataset": {
            "data_loader": {
                "type": MEGATRON,
                "dataset_dir": None,
                "sizes": [60, 0, 0],
                "config": {"data_path": [0.3, "one_text_document", 0.7, "two_text_document"],
                           "split": "90,10,0", **apart},
            },
            "packing": None,
        },
        "eval_dataset": {
            "data_loader": {
                "type": MEGATRON,
                "config": {"data_path": "corpus_text_document", "split": "90,10,0", **apart,
                           "drop_last_partial_validation_sequence": False},
            },
            "seq_length": 32,
        },
        "do_eval": True,
        "eval_step_interval": 4,
        "runner_config": {"batch_size": 8, "max_steps": 4, "epochs": None},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}],
    }  # fmt: skip
    tokens = {
        "processor": None,
        "train_dataset": {"data_loader": {"type": "TokenFileDataLoader",
                                          "dataset_dir": "corpus.u16"}},
        "runner_config": {"max_steps": 3, "epochs": None},
        "callbacks": None,
    }  # fmt: skip
    for name, changes in (("own", own), ("tokens", tokens)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(merged(BASE, changes)))


RUNS = {
    "mindformers": "--config mindformers.yaml",
    "own": "--config own.yaml --run_mode train",
    "stopped": "--config own.yaml --run_mode train runner_config.stop_step=2",
    "resumed": "--config own.yaml --run_mode resume --output_dir out_stopped",
    "tokens": "--config tokens.yaml --run_mode train",
}


def _run_all(folder: str) -> dict[str, tuple[int, str]]:
    """Every run, in one process: name to exit code and what it printed."""
    from launcher import cli

    os.chdir(folder)
    done = {}
    for name, line in RUNS.items():
        output = [] if "--output_dir" in line else ["--output_dir", f"out_{name}"]
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = cli.main([*line.split(), *output])
        done[name] = code, text.getvalue()
    return done


@pytest.fixture(scope="module")
def folder(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokens") / "work"
    materials.copy_to(place)
    _prepare(place)
    return place


@pytest.fixture(scope="module")
def done(folder: Path) -> dict[str, tuple[int, str]]:
    return run_ranks(1, _run_all, str(folder))[0]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_well(name: str, done: dict[str, tuple[int, str]]) -> None:
    code, text = done[name]
    assert code == 0, text


def test_the_yaml_of_mindformers_trains_on_every_token(
    folder: Path, done: dict[str, tuple[int, str]]
) -> None:
    found = rows(folder, "out_mindformers")
    assert [row["step"] for row in found] == [1, 2, 3]
    assert [row["tokens"] for row in found] == [4 * 32] * 3
    assert "corpus_text_document" not in done["mindformers"][1].partition("warning")[2]


def test_a_resumed_run_is_the_uninterrupted_one(
    folder: Path, done: dict[str, tuple[int, str]]
) -> None:
    changes = done["resumed"][1].partition("changed since:")[2].splitlines()
    assert "runner_config.stop_step" in changes[1]
    assert changes[2].startswith("training:"), "the data is the same"
    keys = ("step", "loss", "eval_loss", "consumed_samples")
    whole, resumed = (
        [{key: row[key] for key in keys if key in row} for row in rows(folder, name)
         if "loss" in row or "eval_loss" in row]
        for name in ("out_own", "out_stopped")
    )  # fmt: skip
    assert [row for row in resumed if row["step"] > 2] == [row for row in whole if row["step"] > 2]
    assert any("eval_loss" in row for row in whole)


def test_token_files_need_no_tokenizer(folder: Path, done: dict[str, tuple[int, str]]) -> None:
    assert len(rows(folder, "out_tokens")) == 3
    assert "1 file(s) of tokens" in done["tokens"][1]
