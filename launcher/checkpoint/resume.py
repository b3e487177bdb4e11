"""Which checkpoint a path means, and what a resume brings back.

Owns the choice: the newest published checkpoint whose files and state are whole, by sequence
number, never by time. One that is not is named and passed over. All ranks check, one decides, all
hear the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import read_json
from launcher.checkpoint.folder import see
from launcher.checkpoint.leftovers import is_unfinished
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.published import Published
from launcher.checkpoint.wholeness import newest_whole, none_is_whole, tell_what_does_not_count
from launcher.errors import UserError, did_you_mean
from launcher.parallel.world import World
from launcher.weights.ranks.manifests import state_fault
from launcher.weights.source import Source, detect, is_rank_folder


@dataclass(frozen=True)
class Chosen:
    """The checkpoint a resume goes on from."""

    published: Published
    state: dict[str, Any]
    source: Source
    is_newest: bool
    """Whether nothing in the folder was published after it, on any disk. A damaged manifest of its
    run counts as newer: it has the name of a save that the run would make again."""

    @property
    def name(self) -> SaveName:
        """Its name."""
        return self.published.name


def choose(
    root: Path, choice: bool | str, world: World, say: Callable[[str], None]
) -> Chosen | None:
    """The checkpoint in folder `root` to resume from; None when the folder holds none at all.

    `choice` is True for the newest, or the name of one (`CKP_rank_0-1_10`, with or without
    extension). Raises `UserError` when what is there cannot be used.
    """
    if world.from_main(root.is_file()):
        found = parse_rank_file(root.name)
        if found is None or not is_rank_folder(root.parent):
            _refuse_foreign(root, world)
        root, choice = root.parent.parent, root.name
    folder = see(root, world)
    candidates = folder.candidates
    _same_folder(root, candidates, world)
    damaged = tell_what_does_not_count(folder, world, say)
    if not candidates:
        if damaged or folder.newest_half:
            raise none_is_whole(root, len(damaged) or len(folder.halves))
        _refuse_foreign(root, world, folder.begun)
        return None
    newest = candidates[-1]
    if isinstance(choice, str):
        candidates = [_named(root, candidates, choice)]
    candidate, source = newest_whole(candidates, world, say, _lacks_state, disks=folder.disks)
    state = read_json(candidate.state_path)
    assert state is not None
    taken = {path.stem.rpartition("-")[0] for path in damaged}
    is_newest = candidate == newest and candidate.name.label not in taken
    is_newest &= candidate.sequence > folder.newest_half
    return Chosen(candidate, state, source, is_newest)


def _lacks_state(candidate: Published) -> str:
    """What keeps a run from going on from whole files; empty when nothing does."""
    return state_fault(candidate.state_path, candidate.manifest)


def _named(root: Path, candidates: list[Published], choice: str) -> Published:
    parsed = parse_rank_file(Path(choice).name)
    for candidate in candidates:
        if str(candidate.name) == choice or (parsed and candidate.name == parsed[0]):
            return candidate
    names = [str(candidate.name) for candidate in candidates]
    raise UserError(
        f"resume_training = {choice!r}: there is no such checkpoint in {root}",
        rule=f"it holds {', '.join(names[-5:])}",
        nearest=did_you_mean(choice, names),
    )


def _same_folder(root: Path, candidates: Sequence[Published], world: World) -> None:
    """Every rank must see the folder that rank 0 found checkpoints in."""
    seen = world.gather(root.is_dir())
    if candidates and not all(seen):
        raise UserError(
            f"{root} cannot be found by rank {seen.index(False)}",
            rule=f"rank 0 found {len(candidates)} checkpoints there, and all ranks read it",
            advice="Put the checkpoints where every machine sees them, under one path",
        )


def _refuse_foreign(root: Path, world: World, begun: Collection[str] = ()) -> None:
    """`begun`: records of saves that were never finished on some disk."""
    kind = detect(root)
    if kind == "distributed" and root.is_dir() and is_unfinished(root, begun):
        kind = "nothing"  # the first save of a run was never finished
    if set(world.gather(kind)) != {"nothing"}:
        raise UserError(
            f"{root} holds weights, but no checkpoint of this launcher",
            rule="a resume needs the state of the run (checkpoint/manifest and checkpoint/state)",
            advice="Use run_mode finetune to start from weights alone",
        )
