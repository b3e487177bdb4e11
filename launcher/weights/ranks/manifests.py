"""Manifests: the record that publishes a save, and whether it is unchanged.

Owns the text of `manifest/{save}.json`. Its last field is a seal: the xxh3_64 of everything before
it, so that any changed bit is detected, even one that leaves valid JSON:

    {"version": 2, "sequence": 3, ..., "state_xxh3_64": "...", "xxh3_64": "58d3ae0c1f5a7e02"}

It also holds the digests of the state file and of the headers of the rank files, which hold the
checksums of their data: one seal covers the entire save. Version 1 had no seal and no digest of the
state; it is still read. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

MANIFEST_FOLDER = "manifest"
"""Beside the rank folders: one JSON file for each published save."""
STATE_FOLDER = "state"
"""Beside the rank folders: the state of the run for each save, which a resume needs."""
BEST_FILE = "best.json"
"""Beside the rank folders: which save has the best evaluation, where `keep_best` is on."""
EVALUATION = "evaluation"
"""Of a manifest and a state file: the evaluation row of the step, if the step was evaluated."""
DISKS = "disks"
"""For a save on several disks, the ranks whose files are on one disk, disk by disk. All disks have
the same manifest."""
VERSION = 2
UNSEALED_VERSION = 1
"""More than one bit from `VERSION`: no single flipped bit makes a sealed manifest unsealed."""
SEAL = "xxh3_64"
RANKS_SHOWN = 4
_END = b'"\n}\n'
_DIGEST_CHARACTERS = 16


def digest_of(content: bytes) -> str:
    """xxh3_64 of `content`, in hex."""
    return xxhash.xxh3_64_hexdigest(content)


def sealed(content: Mapping[str, Any]) -> bytes:
    """The manifest with this `content`: JSON with the seal as its last field."""
    text = json.dumps({"version": VERSION, **content, SEAL: ""}, indent=1) + "\n"
    head = text.encode().removesuffix(_END)
    return head + digest_of(head).encode() + _END


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The content of the manifest at `path`; None when it cannot be read or was changed."""
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    if content.get("version") == UNSEALED_VERSION and SEAL not in content:
        return content
    return content if _seal_holds(raw) else None


def _seal_holds(raw: bytes) -> bool:
    head, digest = raw[: -len(_END) - _DIGEST_CHARACTERS], raw[: -len(_END)][-_DIGEST_CHARACTERS:]
    return raw.endswith(_END) and digest_of(head).encode() == digest


def state_fault(path: Path, manifest: Mapping[str, Any]) -> str:
    """The fault of the state file at `path` of a save with this `manifest`; empty when it is
    unchanged."""
    raw, content = b"", None
    with suppress(OSError, ValueError, RecursionError):
        raw = path.read_bytes()
        content = json.loads(raw)
    if not isinstance(content, dict):
        return f"{path} cannot be read"
    digest = digest_of(raw)
    is_same = manifest.get("state_xxh3_64", digest) == digest
    return "" if is_same else f"{path} changed since it was saved"


def ranks_elsewhere(folder: Path, manifest: Mapping[str, Any]) -> list[int]:
    """The ranks whose files are on other disks than `folder`, for a save on several disks: those of
    each disk of which no file is here, while files of another disk are."""
    here = {record["rank"] for record in manifest["files"] if (folder / record["file"]).is_file()}
    away = [ranks for ranks in manifest.get(DISKS, ()) if here.isdisjoint(ranks)]
    return sorted(rank for ranks in away for rank in ranks) if here else []


def text_of_elsewhere(ranks: Sequence[int]) -> str:
    """The remark on files that are on other disks; empty without any."""
    shown = ", ".join(map(str, ranks[:RANKS_SHOWN])) + " ..." * (len(ranks) > RANKS_SHOWN)
    return f"{len(ranks)} of its files lie on other disks (ranks {shown})" if ranks else ""
