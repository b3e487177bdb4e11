"""Seventeen YAML files in the styles of MindFormers, and the command line that each is run with.

Owns what is given on it: paths and a prompt, text in place of data whose readers are not built, and
sizes; the MindRecord files are made. Alpaca records are read through their handlers. All else is
used as it is written.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.data.mindrecord_writer import Schema, write_mindrecord
from tests.mindspore.yaml_survey import TOKENIZER_FILES
from tests.workshop import VOCABULARY, Workshop

FOLDER = Path(__file__).parent / "fixtures" / "yaml"
_SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
}  # fmt: skip
HUB = {
    "qwen3": {"model_type": "qwen3", "head_dim": 16, **_SIZES},
    "qwen2": {"model_type": "qwen2", **_SIZES},
}
"""Directory -> its config.json."""

_PROMPT = ("--predict_data", "I love Beijing, because")
_TOKENIZER = ("--processor.tokenizer.pretrained_model_dir", "tokenizer")
_WIDER = ("--model.model_config.vocab_size", str(VOCABULARY))
_LENGTH = ("--train_dataset.seq_length", "32")


def _text(section: str = "train_dataset", loader: str = "data_loader") -> tuple[str, ...]:
    """Text files in place of the data of a section."""
    key = f"{section}.{loader}"
    return (f"~{key}", f"--{key}.type", "TextDataLoader", f"--{key}.dataset_dir", "corpus")


def _records(section: str = "train_dataset") -> tuple[str, ...]:
    """The MindRecord files of a section."""
    return (f"--{section}.data_loader.dataset_dir", "a.mindrecord")


_POSITIONS = ("--model.model_config.max_position_embeddings", "512")
_TWO_STEPS = ("--max_steps", "2")
_TWO_EAGER = ("--training.steps", "2")
_EAGER = (*_text(loader="dataloader"), *_TOKENIZER)


@dataclass(frozen=True)
class Run:
    """One file, and the rest of its command line."""

    name: str
    arguments: tuple[str, ...]
    rows: int = 2
    """Steps that metrics.jsonl has; 0 for predict, -1 for an evaluation, which has none."""

    @property
    def argv(self) -> list[str]:
        """The whole command line, for a folder that `prepare` filled."""
        return ["--config", f"{self.name}.yaml", "--output_dir", f"out_{self.name}",
                *self.arguments]  # fmt: skip


RUNS = (
    Run("eager_llama_select", _TWO_EAGER),
    Run("eager_qwen3_muon", (*_EAGER,)),
    Run("eager_qwen3_train", (*_TWO_EAGER, "--checkpoint.save_path", "saved")),
    Run("legacy_common_loader", _TWO_STEPS),
    Run("legacy_deepseek_predict", (*_PROMPT, "--processor.tokenizer.vocab_file",
        "tokenizer/tokenizer.json", "--processor.tokenizer.tokenizer_file",
        "tokenizer/tokenizer.json"), 0),
    Run("legacy_llama2_predict", (*_PROMPT, "--model.model_config.vocab_size", "600",
        "--load_checkpoint", "", "--processor.tokenizer.vocab_file", "unigram.model"), 0),
    Run("legacy_llama3_1_finetune", (*_records(), *_TWO_STEPS)),
    Run("legacy_mixtral_predict", (*_PROMPT, *_WIDER, *_TOKENIZER, "--load_checkpoint", ""), 0),
    Run("legacy_qwen2_5_eval", (*_records("eval_dataset"), *_TOKENIZER), -1),
    Run("legacy_qwen2_5_finetune", (*_records(), *_WIDER, *_TWO_STEPS, "--load_checkpoint",
                                    "qwen2/hf")),
    Run("legacy_qwen2_5_predict", _PROMPT, 0),
    Run("legacy_telechat2_predict", (*_PROMPT, "--processor.tokenizer.vocab_file",
                                     "telechat.model"), 0),
    Run("mcore_finetune_template", ("--train_dataset.data_loader.data_files", "alpaca.json",
        "--train_dataset.seq_length", "512", *_POSITIONS, *_TWO_STEPS)),
    Run("mcore_qwen3_alpaca", ("--train_dataset_dir", "alpaca.jsonl", *_POSITIONS, *_TWO_STEPS)),
    Run("mcore_qwen3_moe_train", (*_text(), *_TOKENIZER, *_TWO_STEPS)),
    Run("mcore_qwen3_predict", _PROMPT, 0),
    Run("mcore_qwen3_train", (*_text(), *_LENGTH, *_TWO_STEPS)),
)  # fmt: skip


def prepare(materials: Workshop, folder: Path) -> None:
    """Fill a folder with the files and all that they name, but the weights of `HUB`."""
    materials.copy_to(folder)
    for file in (*FOLDER.glob("*.yaml"), *TOKENIZER_FILES.glob("*.model")):
        shutil.copy(file, folder)
    write_records(folder)
    whole = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    _write_alpaca(folder)
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["merges"]]
    (folder / "vocab.json").write_text(json.dumps(whole["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]))
    for name, config in HUB.items():
        shutil.copytree(folder / "tokenizer", folder / name / "hf")
        (folder / name / "hf" / "config.json").write_text(json.dumps(config))


def write_records(folder: Path) -> None:
    """The MindRecord files that the files name: rows of 33 tokens with labels of their second
    half, not shifted."""
    ids = 2 + np.cumsum(np.random.default_rng(0).integers(0, 94, size=(24, 33)), axis=1) % 94
    rows = [{"input_ids": row, "labels": np.where(np.arange(33) < 16, -100, row)} for row in ids]
    schema: Schema = {"input_ids": ("int32", [-1]), "labels": ("int32", [-1])}
    (folder / "train_dataset").mkdir()
    write_mindrecord(folder / "a.mindrecord", schema, rows)
    write_mindrecord(folder / "train_dataset" / "b.mindrecord", schema, rows, shards=3)


def _write_alpaca(folder: Path) -> None:
    """24 records as a list of alpaca.json, and with other names of columns as lines."""
    records = [
        {"instruction": f"Count from {n} to {n + 3}.", "input": "" if n % 3 else "in words",
         "output": f"{n} {n + 1} {n + 2} {n + 3}"} for n in range(24)
    ]  # fmt: skip
    names = {"instruction": "question", "input": "input", "output": "answer"}
    renamed = [{names[key]: value for key, value in record.items()} for record in records]
    (folder / "alpaca.json").write_text(json.dumps(records))
    (folder / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))


def write_weights(folder: Path) -> None:
    """Random weights for the directories of `HUB`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    for name, config in HUB.items():
        built = AutoConfig.for_model(**config)
        AutoModelForCausalLM.from_config(built).save_pretrained(folder / name / "hf")
