"""meta.json: the last finished save of each rank, `{last_epoch, last_step, last_ckpt_file}`.

Owns reading it, and the limit MindFormers derives from it. Ranks may have finished different saves;
every rank has the smallest of them:

    rank_0/meta.json  1_30
    rank_1/meta.json  1_20      a resume takes the last complete save up to 1_20
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import read_json
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.validation import FAULTS_SHOWN
from launcher.checkpoint.without_manifest import name_of
from launcher.errors import UserError
from launcher.parallel.world import World
from launcher.weights.log import Log
from launcher.weights.ranks.rank_folders import Save, rank_folders

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


def not_after_meta(root: Path, found: Sequence[Save], world: World, log: Log) -> list[Save]:
    """Those of `found` up to the smallest meta.json, oldest first; all of them where no meta.json
    is valid. Logs those that are not. Called by all ranks together."""
    entries, faults = world.from_main(last_saves(root))
    if not entries:
        log(f"warning: no meta.json in {root} is valid: using epoch_step of the file names")
        return list(found)
    for fault in faults[:FAULTS_SHOWN]:
        log(f"warning: {fault}: skipped")
    if len(faults) > FAULTS_SHOWN:
        log(f"warning: {len(faults) - FAULTS_SHOWN} more meta.json are skipped")
    bound = min(entries, key=_place)
    names = {save.label: name_of(save) for save in found}
    kept = [
        (*_place(name), name.counter, save) for save in found
        if (name := names[save.label]) is not None
        and name.prefix == bound.prefix and _place(name) <= _place(bound)
    ]  # fmt: skip
    if not kept:
        raise UserError(
            f"{root} holds no save of {bound.prefix!r} up to epoch {bound.epoch}, step "
            f"{bound.step}",
            rule="the smallest meta.json of all ranks is the last save that every rank has",
            nearest=f"It holds {', '.join(save.label for save in found[-FAULTS_SHOWN:])}",
            advice="Name one of them as resume_training",
        )
    return [save for *_, save in sorted(kept, key=lambda item: item[:3])]


def _place(name: SaveName) -> tuple[int, int]:
    return name.epoch, name.step


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
            f"names {content.get('last_ckpt_file')!r}, which is not a file of rank {rank}, epoch "
            f"{numbers[0]} and step {numbers[1]}"
        )
    return parsed[0]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
