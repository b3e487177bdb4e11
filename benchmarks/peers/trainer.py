"""The job of the benchmarks with transformers.Trainer, as its user would write it.

Text files are tokenised in one call, joined and cut into rows; a JSONL file gives one row a
document. `--separate_documents` adds positions that restart with each document, from which
transformers makes the mask that keeps packed documents apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Stamps(TrainerCallback):
    """One line a step, seconds of the clock that all processes share."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self._file.write(f"{time.time()}\n")


class Blocks(TrainerCallback):
    """Waits after each block of steps."""

    def __init__(self, folder: Path, each: int) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from benchmarks.peers.blocks import Pacer

        self.pacer = Pacer(str(folder), each)

    def on_train_begin(self, *arguments: Any, **keywords: Any) -> None:
        self.pacer.wait()

    def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
        self.pacer.count()


def packed_rows(folder: Path, tokenizer: Any, length: int, separate: bool) -> list[dict[str, Any]]:
    """Documents one behind the other, cut every `length` tokens; the rest is left out."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    documents = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    tokens = torch.tensor([token for document in documents for token in document])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    columns = {"input_ids": rows, "labels": rows}
    if separate:
        counted = torch.cat([torch.arange(len(document)) for document in documents])
        columns["position_ids"] = counted[: rows.numel()].view(-1, length)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def document_rows(file: Path, tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """The first `length` tokens of each document."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    encoded = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    rows = torch.tensor(encoded)
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    for name in ("config", "tokenizer", "data", "output_dir", "stamps"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("batch_size", "seq_length", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--separate_documents", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--block", type=int, default=0)
    job = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    if job.data.is_dir():
        rows = packed_rows(job.data, tokenizer, job.seq_length, job.separate_documents)
    else:
        rows = document_rows(job.data, tokenizer, job.seq_length)
    arguments = TrainingArguments(
        output_dir=str(job.output_dir),
        per_device_train_batch_size=job.batch_size,
        max_steps=job.steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=1,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=1,
        torch_compile=job.compiled,
    )
    folder = job.stamps.parent
    stamps = Blocks(folder, job.block) if job.block else Stamps(job.stamps)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.config))
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[stamps]).train()


if __name__ == "__main__":
    main()
