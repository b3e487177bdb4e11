"""The training job of the benchmarks, for this launcher and for its peers.

Owns the one description from which every tool's input is made, so that all do the same: the model
of configs/quickstart.yaml (Qwen3, four million parameters) in float32 on the CPU, the same text
through the same tokenizer into rows of the same length, the same AdamW, clipping and schedule.

Each process writes the time at the end of every step into a file (`peers/stamps.py`,
`peers/trainer.py`), by the clock all processes share.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, run

DATA = ROOT / "data" / "quickstart"
TOKENIZER = DATA / "tokenizer"
LONGEST_ROW = 512
WARMUP_STEPS = 4
"""First steps of a run that no speed counts."""
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": LONGEST_ROW,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A short training run."""

    source: Path
    """A folder of text files, packed into rows; or a JSONL file, one document a row."""
    batch_size: int
    seq_length: int
    steps: int
    separate_documents: bool = False
    """Packed rows: attention stays inside a document. The launcher always does this."""
    compiled: bool = False
    """With torch.compile."""
    block: int = 0
    """Steps between two waits for another process (`peers/blocks.py`); 0: it runs through."""

    @property
    def is_packed(self) -> bool:
        return self.source.is_dir()


Command = Callable[[Job, Path], Sequence[str | Path]]


def slipway(job: Job, folder: Path) -> Sequence[str | Path]:
    """The command that does the job with this launcher; its files go into `folder`."""
    source = {
        "type": "TextDataLoader" if job.is_packed else "HFDataLoader",
        "dataset_dir": str(job.source),
    }
    content: dict[str, Any] = {
        "output_dir": str(folder / "output"),
        "model": {"model_config": {"type": "Qwen3Config", **MODEL}},
        "processor": {"tokenizer": {"pretrained_model_dir": str(TOKENIZER)}},
        "train_dataset": {
            "data_loader": source,
            "seq_length": job.seq_length,
            "packing": job.is_packed,
        },
        "runner_config": {"batch_size": job.batch_size, "max_steps": job.steps, "epochs": 100},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "weight_decay": 0.1},
        "lr_schedule": {"type": "CosineWithWarmUpLR", "learning_rate": 1e-3, "warmup_steps": 1},
        "runner_wrapper": {"max_grad_norm": 1.0},
        "context": {"device_target": "CPU"},
        "register_path": str(ROOT / "benchmarks" / "peers" / "stamps.py"),
        "callbacks": [{"type": "Stamps", "path": str(folder / "stamps")}],
        "compile": job.compiled,
    }
    if job.block:
        content["register_path"] = str(ROOT / "benchmarks" / "peers" / "blocks.py")
        content["callbacks"] = [{"type": "Blocks", "folder": str(folder), "each": job.block}]
    config = folder / "job.yaml"
    config.write_text(json.dumps(content, indent=1))  # YAML reads JSON
    return (sys.executable, "run.py", "--config", config, "--run_mode", "train")


def trainer(job: Job, folder: Path) -> Sequence[str | Path]:
    """The command that does the job with transformers.Trainer; its files go into `folder`."""
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": "qwen3", **MODEL}))
    command: list[str | Path] = [sys.executable, "benchmarks/peers/trainer.py"]
    for name, value in {
        "config": config,
        "tokenizer": TOKENIZER,
        "data": job.source,
        "batch_size": job.batch_size,
        "seq_length": job.seq_length,
        "steps": job.steps,
        "output_dir": folder / "output",
        "stamps": folder / "stamps",
    }.items():
        command += [f"--{name}", str(value)]
    command += ["--compiled"] if job.compiled else []
    command += ["--block", str(job.block)] if job.block else []
    return [*command, "--separate_documents"] if job.separate_documents else command


def step_ends(command: Command, job: Job, threads: int) -> list[float]:
    """Seconds from the start of the process to the end of each step, in a fresh folder."""
    with tempfile.TemporaryDirectory() as name:
        words = command(job, Path(name))
        started = time.time()
        run(words, threads=threads)
        ends = [float(line) - started for line in Path(name, "stamps").read_text().split()]
    if len(ends) != job.steps:
        raise RuntimeError(f"{len(ends)} steps, not {job.steps}")
    return ends


def tokens_per_second(command: Command, job: Job, threads: int) -> float:
    """Over all steps behind the warm-up."""
    measured = step_ends(command, job, threads)[WARMUP_STEPS - 1 :]
    tokens = job.batch_size * job.seq_length * (len(measured) - 1)
    return tokens / (measured[-1] - measured[0])


def quickstart_data() -> Path:
    """The folder of the quickstart's data, made when it is not there."""
    run((sys.executable, "-m", "launcher.tools.prepare_quickstart", "--output_dir", DATA))
    return DATA


def full_rows(target: Path, count: int) -> Path:
    """A JSONL file at `target` of `count` documents, each longer than any row of the benchmarks.

    One document a row, cut at its end: rows without padding and without a border inside.
    """
    characters = 16 * LONGEST_ROW  # a token has about four, and never sixteen on the average
    sources = (path.read_text(encoding="utf-8") for path in sorted((DATA / "train").rglob("*.py")))
    texts = [text[:characters] for text in sources if len(text) >= characters][:count]
    if len(texts) < count:
        raise RuntimeError(f"the corpus has {len(texts)} long files, not {count}")
    target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return target
