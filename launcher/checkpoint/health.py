"""Health of saves, by the gradient norm of the embedding in the step that was saved.

Owns the verdict in the state file, and MindFormers' `health_ckpts.json`, a list of
`{"is_health": 0, "ckpt_name": "CKP_rank_0-1_10.safetensors"}`, in which 0 means healthy. A norm far
above normal precedes a loss that does not recover
(https://www.mindspore.cn/mindformers/docs/en/master/feature/skip_data_and_ckpt_health_monitor.html).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import write_bytes
from launcher.checkpoint.names import SaveName

RECORD = "health_ckpts.json"
KEY = "health"
"""Of the verdict in the state file."""


def health_verdict(norm: float, threshold: float) -> dict[str, Any]:
    """The verdict on a save after a step with this norm, for the state file."""
    finite = norm if math.isfinite(norm) else None
    return {"embedding_norm": finite, "threshold": threshold, "is_healthy": norm <= threshold}


def record_verdict(output_dir: Path, name: SaveName, verdict: dict[str, Any]) -> None:
    """Add a save to `health_ckpts.json`. Raises `OSError`."""
    path = output_dir / RECORD
    entry = {"is_health": int(not verdict["is_healthy"]), "ckpt_name": name.rank_file(0)}
    known = [old for old in _entries(path) if old.get("ckpt_name") != entry["ckpt_name"]]
    write_bytes(path, (json.dumps([*known, entry], indent=1) + "\n").encode(), durable=False)


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    return [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []


def health_issue(state: dict[str, Any]) -> str:
    """Why a run that needs a healthy save cannot resume from this one; empty when it can."""
    verdict = state.get(KEY)
    if not isinstance(verdict, dict) or verdict.get("is_healthy", True):
        return ""
    norm = verdict.get("embedding_norm")
    return (
        f"it is not healthy: the gradient norm of the embedding was {norm or 'NaN'}, "
        f"embedding_local_norm_threshold was {verdict.get('threshold')}"
    )
