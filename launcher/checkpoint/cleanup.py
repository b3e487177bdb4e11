"""Leftovers: what is in a folder of checkpoints from earlier runs and from crashes.

Owns which names are taken, and which files belong to a save that was never finished: those whose
save left its intent. Files that came there otherwise stay. A save on several disks was never
finished when it left its intent on one.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from launcher.checkpoint.files import TEMPORARY_SUFFIX, temporary
from launcher.checkpoint.integrated import integrated_names, remove_integrated
from launcher.checkpoint.names import SaveName, parse_rank_file
from launcher.checkpoint.published import published, unpublish
from launcher.parallel.filesystems import FilesystemGroups
from launcher.parallel.world import World
from launcher.weights.ranks.manifests import MANIFEST_FOLDER, STATE_FOLDER

NOT_CLEARED = "what is left of unfinished saves could not be cleared away"


def next_counter(root: Path, prefix: str) -> int:
    """The run counter of a new run in `root`: 0 in a folder without this prefix, else one more
    than the highest there; never one whose manifests would bear the names of another prefix."""
    names = {file.name for file in root.glob("rank*/*.safetensors")}
    parsed = [found[0] for name in names if (found := parse_rank_file(name)) is not None]
    parsed += [checkpoint.name for checkpoint in published(root)]
    counter = max((name.counter + 1 for name in parsed if name.prefix == prefix), default=0)
    labels = {name.label for name in parsed}
    labels |= {name.rpartition("-")[0] for name in integrated_names(root)}
    while SaveName(prefix, counter, 1, 1).label in labels:
        counter += 1
    return counter


def clean_filesystems(
    root: Path, filesystems: FilesystemGroups, world: World, inputs: Collection[Path] = ()
) -> int:
    """As `clean_unfinished`, on all disks. Returns how many files were removed.

    Called by all ranks together; raises `UserError` on all. What one disk has published is first
    made unfinished there, so that a crash leaves no more of a save than the next start clears away.
    """
    begun: Collection[str] = ()
    if filesystems.are_several:
        found = filesystems.on_each(world, NOT_CLEARED, unfinished, root)
        begun = sorted({record for records in found for record in records})
        filesystems.on_each(world, NOT_CLEARED, _unpublish_partial, root, begun)
    return sum(
        map(len, filesystems.on_each(world, NOT_CLEARED, remove_unfinished, root, inputs, begun))
    )


def _unpublish_partial(root: Path, begun: Collection[str]) -> None:
    """Withdraw what is published here of the saves `begun`, which are unfinished elsewhere."""
    spread = {found.name.record for found in published(root) if found.is_spread}
    unpublish(root, sorted(spread & set(begun)))


def remove_unfinished(
    root: Path, inputs: Collection[Path] = (), begun: Collection[str] = ()
) -> list[Path]:
    """Remove what saves left behind that were never finished. Returns what was removed.

    `inputs`: resolved paths that stay. `begun`: records of saves that are unfinished elsewhere.
    """
    removed = []
    for record in sorted({*_in_progress(root), *begun}):
        if not (root / MANIFEST_FOLDER / record).exists():
            removed += _files_of(root, record)
            remove_integrated(root, record.removesuffix(".json"), inputs)
        scratch = temporary(root / MANIFEST_FOLDER / record)
        removed += [scratch] if scratch.exists() else []
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def is_unfinished(root: Path, begun: Collection[str] = ()) -> bool:
    """Whether all weights in `root` belong to saves that were never finished, here or, as `begun`
    has them, elsewhere."""
    records = {*_in_progress(root), *begun}
    files = (path.name for path in root.glob("rank*/*.safetensors"))
    return all(_record_of(name) in records for name in files)


def unfinished(root: Path) -> list[str]:
    """Records of the saves that were never finished: they left their intent and no manifest."""
    return [
        record for record in _in_progress(root) if not (root / MANIFEST_FOLDER / record).exists()
    ]


def _in_progress(root: Path) -> list[str]:
    """Records (names of manifests) of the saves that left their intent."""
    intents = sorted((root / MANIFEST_FOLDER).glob(f".*.json{TEMPORARY_SUFFIX}"))
    return [path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX) for path in intents]


def _files_of(root: Path, record: str) -> list[Path]:
    """Rank and state files, finished or not, of the save with this record."""
    state = root / STATE_FOLDER / record
    found = [path for path in (state, temporary(state)) if path.exists()]
    for path in root.glob("rank_*/*.safetensors*"):
        found += [path] if _record_of(path.name) == record else []
    for path in root.glob(f"rank_*/.*.safetensors{TEMPORARY_SUFFIX}"):
        name = path.name.removeprefix(".").removesuffix(TEMPORARY_SUFFIX)
        found += [path] if _record_of(name) == record else []
    return found


def _record_of(file_name: str) -> str:
    parsed = parse_rank_file(file_name)
    return parsed[0].record if parsed else ""
