"""Which adapter a path holds, judged by one JSON file: a directory of PEFT, or a checkpoint.

    adapter/adapter_config.json                           written by PEFT
    output/checkpoint/state/CKP-1_10.json, key adapter    written by a run with pet_config

Owns the entry of an adapter in state files: its description, and which base it belongs to. Pure and
torch-free; no file of weights is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.weights.adapters.config import CONFIG_NAME, read_config
from launcher.weights.ranks.manifests import STATE_FOLDER
from launcher.weights.ranks.rank_folders import first_file, label_of
from launcher.weights.source import detect

ADAPTER = "adapter"
"""Key of a state file."""
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
"""Of a directory of PEFT, the preferred one first."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that an adapter belongs to."""

    path: str = ""
    """Folder or file of its weights, or its name on the Hub; empty: not known."""
    content: str = ""
    """Fingerprint of its weights (`launcher.weights.content`); empty: not known."""
    seed: int | None = None
    """It is random, drawn from this seed."""

    def as_json(self) -> dict[str, Any]:
        """The entry of a state file."""
        if self.seed is not None:
            return {"seed": self.seed}
        return {"path": self.path, "content": self.content}


@dataclass(frozen=True, kw_only=True)
class FoundAdapter:
    """An adapter on disk."""

    path: Path
    """The folder or file that was named."""
    file: Path
    """The JSON file that describes it."""
    is_peft: bool
    config: Mapping[str, Any]
    """As in adapter_config.json. Not checked."""
    base: Base
    tied: Mapping[str, str] = field(default_factory=dict)
    """Names of tied weights that are saved in full, to those they are tied to."""


def find_adapter(path: Path) -> FoundAdapter | None:
    """The adapter at `path`; None where there is none. Raises `UserError` for a description that
    cannot be read."""
    if path.is_file() and path.name in (CONFIG_NAME, *WEIGHT_NAMES):
        path = path.parent
    if is_peft_directory(path):
        file = path / CONFIG_NAME
        config = read_config(file)
        name = config.get("base_model_name_or_path")
        base = Base(path=name if isinstance(name, str) else "")
        return FoundAdapter(path=path, file=file, is_peft=True, config=config, base=base)
    return _in_checkpoint(path)


def is_peft_directory(path: Path) -> bool:
    """Whether a folder holds an adapter in the form of PEFT, by the names of its files."""
    return (path / CONFIG_NAME).is_file()


def state_of_save(rank_file: Path) -> dict[str, Any]:
    """The state file of the save that a rank file belongs to; empty where it cannot be read."""
    return _read(_state_path(rank_file))


def entry_of(state: Mapping[str, Any], path: Path, file: Path) -> FoundAdapter | None:
    """The adapter of the content of a state file; None without one."""
    entry = state.get(ADAPTER)
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        return None
    base = entry.get("base") if isinstance(entry.get("base"), dict) else {}
    assert isinstance(base, dict)
    seed = base.get("seed")
    known = Base(
        path=str(base.get("path") or ""), content=str(base.get("content") or ""),
        seed=seed if isinstance(seed, int) else None,
    )  # fmt: skip
    tied = entry.get("tied")
    return FoundAdapter(
        path=path, file=file, is_peft=False, config=entry["config"], base=known,
        tied={str(k): str(v) for k, v in tied.items()} if isinstance(tied, dict) else {},
    )  # fmt: skip


def no_adapter(path: Path) -> UserError:
    """The error for a path that should hold an adapter."""
    inside = find_adapter(path / "adapter") or find_adapter(path / "checkpoint")
    return UserError(
        f"{path} holds no adapter" if path.exists() else f"{path}: there is no such path",
        rule=f"an adapter is a directory of PEFT ({CONFIG_NAME} and {WEIGHT_NAMES[0]}), or a folder"
        " of checkpoints of a run with pet_config",
        nearest=f"did you mean `{inside.path}`?" if inside is not None else "",
        advice="" if inside is not None or detect(path) != "distributed" else
        f"python -m launcher.tools.export --load_checkpoint {path} --output_dir DIR exports "
        "complete weights",
    )  # fmt: skip


def _in_checkpoint(path: Path) -> FoundAdapter | None:
    with suppress(UserError, OSError):
        file = first_file(path) if detect(path) == "distributed" else None
        if file is not None:
            return entry_of(state_of_save(file), path, _state_path(file))
    return None


def _state_path(rank_file: Path) -> Path:
    return rank_file.parent.parent / STATE_FOLDER / f"{label_of(rank_file)}.json"


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_bytes())
        return content if isinstance(content, dict) else {}
    return {}
