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
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.data.mindrecord_writer import write_mindrecord
from tests.mindspore.test_mindformers_yaml import FOLDERS
from tests.ranks import run_job

NAME = "research/qwen2_5/finetune_qwen2_5_7b_8k.yaml"
CHECKOUTS = [folder for folder in FOLDERS if (folder / NAME).exists()]
SEQ_LENGTH, VOCABULARY, PADDING = 32, 600, 1
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


def write_alpaca(path: Path, rows: int = 40) -> None:
    """Rows of SEQ_LENGTH + 1 tokens of arithmetic progressions, padded at the end."""
    random, records = np.random.default_rng(3), []
    for _ in range(rows):
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
        print(done.stdout)
        assert done.code == 0, done.stderr + done.stdout
        assert len(losses(folder, output)) == 40
        ranks = sorted(path.name for path in (folder / output / "checkpoint").glob("rank_*"))
        assert ranks == [f"rank_{rank}" for rank in range(8)]
    first, second = (losses(folder, f"{checkout.name}_{name}") for name in runs)
    assert second[0] < first[0]
