"""Saves that no manifest publishes: those of MindFormers, and rank files of ours without theirs.

Owns which of them a resume goes on from, by the rules of MindFormers but for two: time decides
nothing, and every file is opened and checked.

    rank_0/meta.json  1_30      the smallest counts: no rank is behind 1_20;
    rank_1/meta.json  1_20      of the saves up to it, the last that all ranks have whole is taken

Without a meta.json that can be used, the numbers in names say which is the newest. What stands in
no complete save is passed over by name: other ranks' files do not stand in for it, for nothing says
that they are of the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.cleanup import unfinished
from launcher.checkpoint.meta import last_saves
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.resolve import check_unpublished, with_strategy
from launcher.checkpoint.validation import (
    FAULTS_SHOWN,
    Found,
    Log,
    OpenFiles,
    RankFile,
    open_valid_ranks,
)
from launcher.errors import Problem, UserError
from launcher.parallel.world import World
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.manifests import MANIFEST_FOLDER
from launcher.weights.ranks.rank_folders import Save, rank_folders, saves
from launcher.weights.ranks.saves import describes_itself
from launcher.weights.source import Source, rank_of


def unpublished(root: Path) -> list[Save]:
    """The saves in `root` that have neither a manifest nor the intent of one, oldest first."""
    if not root.is_dir() or not rank_folders(root):
        return []
    known = {record.removesuffix(".json") for record in unfinished(root)}
    known |= {path.stem for path in (root / MANIFEST_FOLDER).glob("*.json")}
    return [save for save in saves(root) if save.label not in known]


def name_of(save: Save) -> SaveName | None:
    """What its files say by their names; None where they are not named as those of a training."""
    parsed = parse_rank_file(save.in_rank_order[0].name)
    return parsed[0] if parsed else None


def named(found: Sequence[Save], choice: str) -> list[Save]:
    """The one of `found` with this name, that of a file or the label, at most one."""
    parsed = parse_rank_file(Path(choice).name)
    return [
        save for save in found
        if choice in {save.label, *(n for f in save.files.values() for n in (f.name, f.stem))}
        or (parsed is not None and parsed[0] == name_of(save))
    ][-1:]  # fmt: skip


def not_after_meta(root: Path, found: Sequence[Save], world: World, log: Log) -> list[Save]:
    """Those of `found` that no rank's meta.json is behind, oldest first; all of them where none can
    be used. Says what cannot."""
    entries, faults = world.from_main(last_saves(root))
    if not entries:
        log(f"warning: no meta.json in {root} can be used: the numbers in names say what is newest")
        return list(found)
    for fault in faults[:FAULTS_SHOWN]:
        log(f"warning: {fault}: passed over")
    if len(faults) > FAULTS_SHOWN:
        log(f"warning: {len(faults) - FAULTS_SHOWN} more meta.json are passed over")
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
            rule="the smallest meta.json of all ranks says up to where every rank has saved",
            nearest=f"It holds {', '.join(save.label for save in found[-FAULTS_SHOWN:])}",
            advice="Name one of them as resume_training",
        )
    return [save for *_, save in sorted(kept, key=lambda item: item[:3])]


def _place(name: SaveName) -> tuple[int, int]:
    return name.epoch, name.step


def newest_complete(
    root: Path, candidates: Sequence[Save], world: World, log: Log, strategy: str
) -> tuple[Save, Source]:
    """The last of `candidates` of which every rank has a whole file, and its source; those passed
    over are named.

    Called by all ranks together. `strategy` is where strategy files lie; left out, beside `root`.
    Raises `UserError` when there is none, with what keeps the newest from being used.
    """
    newest: tuple[Problem, ...] = ()
    for save in reversed(candidates):
        files = [RankFile(file) for file in save.in_rank_order]
        found = _checked(open_valid_ranks(root, files, world, _opener(strategy, log)), world)
        if found.source is not None:
            return save, found.source
        problems = found.error.problems if found.error else ()
        reasons = [*found.faults[:FAULTS_SHOWN], *map(str, problems)]
        log(f"passed over {save.label}: {'; '.join(reasons)}")
        newest = newest or (*(Problem(what=text) for text in found.faults), *problems)
    raise UserError([
        Problem(
            what=f"no checkpoint in {root} is complete",
            rule=f"every rank must have a whole file of it, and of the newest of {len(candidates)} "
            "not all have",
            advice="Copy what is missing, or use run_mode finetune to start from weights alone",
        ),
        *newest[:FAULTS_SHOWN],
    ])  # fmt: skip


def _opener(strategy: str, log: Log) -> OpenFiles:
    """Opens rank files of either kind. Strategy files are read where they are needed."""

    def open_files(root: Path, files: Sequence[Path]) -> Source:
        if describes_itself(files[0]):
            return open_rank_files(root, files)
        return with_strategy(root, strategy, log)(root, files)

    return open_files


def _checked(found: Found, world: World) -> Found:
    """`found` without its source where a rank has no whole file, or ranks are of two runs."""
    if found.source is None:
        return found
    held = {rank_of(file.parent) for file in found.source.headers}
    lost = [rank for rank in range(found.source.world_size) if rank not in held]
    try:
        if lost:
            raise _incomplete(found.source, lost)
        if found.source.mesh is not None:  # of ours
            check_unpublished(found.source, world)
    except UserError as error:
        return replace(found, source=None, error=error)
    return found


def _incomplete(source: Source, lost: Sequence[int]) -> UserError:
    shown = ", ".join(map(str, lost[:FAULTS_SHOWN])) + " ..." * (len(lost) > FAULTS_SHOWN)
    what = f"rank {shown} has" if len(lost) == 1 else f"ranks {shown} have"
    return UserError(
        f"{what} no whole file of it",
        where=str(source.path),
        rule=f"{source.world_size} ranks wrote it",
    )
