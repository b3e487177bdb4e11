"""Data of preferences for tests, and the configurations that train on it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.workshop import Workshop

_WORDS = ["def", "return", "self", "import", "for", "if", "while", "yield", "lambda", "class"]
LENGTH = 32

PAIRS: list[dict[str, Any]] = [
    {
        "prompt": f"{_WORDS[i % 10]} {_WORDS[(i * 3 + 1) % 10]}:",
        "chosen": f" {_WORDS[(i * 7) % 10]} {i}",
        "rejected": f" {_WORDS[(i * 5 + 2) % 10]} x {i % 7} not",
    }
    for i in range(24)
]
JUDGED: list[dict[str, Any]] = [
    {
        "prompt": pair["prompt"],
        "completion": pair["chosen"] if i % 3 else pair["rejected"],
        "label": bool(i % 3),
    }
    for i, pair in enumerate(PAIRS)
]


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_preferences(workshop: Workshop) -> None:
    """`pairs.jsonl` and `judged.jsonl` in the workshop."""
    write_records(workshop.folder / "pairs.jsonl", PAIRS)
    write_records(workshop.folder / "judged.jsonl", JUDGED)


def settings(loss: str, **preference: Any) -> dict[str, Any]:
    """Changes of `workshop.BASE`: four steps of four samples, evaluated at the end."""
    kto = loss == "kto"
    loader = {
        "type": "FeedbackDataLoader" if kto else "PreferenceDataLoader", "dataset_dir": None,
        "dataset_files": "judged.jsonl" if kto else "pairs.jsonl",
    }  # fmt: skip
    return {
        "trainer": {"type": "DPOTrainer"},
        "preference": {"loss": loss, **preference},
        "train_dataset": {"data_loader": loader, "seq_length": LENGTH, "packing": False},
        "eval_dataset": {
            "data_loader": {k: v for k, v in loader.items() if v}, "seq_length": LENGTH,
        },
        "do_eval": True,
        "runner_config": {"batch_size": 4, "max_steps": 4},
        "data_cache": {"dir": "cache"},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 2}],
    }  # fmt: skip
