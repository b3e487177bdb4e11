"""The folders of checkpoints of a run: opened, cleaned up and named before the first step.

Owns what happens to a folder at the start: files of unfinished saves are removed, the run gets a
counter that no other run there has, the model files are written, and every rank creates its folder,
so that a path that cannot be written is an error now and not at the first save. Called by all ranks
together.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from launcher.checkpoint.best import best_rule
from launcher.checkpoint.catalog import next_counter, unfinished
from launcher.checkpoint.cleanup import remove_unfinished, unpublish_partial
from launcher.checkpoint.contents import Contents
from launcher.checkpoint.cost import saves_of_earlier_runs
from launcher.checkpoint.integrated import FULL
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.savable import Savable
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.store import Store
from launcher.config.schema import CheckpointMonitorSection
from launcher.errors import UserError
from launcher.parallel.all_ranks import capture_error, raise_if_any_failed
from launcher.parallel.filesystems import NOT_OPENED, FilesystemGroups, find_filesystem_groups
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import inventory_of
from launcher.weights.offline.merge import MODEL_FOLDER

NOT_CLEANED = "files of unfinished saves could not be removed"


def open_saver(config: CheckpointMonitorSection, run: Savable, contents: Contents) -> Saver:
    """Open the folders of a run. Raises `UserError` on every rank."""
    root = Path(config.directory) if config.directory else run.output_dir
    stores = {}
    for folder in contents.folders:
        store = _open_store(config, run, root / folder, contents)
        if run.world.is_main and (line := saves_of_earlier_runs(store)):
            run.log(line)
        stores[folder] = store
    return Saver(
        stores, run.mesh, remove_redundancy=config.remove_redundancy,
        integrate=config.integrated_save,
    )  # fmt: skip


def _open_store(
    config: CheckpointMonitorSection, run: Savable, root: Path, contents: Contents
) -> Store:
    filesystems = find_filesystem_groups(root, run.world)
    if config.integrated_save and filesystems.are_several:
        raise _cannot_integrate(root, filesystems.groups[1][0])
    removed = clean_filesystems(root, filesystems, run.world, run.origin.inputs)
    if removed:
        run.log(f"{root}: removed {removed} files of a save that was never finished")
    counter = _counter(config.prefix, run, root, filesystems)
    model_folder = root / MODEL_FOLDER / SaveName(config.prefix, counter, 1, 1).label
    filesystems.on_each(run.world, NOT_OPENED, run.write_model_files, model_folder)
    rank_folder = root / f"rank_{run.world.rank}"
    created = capture_error(rank_folder.mkdir, parents=True, exist_ok=True)
    raise_if_any_failed(run.world, created, NOT_OPENED)
    return Store(
        root=root,
        prefix=config.prefix,
        counter=counter,
        keep_max=config.keep_checkpoint_max or 0,
        inputs=run.origin.inputs,
        inventory=inventory_of(contents.shapes(run, root.name)),
        keep_minutes=config.keep_checkpoint_per_n_minutes,
        filesystems=filesystems,
        file_format=config.checkpoint_format,
        best=best_rule(config),
        resumed_label=run.origin.came_from.rpartition("-")[0] if root.name == FULL else "",
    )


def _counter(prefix: str, run: Savable, root: Path, filesystems: FilesystemGroups) -> int:
    """That of the resumed run, or one that no run in the folder has."""
    if run.origin.resumed_from is not None and run.origin.resumed_from.prefix == prefix:
        return run.origin.resumed_from.counter
    return max(filesystems.on_each(run.world, NOT_OPENED, next_counter, root, prefix))


def clean_filesystems(
    root: Path, filesystems: FilesystemGroups, world: World, inputs: Collection[Path] = ()
) -> int:
    """Remove unfinished saves on all file systems. Returns how many files were removed.

    Raises `UserError` on every rank. A save that is unfinished on one file system is first
    unpublished on the others, so that a crash here leaves an unfinished save everywhere.
    """
    begun: Collection[str] = ()
    if filesystems.are_several:
        found = filesystems.on_each(world, NOT_CLEANED, unfinished, root)
        begun = sorted({record for records in found for record in records})
        filesystems.on_each(world, NOT_CLEANED, unpublish_partial, root, begun)
    removed = filesystems.on_each(world, NOT_CLEANED, remove_unfinished, root, inputs, begun)
    return sum(map(len, removed))


def _cannot_integrate(root: Path, rank: int) -> UserError:
    return UserError(
        f"integrated_save: True: rank {rank} and rank 0 do not share a file system: rank 0 cannot "
        f"read what it writes to {root}",
        rule="one rank merges the complete weights, from the files of all ranks",
        nearest="Nearest: launcher.tools.unified_safetensors, with all rank folders in one place",
        advice="Set integrated_save: False, or give a folder that all machines share",
    )
