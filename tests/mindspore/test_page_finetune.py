"""The fine-tuning sample of MindFormers' page on safetensors, its YAML with MindRecord data.

Its weights are loaded complete, then as the checkpoint of eight ranks; data parallel 2 x model
parallel 4. Only sizes, paths and the page's own changes are given on the command line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

from launcher.data.order import GlobalOrder
from launcher.mindspore.mindrecord.reader import read_rows
from tests.data.mindrecord_writer import write_mindrecord
from tests.mindspore.test_mindformers_yaml import FOLDERS
from tests.ranks import run_job

NAME = "research/qwen2_5/finetune_qwen2_5_7b_8k.yaml"
CHECKOUTS = [folder for folder in FOLDERS if (folder / NAME).exists()]
SEQ_LENGTH, VOCABULARY, PADDING, ROWS = 32, 600, 1, 16
HUB: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "n_kv_heads": 4, "vocab_size": VOCABULARY,
    "intermediate_size": 48, "seq_length": SEQ_LENGTH, "max_position_embedding": 256,
    "pad_token_id": PADDING, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
PAGE = {
    "load_ckpt_format": "safetensors",
    "parallel_config.data_parallel": 2,
    "parallel_config.model_parallel": 4,
    "parallel_config.pipeline_stage": 1,
    "callbacks.1.checkpoint_format": "safetensors",
}
"""The changes of the page."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face weights, and alpaca rows as MindFormers' script for Qwen2.5 writes them."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(5)
    model = Qwen2ForCausalLM(Qwen2Config(**HUB))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder / "hf_unified_safetensors")
    write_alpaca(folder / "alpaca-data.mindrecord")
    return folder


def write_alpaca(path: Path) -> None:
    """Rows of SEQ_LENGTH + 1 tokens of arithmetic progressions, padded at the end."""
    random, records = np.random.default_rng(3), []
    for _ in range(ROWS):
        length = int(random.integers(SEQ_LENGTH // 2, SEQ_LENGTH + 2))
        start, step = random.integers(2, VOCABULARY, size=2)
        ids = np.full(SEQ_LENGTH + 1, PADDING)
        ids[:length] = 2 + (start + step * np.arange(length)) % (VOCABULARY - 2)
        mask = (ids != PADDING).astype(int)
        records.append({"input_ids": ids, "target_ids": ids, "attention_mask": mask})
    schema = {name: ("int32", [-1]) for name in records[0]}
    write_mindrecord(path, schema, records)


def command(checkout: Path, weights: str, output: str, **changes: object) -> list[str]:
    """The command line of the page, its changes of the file as flags."""
    given: dict[str, object] = {
        "config": checkout / NAME,
        "train_dataset_dir": "alpaca-data.mindrecord",
        "register_path": checkout / "research/qwen2_5",
        "use_parallel": True,
        "run_mode": "finetune",
        "load_checkpoint": weights,
        "output_dir": output,
        **PAGE,
        **{f"model.model_config.{name}": size for name, size in SIZES.items()},
        **changes,
    }
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def first_loss(folder: Path) -> float:
    """The loss of the first two samples, as `transformers` computes it."""
    model = Qwen2ForCausalLM.from_pretrained(folder / "hf_unified_safetensors")
    reader = read_rows(folder / "alpaca-data.mindrecord")
    first = GlobalOrder(ROWS, seed=42).rows([0, 1])
    ids = torch.tensor(np.stack([reader.record(int(row))["input_ids"] for row in first]).tolist())
    tokens, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[tokens == PADDING] = -100  # the rule of MindFormers: by the input
    with torch.no_grad():
        logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    return float(cross_entropy(logits.flatten(0, 1), labels.flatten()))


def losses(folder: Path, output: str) -> list[float]:
    rows = map(json.loads, (folder / output / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows]


@pytest.mark.long
@pytest.mark.skipif(not CHECKOUTS, reason="SLIPWAY_MINDFORMERS is not set")
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda folder: folder.name)
def test_complete_weights_then_distributed_ones(checkout: Path, folder: Path) -> None:
    runs = {
        "complete": ("hf_unified_safetensors", {"auto_trans_ckpt": True}),
        "distributed": (f"{checkout.name}_complete/checkpoint", {}),
    }
    for name, (weights, changes) in runs.items():
        output = f"{checkout.name}_{name}"
        done = run_job(command(checkout, weights, output, **changes), folder, 8)
        assert done.code == 0, done.stderr + done.stdout
        assert len(losses(folder, output)) == ROWS  # two epochs, two samples a step
        ranks = sorted(path.name for path in (folder / output / "checkpoint").glob("rank_*"))
        assert ranks == [f"rank_{rank}" for rank in range(8)]
    first, second = (losses(folder, f"{checkout.name}_{name}") for name in runs)
    assert first[0] == pytest.approx(first_loss(folder), abs=0.02)  # bfloat16
    assert second[0] < first[0]
