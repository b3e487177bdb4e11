"""Saves without a manifest: those of other programs, and rank files of Slipway without theirs.

Owns which of them a resume takes: the newest, by the numbers in file names, of which every rank has
a valid file. Time decides nothing, and every file is opened and checked. An incomplete save is
skipped with a line in the log. Files of other saves never replace its missing ones: nothing shows
that they are of the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.catalog import RankFile, unfinished
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.resolve import check_unpublished
from launcher.checkpoint.validation import FAULTS_SHOWN, Found, open_valid_ranks
from launcher.errors import Problem, UserError
from launcher.extensions import SAVE_LIMITS, installed
from launcher.parallel.world import World
from launcher.weights.log import Log
from launcher.weights.ranks.distributed import OpenFiles
from launcher.weights.ranks.manifests import MANIFEST_FOLDER
from launcher.weights.ranks.rank_folders import Save, rank_folders, saves
from launcher.weights.ranks.saves import layout_mark, rank_file_opener
from launcher.weights.source import Source, rank_of


def without_manifest(root: Path) -> list[Save]:
    """The saves in `root` that have no manifest and no in-progress marker, oldest first."""
    if not root.is_dir() or not rank_folders(root):
        return []
    known = {record.removesuffix(".json") for record in unfinished(root)}
    known |= {path.stem for path in (root / MANIFEST_FOLDER).glob("*.json")}
    return [save for save in saves(root) if save.label not in known]


def name_of(save: Save) -> SaveName | None:
    """The name of a save by its files; None where these are not named as those of a training."""
    parsed = parse_rank_file(save.in_rank_order[0].name)
    return parsed[0] if parsed else None


def named(found: Sequence[Save], choice: str) -> list[Save]:
    """The one of `found` whose label, or the name of one of its files, is `choice`; at most one."""
    parsed = parse_rank_file(Path(choice).name)
    return [
        save for save in found
        if choice in {save.label, *(n for f in save.files.values() for n in (f.name, f.stem))}
        or (parsed is not None and parsed[0] == name_of(save))
    ][-1:]  # fmt: skip


def within_limits(root: Path, found: Sequence[Save], world: World, log: Log) -> list[Save]:
    """Those of `found` that the records of other programs in `root` allow, oldest first."""
    kept = list(found)
    for limit in installed(SAVE_LIMITS).values():
        kept = limit(root, kept, world, log)
    return kept


def newest_complete(
    root: Path, candidates: Sequence[Save], world: World, log: Log, strategy: str
) -> tuple[Save, Source]:
    """The last of `candidates` of which every rank has a valid file, and its source; the log names
    those that are skipped.

    Called by all ranks together. `strategy`: path of the strategy files that some rank files need.
    Raises `UserError` when there is none, with the faults of the newest.
    """
    newest: tuple[Problem, ...] = ()
    for save in reversed(candidates):
        files = [RankFile(file) for file in save.in_rank_order]
        found = _checked(open_valid_ranks(root, files, world, _opener(strategy, log)), world)
        if found.source is not None:
            return save, found.source
        problems = found.error.problems if found.error else ()
        reasons = [*found.faults[:FAULTS_SHOWN], *map(str, problems)]
        log(f"skipped {save.label}: {'; '.join(reasons)}")
        newest = newest or (*(Problem(what=text) for text in found.faults), *problems)
    raise UserError([
        Problem(
            what=f"no checkpoint in {root} is complete",
            rule=f"every rank must have a valid file of it; {len(candidates)} were tried",
            advice="Copy what is missing, or use run_mode finetune to start from weights alone",
        ),
        *newest[:FAULTS_SHOWN],
    ])  # fmt: skip


def _opener(strategy: str, log: Log) -> OpenFiles:
    """Opens rank files of any program; strategy files are read only where they are needed."""
    path = Path(strategy) if strategy else None

    def open_files(root: Path, files: Sequence[Path]) -> Source:
        return rank_file_opener(layout_mark(files[0]), root, path, log)(root, files)

    return open_files


def _checked(found: Found, world: World) -> Found:
    """`found` without its source where a rank has no valid file, or ranks are of two runs."""
    if found.source is None:
        return found
    held = {rank_of(file.parent) for file in found.source.headers}
    lost = [rank for rank in range(found.source.world_size) if rank not in held]
    try:
        if lost:
            raise _incomplete(found.source, lost)
        if found.source.mesh is not None:  # described by its files
            check_unpublished(found.source, world)
    except UserError as error:
        return replace(found, source=None, error=error)
    return found


def _incomplete(source: Source, lost: Sequence[int]) -> UserError:
    shown = ", ".join(map(str, lost[:FAULTS_SHOWN])) + " ..." * (len(lost) > FAULTS_SHOWN)
    what = f"rank {shown} has" if len(lost) == 1 else f"ranks {shown} have"
    return UserError(
        f"{what} no valid file of it",
        where=str(source.path),
        rule=f"{source.world_size} ranks wrote it",
    )
