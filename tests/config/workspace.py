"""A folder with one right configuration and everything it names, for tests to break."""

from __future__ import annotations

import json
from pathlib import Path

from tests.config.weight_files import MINDSPORE_CKPT, safetensors

RIGHT = """\
seed: 7
output_dir: ./out
trainer:
  type: CausalLanguageModelingTrainer
processor:
  tokenizer:
    pretrained_model_dir: tokenizer
model:
  model_config:
    type: Qwen3Config
    vocab_size: 64
    hidden_size: 32
    intermediate_size: 64
    num_layers: 2
    num_heads: 4
    n_kv_heads: 2
    head_dim: 8
    max_position_embeddings: 128
train_dataset: &train
  data_loader:
    type: TextDataLoader
    dataset_dir: corpus
  seq_length: 64
  packing: True
train_dataset_task:
  type: CausalLanguageModelDataset
  dataset_config: *train
runner_config:
  epochs: 2
  batch_size: 4
  sink_mode: False
optimizer:
  type: AdamW
  betas: [0.9, 0.95]
  weight_decay: 0.1
lr_schedule:
  type: CosineWithWarmUpLR
  learning_rate: 1e-3
  warmup_ratio: 0.1
callbacks:
  - type: MFLossMonitor
  - type: CheckpointMonitor
    prefix: demo
    save_checkpoint_steps: 10
"""


def build(folder: Path) -> Path:
    """Fill `folder`; `right.yaml` in it passes every check. Returns the folder."""
    (folder / "right.yaml").write_text(RIGHT)
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.txt").write_text("some text\n" * 20)
    (folder / "prompts.txt").write_text("one\ntwo\n")
    (folder / "user_callbacks.py").write_text("class Mine: ...\n")
    _tokenizer(folder / "tokenizer", size=60)
    _tokenizer(folder / "large_tokenizer", size=80)
    hugging_face = folder / "qwen"
    _tokenizer(hugging_face, size=60)
    config = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    (hugging_face / "config.json").write_text(json.dumps(config))
    safetensors(hugging_face / "model.safetensors")
    _tokenizer(folder / "no_weights", size=60)
    (folder / "no_weights" / "config.json").write_text(json.dumps(config))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text('{"model_type": "qwen3",\n "hidden_size": }')
    for rank in (0, 1):
        rank_folder = folder / "ranks" / f"rank_{rank}"
        rank_folder.mkdir(parents=True)
        (rank_folder / f"CKP_rank_{rank}-1_10.safetensors").write_bytes(b"")
    (folder / "old").mkdir()
    (folder / "old" / "net.ckpt").write_bytes(MINDSPORE_CKPT)
    return folder


def _tokenizer(folder: Path, *, size: int) -> None:
    folder.mkdir()
    vocabulary = {f"t{index}": index for index in range(size)}
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))
