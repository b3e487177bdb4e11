"""One save in all its folders: what fails in one, what is tried again, what is removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.checkpoint import saver as module
from launcher.checkpoint.catalog import in_progress_marker, next_counter, published
from launcher.checkpoint.cleanup import remove_unfinished
from launcher.checkpoint.commit import Commit
from launcher.checkpoint.contents import NETWORK
from launcher.checkpoint.integrated import FULL, INTEGRATED_FOLDER, folder_of
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.saver import Saver, SaveRequest, SaveResult
from launcher.checkpoint.store import Store
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import inventory_of
from tests.checkpoint.crew import ALONE, together
from tests.tools.checkpoints import held

MESH = Mesh(dp_shard=2)
NAMED = {"w": torch.arange(8.0), "adam_m.w": torch.ones(8)}
FOLDERS = {FULL: ("w", "adam_m.w"), NETWORK: ("w",)}


def saver(root: Path, *, keep: int = 2, inputs: frozenset[Path] = frozenset()) -> Saver:
    stores = {
        folder: Store(root / folder, "CKP", 0, keep, inputs, inventory_of(
            {name: tuple(NAMED[name].shape) for name in names}))
        for folder, names in FOLDERS.items()
    }  # fmt: skip
    return Saver(stores, MESH, remove_redundancy=False, integrate=True)


def request(world: World, step: int) -> SaveRequest:
    contents = {
        folder: held({name: NAMED[name] for name in names}, MESH, world.rank)
        for folder, names in FOLDERS.items()
    }
    return SaveRequest(step, 1, step, contents, {"global_step": step}, 0.0)


class Pair:
    """Two ranks with a saver each."""

    def __init__(self, root: Path, **options) -> None:
        self.savers = [saver(root, **options) for _ in range(2)]

    def write(self, step: int) -> list[SaveResult]:
        return together(2, lambda w: self.savers[w.rank].write(request(w, step), w))


def steps(root: Path, folder: str) -> list[int]:
    return [found.name.step for found in published(root / folder)]


def merged(root: Path) -> list[str]:
    return sorted(path.name for path in (root / INTEGRATED_FOLDER).iterdir())


def test_saves_are_written_to_and_removed_from_all_folders(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    for step in (1, 2, 3):
        assert [done.error for done in pair.write(step)] == [None, None]
    assert steps(tmp_path, FULL) == steps(tmp_path, NETWORK) == [2, 3]
    assert merged(tmp_path) == ["CKP-1_2", "CKP-1_3"]
    (file,) = (tmp_path / INTEGRATED_FOLDER / "CKP-1_3").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == {"w"}
    assert torch.equal(found["w"], NAMED["w"])


@pytest.mark.parametrize(
    "error", [UserError("no room"), OSError(28, "no room"), ValueError("no room")]
)
def test_weights_that_cannot_be_merged_are_the_error_of_all_ranks(
    tmp_path: Path, monkeypatch, capsys, error: Exception
) -> None:
    pair = Pair(tmp_path)
    plain = module.write_integrated

    def fail(*_: object) -> Path:
        raise error

    monkeypatch.setattr(module, "write_integrated", fail)
    for done in pair.write(1):
        assert "the complete weights could not be written: " in str(done.error)
        assert "no room" in str(done.error)
        assert done.failed_in == INTEGRATED_FOLDER
        assert done.saved_in == (FULL, NETWORK)
    assert steps(tmp_path, FULL) == [1]
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, ValueError)
    monkeypatch.setattr(module, "write_integrated", plain)
    assert [done.error for done in pair.write(1)] == [None, None], "only what is missing"
    assert merged(tmp_path) == ["CKP-1_1"]


def test_only_the_folder_that_failed_is_written_again(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    (tmp_path / NETWORK).write_text("not a folder")
    assert {(done.failed_in, done.saved_in) for done in pair.write(1)} == {(NETWORK, (FULL,))}
    (tmp_path / NETWORK).unlink()
    assert [done.error for done in pair.write(1)] == [None, None]
    assert steps(tmp_path, FULL) == steps(tmp_path, NETWORK) == [1]


def test_merged_weights_that_a_run_was_started_from_stay(tmp_path: Path) -> None:
    Pair(tmp_path).write(1)
    source = (tmp_path / INTEGRATED_FOLDER / "CKP-1_1").resolve()
    pair = Pair(tmp_path, keep=1, inputs=frozenset({source / "model.safetensors"}))
    for step in (2, 3):
        pair.write(step)
    assert merged(tmp_path) == ["CKP-1_1", "CKP-1_3"]
    assert next_counter(tmp_path / FULL, "CKP") == 1
    for path in (tmp_path / FULL).glob("*/*"):
        path.unlink()
    assert next_counter(tmp_path / FULL, "CKP") == 1, "no name of merged weights is used twice"


def test_removed_saves_of_other_folders_leave_merged_weights(tmp_path: Path) -> None:
    """Their names may be equal to those of other saves: each folder has its own counter."""
    Pair(tmp_path).write(1)
    for step in (2, 3):
        store = Store(tmp_path / NETWORK, "CKP", 0, 1)
        name, shards = SaveName("CKP", 0, 1, step), held({"w": NAMED["w"]}, Mesh(), 0)
        store.save(name, shards, {"global_step": step}, mesh=Mesh(), world=ALONE)
    assert steps(tmp_path, NETWORK) == [3]
    assert merged(tmp_path) == ["CKP-1_1"]


def test_an_interrupted_merge_is_repeated(tmp_path: Path) -> None:
    Pair(tmp_path).write(1)
    folder = folder_of(tmp_path / FULL, "CKP-1_1")
    folder.rename(folder.with_name(f".{folder.name}.tmp"))
    newest = published(tmp_path / FULL)[-1].name
    savers = Pair(tmp_path).savers
    together(2, lambda world: savers[world.rank].complete(newest, world))
    assert [path.name for path in folder.parent.iterdir()] == ["CKP-1_1"]


def test_merged_weights_are_removed_with_an_unpublished_save(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.write(1)
    pair.write(2)
    root, name = tmp_path / FULL, SaveName("CKP", 0, 1, 1)
    (root / "manifest" / name.record).rename(in_progress_marker(root, name))  # killed here
    remove_unfinished(root)
    assert merged(tmp_path) == ["CKP-1_2"]


def test_a_save_that_another_run_removed_is_not_published(tmp_path: Path, monkeypatch) -> None:
    store = Store(tmp_path, "CKP", 0, 5)
    plain = Commit._write

    def write_and_lose(self: Commit, shards: Mapping[str, Shard]) -> object:
        written = plain(self, shards)
        remove_unfinished(tmp_path)
        return written

    monkeypatch.setattr(Commit, "_write", write_and_lose)
    name, shards = SaveName("CKP", 0, 1, 1), held({"w": torch.ones(4)}, Mesh(), 0)
    with pytest.raises(UserError, match="another run in this folder removed this save"):
        store.save(name, shards, {"global_step": 1}, mesh=Mesh(), world=ALONE)
    assert published(tmp_path) == []
