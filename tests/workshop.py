"""What end-to-end tests work on: real text, a real tokenizer, YAML files, a folder of their own."""

from __future__ import annotations

import copy
import json
import shutil
import textwrap as text_module
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 512

BASE: dict[str, Any] = {
    "seed": 7,
    "output_dir": "output",
    "model": {
        "model_config": {
            "type": "Qwen3Config", "vocab_size": VOCABULARY, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
    },
    "processor": {"tokenizer": {"pretrained_model_dir": "tokenizer"}},
    "train_dataset": {
        "data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus"},
        "seq_length": 32,
        "packing": True,
    },
    "runner_config": {"epochs": 1, "batch_size": 8, "max_steps": 20},
    "optimizer": {"type": "AdamW", "eps": 1e-4, "weight_decay": 0.1},
    "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 1e-2, "warmup_steps": 4},
    "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 10}],
    "context": {"device_target": "CPU"},
}  # fmt: skip


class Workshop:
    """A folder with `corpus/`, `tokenizer/` and the YAML files a test writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def copy_to(self, folder: Path) -> Workshop:
        """The same materials in another folder."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Workshop(folder)

    def yaml(
        self, name: str = "run.yaml", base: dict[str, Any] | None = None, **changes: Any
    ) -> str:
        """Write a configuration: `BASE` with `changes` merged deeply. Returns its file name."""
        config = merged(BASE if base is None else base, changes)
        (self.folder / name).write_text(yaml.safe_dump(config, sort_keys=False))
        return name

    def rows(self, output: str = "output") -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        lines = (self.folder / output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self, output: str = "output") -> list[float]:
        """Training loss of each step."""
        return [row["loss"] for row in self.rows(output) if "loss" in row]

    def saved(self, output: str, name: str, world_size: int = 1) -> dict[str, bytes]:
        """Rank files and state of one save (`1_20`), by path below `output`."""
        root = self.folder / output / "checkpoint"
        files = [
            next((root / f"rank_{r}").glob(f"*-{name}.safetensors")) for r in range(world_size)
        ]
        files.append(next((root / "state").glob(f"*-{name}.json")))
        return {str(file.relative_to(root)): file.read_bytes() for file in files}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` merged deeply; a value of None drops the key."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def build_materials(folder: Path) -> Workshop:
    """A corpus of a few standard-library files and a byte-level BPE tokenizer trained on it."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    library = Path(text_module.__file__).parent
    for name in ("textwrap.py", "bisect.py", "heapq.py", "fnmatch.py", "shlex.py"):
        shutil.copy(library / name, corpus / name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train([str(path) for path in sorted(corpus.iterdir())], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    ).save_pretrained(folder / "tokenizer")
    return Workshop(folder)
