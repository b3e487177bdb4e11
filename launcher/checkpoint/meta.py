"""meta.json: what each rank folder says was saved last, `{last_epoch, last_step, last_ckpt_file}`.

Owns reading it, as MindFormers wrote it: one a rank, of that rank's last finished save. Ranks may
have come to different saves, and no rank is behind the smallest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.checkpoint.files import read_json
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.weights.ranks.rank_folders import rank_folders

META = "meta.json"


def last_saves(root: Path) -> tuple[list[SaveName], list[str]]:
    """(the save that each rank folder in `root` names, what is wrong with the other meta.json)."""
    found, faults = [], []
    for rank, folder in rank_folders(root).items():
        save = _save_in(folder / META, rank)
        if isinstance(save, str):
            faults.append(f"{folder / META} {save}")
        else:
            found.append(save)
    return found, faults


def _save_in(path: Path, rank: int) -> SaveName | str:
    """The save that a meta.json names, or what is wrong with it."""
    if not path.is_file():
        return "is missing"
    content = read_json(path)
    if content is None:
        return "cannot be read"
    numbers = content.get("last_epoch"), content.get("last_step")
    if not all(map(_is_count, numbers)):
        return f"has the epoch {numbers[0]!r} and the step {numbers[1]!r}"
    parsed = parse_rank_file(str(content.get("last_ckpt_file")))
    if parsed is None or parsed[1] != rank or (parsed[0].epoch, parsed[0].step) != numbers:
        return (
            f"names {content.get('last_ckpt_file')!r}, which is no file of rank {rank}, epoch "
            f"{numbers[0]} and step {numbers[1]}"
        )
    return parsed[0]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
