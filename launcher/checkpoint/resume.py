"""Which checkpoint a path means, and what a resume brings back.

Owns the choice: the newest published checkpoint whose files and state are whole, by sequence
number, never by time. One that is not is named and passed over. Where nothing was published, the
saves of MindFormers count (`unpublished`), and its complete weights with their counters. All ranks
check, one decides, all hear the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoint.cleanup import is_unfinished
from launcher.checkpoint.files import read_json
from launcher.checkpoint.folder import Folder, scan
from launcher.checkpoint.health import health_issue
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.published import Published
from launcher.checkpoint.validation import latest_valid, no_valid_save, warn_skipped
from launcher.checkpoint.without_manifest import (
    name_of,
    named,
    newest_complete,
    within_limits,
    without_manifest,
)
from launcher.errors import UserError, did_you_mean
from launcher.parallel.world import World
from launcher.weights.forms import step_names
from launcher.weights.ranks.manifests import STATE_FOLDER, state_fault
from launcher.weights.ranks.rank_folders import Save
from launcher.weights.source import Source, detect, is_rank_folder, open_complete


@dataclass(frozen=True)
class Chosen:
    """The checkpoint a resume goes on from."""

    root: Path
    label: str
    """What names it in messages: `CKP-1_10`."""
    name: SaveName | None
    """Its name; None: its files are not named as those of a training."""
    files: Sequence[Path]
    source: Source
    state: dict[str, Any]
    """The content of its state file; empty where it has none: a save of MindFormers, or of ours
    copied without."""
    is_newest: bool
    """Whether it was published, and nothing in the folder after it, on any disk. A damaged manifest
    of its run counts as newer: it has the name of a save that the run would make again."""

    @property
    def state_path(self) -> Path:
        """Where its state lies, if it has one."""
        return self.root / STATE_FOLDER / f"{self.label}.json"


def choose(
    root: Path, choice: bool | str, world: World, log: Callable[[str], None], strategy: str = "",
    *, healthy: bool = False, without: Collection[str] | None = None,
) -> Chosen | None:  # fmt: skip
    """The checkpoint in folder `root` to resume from; None when the folder holds none at all.

    `choice` is True for the newest, or the name of one (`CKP_rank_0-1_10`, with or without
    extension). `strategy` is where strategy files lie, for rank files of MindSpore; left out,
    beside `root`. With `healthy` an unhealthy save is passed over, unless it is named.
    With `without` only published saves count, and not those with these names. Raises `UserError`
    when what is there cannot be used.
    """
    if world.from_main(root.is_file()):
        if not is_rank_folder(root.parent):
            raise _no_checkpoint(root)
        root, choice = root.parent.parent, root.name
    folder = scan(root, world)
    held = folder.candidates
    others = _unpublished_in(folder, world)
    _same_folder(root, [*held, *others], world)
    damaged = warn_skipped(folder, world, log)
    if without is not None:
        left = [found for found in held if str(found.name) not in without]
        among = replace(folder, candidates=left)
        return _published(among, held[-1], damaged, world, log, healthy=healthy) if left else None
    if not held and (damaged or folder.newest_partial):
        raise no_valid_save(root, len(damaged) or len(folder.partial_saves))
    if isinstance(choice, str) and (held or others):
        candidates, others = _named(root, held, others, choice)
        chosen = replace(folder, candidates=candidates)
        healthy = False
    else:
        chosen = folder
        others = within_limits(root, others, world, log) if others and not held else others
    if chosen.candidates:
        return _published(chosen, held[-1], damaged, world, log, healthy=healthy)
    return _unpublished(root, others, world, log, strategy) if others else _complete(folder, world)


def _unpublished_in(folder: Folder, world: World) -> list[Save]:
    """Saves without a manifest, but for those that were begun on some disk, or published there."""
    known = {*folder.begun, *(half.record for half in folder.partial_saves)}
    found: list[Save] = world.from_main(without_manifest(folder.root))
    return [save for save in found if f"{save.label}.json" not in known]


def _published(
    folder: Folder, newest: Published, damaged: Sequence[Path], world: World,
    log: Callable[[str], None], *, healthy: bool,
) -> Chosen:  # fmt: skip
    lacks = partial(_lack, healthy=healthy)
    candidate, source = latest_valid(
        folder.candidates, world, log, lacks, filesystems=folder.filesystems
    )
    state = read_json(candidate.state_path)
    assert state is not None
    taken = {path.stem.rpartition("-")[0] for path in damaged}
    is_newest = candidate == newest and candidate.name.label not in taken
    is_newest &= candidate.sequence > folder.newest_partial
    return Chosen(
        candidate.root, str(candidate.name), candidate.name, candidate.files, source, state,
        is_newest,
    )  # fmt: skip


def _unpublished(
    root: Path, candidates: Sequence[Save], world: World, log: Callable[[str], None], strategy: str
) -> Chosen:
    save, source = newest_complete(root, candidates, world, log, strategy)
    chosen = Chosen(root, save.label, name_of(save), save.in_rank_order, source, {}, False)
    state = world.from_main(read_json(chosen.state_path))
    is_ours = source.mesh is not None
    return replace(chosen, state=state or {}) if is_ours else chosen


def _complete(folder: Folder, world: World) -> Chosen | None:
    """Complete weights with the counters of MindFormers beside them; None where there is nothing
    that was finished."""
    root, kind = folder.root, detect(folder.root)
    if kind == "distributed" and root.is_dir() and is_unfinished(root, folder.begun):
        kind = "nothing"  # the first save of a run was never finished
    kinds = set(world.gather(kind))
    if kinds == {"nothing"}:
        return None
    source = open_complete(root) if kinds == {"complete"} else None
    if source is None or not source.extras.keys() & {*step_names()}:
        raise _no_checkpoint(root)
    return Chosen(root, root.name, None, list(source.headers), source, {}, False)


def _lack(candidate: Published, *, healthy: bool) -> str:
    """What keeps a run from going on from whole files; empty when nothing does."""
    fault = state_fault(candidate.state_path, candidate.manifest)
    if fault or not healthy:
        return fault
    return health_issue(read_json(candidate.state_path) or {})


def _named(
    root: Path, candidates: Sequence[Published], others: Sequence[Save], choice: str
) -> tuple[list[Published], list[Save]]:
    """The one of the published `candidates` or of the `others` that has this name."""
    parsed = parse_rank_file(Path(choice).name)
    for candidate in candidates:
        if str(candidate.name) == choice or (parsed and candidate.name == parsed[0]):
            return [candidate], []
    found = named(others, choice)
    if found:
        return [], found
    names = [*(other.label for other in others), *(str(found.name) for found in candidates)]
    raise UserError(
        f"resume_training = {choice!r}: there is no such checkpoint in {root}",
        rule=f"it holds {', '.join(names[-5:])}",
        nearest=did_you_mean(choice, names),
    )


def _same_folder(root: Path, candidates: Sequence[object], world: World) -> None:
    """Every rank must see the folder that rank 0 found checkpoints in."""
    seen = world.gather(root.is_dir())
    if candidates and not all(seen):
        raise UserError(
            f"{root} cannot be found by rank {seen.index(False)}",
            rule=f"rank 0 found {len(candidates)} checkpoints there, and all ranks read it",
            advice="Put the checkpoints where every machine sees them, under one path",
        )


def _no_checkpoint(root: Path) -> UserError:
    return UserError(
        f"{root} holds weights, but no checkpoint of this launcher",
        rule="a resume needs the state of the run (checkpoint/manifest and checkpoint/state)",
        advice="Use run_mode finetune to start from weights alone",
    )
