"""Which checkpoint a run resumes from.

Owns the choice: the newest published checkpoint with valid files and state, by sequence number,
never by time. Others are logged and skipped. Where nothing is published, saves of MindFormers are
taken (`without_manifest`), or its complete weights with their counters. All ranks check, and all
get the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launcher.checkpoint.catalog import Published, is_unfinished
from launcher.checkpoint.files import read_json
from launcher.checkpoint.folder import Folder, scan
from launcher.checkpoint.health import health_issue
from launcher.checkpoint.names import SaveName, parse_rank_file
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
    """The checkpoint that a run resumes from."""

    root: Path
    label: str
    """Its name in messages: `CKP-1_10`."""
    name: SaveName | None
    """Its name; None where its files are not named like those of a save."""
    files: Sequence[Path]
    source: Source
    state: dict[str, Any]
    """The content of its state file; empty without one, as in saves of MindFormers."""
    is_newest: bool
    """Whether it is the last one published in the folder, on any file system. A damaged manifest of
    its run counts as newer: it has the name of a save that the run would write again."""

    @property
    def state_path(self) -> Path:
        """The path of its state file, if it has one."""
        return self.root / STATE_FOLDER / f"{self.label}.json"


def choose(
    root: Path, choice: bool | str, world: World, log: Callable[[str], None], strategy: str = "",
    *, healthy: bool = False, without: Collection[str] | None = None,
) -> Chosen | None:  # fmt: skip
    """The checkpoint in folder `root` to resume from; None when the folder has none.

    `choice` is True for the newest, or the name of one (`CKP_rank_0-1_10`, with or without
    extension). `strategy`: the folder of strategy files for rank files of MindSpore; by default
    beside `root`. With `healthy` an unhealthy save is skipped, unless it is named. With `without`
    only published saves are considered, except those with these names. Raises `UserError` when no
    checkpoint can be used.
    """
    if world.from_main(root.is_file()):
        if not is_rank_folder(root.parent):
            raise _no_checkpoint(root)
        root, choice = root.parent.parent, root.name
    folder = scan(root, world)
    saves = folder.candidates
    others = _unpublished_in(folder, world)
    _check_same_folder(root, [*saves, *others], world)
    damaged = warn_skipped(folder, world, log)
    if without is None and not saves and (damaged or folder.newest_partial):
        raise no_valid_save(root, len(damaged) or len(folder.partial_saves))
    if without is not None:
        candidates, others = [save for save in saves if str(save.name) not in without], []
    elif isinstance(choice, str) and (saves or others):
        candidates, others = _named(root, saves, others, choice)
        healthy = False
    else:
        candidates = saves
        others = within_limits(root, others, world, log) if others and not saves else others
    if candidates:
        chosen = replace(folder, candidates=candidates)
        return _published(chosen, saves[-1], damaged, world, log, healthy=healthy)
    if others:
        return _unpublished(root, others, world, log, strategy)
    return _complete(folder, world) if without is None else None


def _unpublished_in(folder: Folder, world: World) -> list[Save]:
    """Saves without a manifest, except those that are unfinished or published on a file system."""
    known = {*folder.begun, *(save.record for save in folder.partial_saves)}
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
    damaged_labels = {path.stem.rpartition("-")[0] for path in damaged}
    is_newest = candidate == newest and candidate.name.label not in damaged_labels
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
    is_native = source.mesh is not None
    return replace(chosen, state=state or {}) if is_native else chosen


def _complete(folder: Folder, world: World) -> Chosen | None:
    """Complete weights with the counters of MindFormers; None where no save was finished."""
    root, kind = folder.root, detect(folder.root)
    if kind == "distributed" and root.is_dir() and is_unfinished(root, folder.begun):
        kind = "nothing"  # the first save of a run, which was interrupted
    kinds = set(world.gather(kind))
    if kinds == {"nothing"}:
        return None
    source = open_complete(root) if kinds == {"complete"} else None
    if source is None or not source.extras.keys() & {*step_names()}:
        raise _no_checkpoint(root)
    return Chosen(root, root.name, None, list(source.headers), source, {}, False)


def _lack(candidate: Published, *, healthy: bool) -> str:
    """Why a save with valid files cannot be resumed; empty when it can."""
    fault = state_fault(candidate.state_path, candidate.manifest)
    if fault or not healthy:
        return fault
    return health_issue(read_json(candidate.state_path) or {})


def _named(
    root: Path, candidates: Sequence[Published], others: Sequence[Save], choice: str
) -> tuple[list[Published], list[Save]]:
    """The save of the published `candidates` or of the `others` with this name."""
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


def _check_same_folder(root: Path, saves: Sequence[object], world: World) -> None:
    """Check that every rank has the folder where rank 0 found saves."""
    exists = world.gather(root.is_dir())
    if saves and not all(exists):
        raise UserError(
            f"{root} does not exist on rank {exists.index(False)}",
            rule=f"rank 0 found {len(saves)} checkpoints there, and all ranks read them",
            advice="Give a path that exists on every machine",
        )


def _no_checkpoint(root: Path) -> UserError:
    return UserError(
        f"{root} has weights, but no checkpoint to resume from",
        rule="a resume needs the state of the run (checkpoint/manifest and checkpoint/state)",
        advice="Use run_mode finetune to start from weights alone",
    )
