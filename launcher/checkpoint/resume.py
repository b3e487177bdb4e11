"""Which checkpoint a path means, and what a resume brings back.

Owns the choice: the newest published checkpoint whose files are whole, by sequence number, never by
time. A damaged one is named and passed over. All ranks check, one decides, all hear the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.files import read_json
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.store import Published, is_unfinished, published
from launcher.errors import UserError, did_you_mean
from launcher.parallel.world import World
from launcher.weights.distributed import open_rank_files
from launcher.weights.source import Source, detect, open_complete
from launcher.weights.verify import file_faults, verified


@dataclass(frozen=True)
class Chosen:
    """The checkpoint a resume goes on from."""

    published: Published
    state: dict[str, Any]
    source: Source
    is_newest: bool

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
    if root.is_file():
        found = parse_rank_file(root.name)
        if found is None or not root.parent.name.startswith("rank_"):
            _refuse_foreign(root)
        root, choice = root.parent.parent, root.name
    candidates = world.from_main(published(root)) if root.is_dir() else []
    if not candidates:
        _refuse_foreign(root)
        return None
    newest = candidates[-1]
    if isinstance(choice, str):
        candidates = [_named(root, candidates, choice)]
    for candidate in reversed(candidates):
        faults = _faults(candidate, world)
        state = read_json(candidate.state_path)
        if state is None:
            faults.append(f"{candidate.state_path} cannot be read")
        if not faults:
            assert state is not None
            source = open_rank_files(root, candidate.files)
            return Chosen(candidate, state, source, candidate == newest)
        say(f"passed over {candidate.name}: {'; '.join(faults[:3])}")
    raise UserError(
        f"no checkpoint in {root} is whole",
        rule=f"{len(candidates)} were tried, see above",
        advice="Give another folder as load_checkpoint, or start anew without resume_training",
    )


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


def _faults(candidate: Published, world: World) -> list[str]:
    """What is wrong with the files of a checkpoint; each rank reads its share of them."""
    mine = []
    files = list(zip(candidate.files, candidate.manifest["files"], strict=True))
    for path, record in files[world.rank :: world.size]:
        if not path.is_file():
            mine.append(f"{path} is missing")
        elif path.stat().st_size != record["bytes"]:
            mine.append(f"{path} has {path.stat().st_size} bytes instead of {record['bytes']}")
        else:
            mine += file_faults(path, header_digest=record.get("header_xxh3_64"))
    return [fault for faults in world.gather(mine) for fault in faults]


def _refuse_foreign(root: Path) -> None:
    kind = detect(root)
    if kind == "distributed" and root.is_dir() and is_unfinished(root):
        return  # the first save of a run was never finished
    if kind != "nothing":
        raise UserError(
            f"{root} holds weights, but no checkpoint of this launcher",
            rule="a resume needs the state of the run (checkpoint/manifest and checkpoint/state)",
            advice="Use run_mode finetune to start from weights alone",
        )


def open_weights(path: Path, world: World, say: Callable[[str], None]) -> Source:
    """The weights at `path`, whatever form they have: complete, one file, or rank files."""
    kind = detect(path)
    if kind == "nothing":
        raise UserError(f"{path} holds no weights", rule="*.safetensors or rank_*/ is expected")
    if path.is_dir() and path.name.startswith("rank_"):
        raise UserError(f"{path} is the folder of one rank", rule="a checkpoint is all of them",
                        nearest=f"did you mean `{path.parent}`?")  # fmt: skip
    if kind != "distributed":
        return open_complete(path)
    if path.is_file():
        return _open_save_of(path)
    chosen = choose(path, True, world, say)
    if chosen is None:
        raise UserError(
            f"{path} holds rank folders, but no published checkpoint",
            rule="rank files of other programs need a strategy file, which is not built yet",
            advice="Give complete weights",
        )
    say(f"{path}: checkpoint {chosen.name}")
    return chosen.source


def _open_save_of(file: Path) -> Source:
    """The save that a single rank file belongs to."""
    parsed = parse_rank_file(file.name)
    if parsed is None:
        return verified(open_rank_files(file, [file]))
    root = file.parent.parent
    siblings = [
        sibling
        for folder in root.glob("rank_*")
        if (sibling := folder / parsed[0].rank_file(int(folder.name[5:]))).is_file()
    ]
    return verified(open_rank_files(root, siblings))
