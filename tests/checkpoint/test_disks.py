"""Checkpoints without a shared file system: four ranks on two nodes, each with its own folder."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint.catalog import in_progress_marker, published
from launcher.checkpoint.commit import Commit
from launcher.checkpoint.folder import scan
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.resolve import open_weights
from launcher.checkpoint.resume import Chosen, choose
from launcher.checkpoint.run_folders import clean_filesystems
from launcher.checkpoint.store import Saved, Store
from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel import filesystems as module
from launcher.parallel.filesystems import (
    ONE_FILESYSTEM,
    FilesystemGroups,
    find_filesystem_groups,
    one_per_machine,
)
from launcher.parallel.world import World
from launcher.weights import list_checkpoints, verify
from launcher.weights.reading.load import load
from tests.checkpoint.crew import together
from tests.config.weight_files import safetensors
from tests.tools.checkpoints import held

MESH = Mesh(dp_shard=4)
WORLD = 4
TWO = FilesystemGroups(((0, 1), (2, 3)))
NAMED = {"w": torch.arange(8.0)}


class Nodes:
    """Two nodes with two ranks each, and a folder of checkpoints on the disk of each."""

    def __init__(self, folder: Path) -> None:
        self.folders = [folder / "a" / "checkpoint", folder / "b" / "checkpoint"]

    def of(self, world: World) -> Path:
        return self.folders[world.rank // 2]

    def save(
        self, step: int, *, keep: int = 5, counter: int = 0, mesh: Mesh = MESH
    ) -> list[Saved | UserError]:
        name = SaveName("CKP", counter, 1, step)

        def work(world: World) -> Saved | UserError:
            root = self.of(world)
            store = Store(
                root, "CKP", counter, keep, filesystems=find_filesystem_groups(root, world)
            )
            try:
                return store.save(name, held(NAMED, mesh, world.rank), {"global_step": step},
                                  mesh=mesh, world=world)  # fmt: skip
            except UserError as error:
                return error

        return together(WORLD, work)

    def choose(self) -> tuple[list[Chosen | None], list[str]]:
        """The choice of each rank, and the log of rank 0."""
        logged: list[str] = []

        def work(world: World) -> Chosen | None:
            log = logged.append if world.is_main else lambda text: None
            return choose(self.of(world), True, world, log)

        return together(WORLD, work), logged

    def steps(self) -> list[list[int]]:
        """The saves that each disk has published."""
        return [[found.name.step for found in published(folder)] for folder in self.folders]

    def clean(self) -> list[int]:
        return together(WORLD, lambda w: clean_filesystems(self.of(w), TWO, w))

    def left(self) -> set[str]:
        """The files on both disks, `meta.json` apart."""
        return {
            f"{folder.parent.name}: {path.relative_to(folder)}"
            for folder in self.folders for path in folder.rglob("*")
            if path.is_file() and path.name != "meta.json"
        }  # fmt: skip


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def test_ranks_of_one_machine_and_folder_see_one_disk_and_nothing_is_written(tmp_path) -> None:
    folder = tmp_path / "output" / "checkpoint"
    assert together(3, lambda w: find_filesystem_groups(folder, w)) == [ONE_FILESYSTEM] * 3
    assert not folder.parent.exists()


def test_a_token_distinguishes_disks_and_is_removed(nodes: Nodes) -> None:
    for folder in nodes.folders:
        folder.mkdir(parents=True)
        (folder / f"{module.TOKEN}left").touch()  # by a crash
    assert together(WORLD, lambda w: find_filesystem_groups(nodes.of(w), w)) == [TWO] * WORLD
    assert [list(folder.iterdir()) for folder in nodes.folders] == [[], []]


def test_machines_that_share_a_disk_see_one(tmp_path, monkeypatch) -> None:
    plain = module._place
    seen: dict[int, str] = {}

    def place(folder: Path) -> tuple[str, ...]:
        machine = seen.setdefault(threading.get_ident(), str(len(seen)))
        return (machine, *plain(folder))

    monkeypatch.setattr(module, "_place", place)
    assert together(3, lambda w: one_per_machine(tmp_path, w).are_several) == [True] * 3
    assert together(3, lambda w: find_filesystem_groups(tmp_path, w)) == [ONE_FILESYSTEM] * 3
    assert list(tmp_path.iterdir()) == []


def test_leaders_and_shares() -> None:
    worlds = [World(rank, WORLD, torch.device("cpu")) for rank in range(WORLD)]
    assert [TWO.is_leader(world) for world in worlds] == [True, False, True, False]
    assert [range(5)[TWO.share(world)] for world in worlds] == [range(0, 5, 2), range(1, 5, 2)] * 2
    assert [ONE_FILESYSTEM.is_leader(world) for world in worlds] == [True, False, False, False]
    assert [list(range(5)[ONE_FILESYSTEM.share(world)]) for world in worlds] == [
        [0, 4],
        [1],
        [2],
        [3],
    ]


def test_a_folder_that_cannot_be_made_is_the_error_of_all(nodes: Nodes) -> None:
    nodes.folders[1].parent.write_text("in the way")

    def work(world: World) -> str:
        with pytest.raises(UserError) as caught:
            find_filesystem_groups(nodes.of(world), world)
        return str(caught.value)

    (text,) = set(together(WORLD, work))
    assert "the folder of checkpoints could not be opened: rank 2: " in text


def test_each_disk_has_its_files_and_the_same_manifest(nodes: Nodes) -> None:
    for step in (1, 2):
        nodes.save(step)
    one, other = ((f / "manifest/CKP-1_2.json").read_bytes() for f in nodes.folders)
    assert one == other
    assert published(nodes.folders[0])[-1].manifest["disks"] == [[0, 1], [2, 3]]
    assert sorted(path.name for path in nodes.folders[1].glob("rank_*/*-1_2.*")) == [
        "CKP_rank_2-1_2.safetensors", "CKP_rank_3-1_2.safetensors",
    ]  # fmt: skip
    chosen, logged = nodes.choose()
    assert logged == []
    for rank, found in enumerate(chosen):
        assert found is not None
        assert (found.name.step, found.is_newest, found.state["global_step"]) == (2, True, 2)
        assert found.root == nodes.folders[rank // 2]
        assert found.source.is_spread
        assert len(found.source.elsewhere) == 2


def test_the_oldest_are_removed_from_both_disks(nodes: Nodes) -> None:
    for step in (1, 2, 3):
        nodes.save(step, keep=1)
    assert nodes.steps() == [[3], [3]]
    assert not [name for name in nodes.left() if "1_3" not in name]


def test_a_disk_with_a_copy_of_all_is_enough_for_any_layout(nodes: Nodes) -> None:
    nodes.save(1, mesh=Mesh(dp_replicate=2, dp_shard=2))
    whole = Shard((8,), Box((0,), (8,)), torch.zeros(8))

    def work(world: World) -> bool:
        source = open_weights(nodes.of(world), world, lambda text: None)
        files = {piece.file for piece in source.tensors["w"]}
        assert {file.is_relative_to(nodes.of(world)) for file in files} == {True}
        tensor = torch.zeros(8)
        load({"w": whole._replace(tensor=tensor)}, source, rank=world.rank)
        return torch.equal(tensor, NAMED["w"])

    assert together(WORLD, work) == [True] * WORLD


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: next(folder.glob(pattern)).unlink()


def flip(folder: Path) -> None:
    file = next(folder.glob("rank_*/*-1_2.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = [
    (remove("manifest/CKP-1_2.json"), "the file system of rank {leader} has no valid manifest"),
    (remove("rank_*/*-1_2.safetensors"), "is missing"),
    (remove("state/CKP-1_2.json"), "cannot be read"),
    (flip, "changed"),
]  # fmt: skip


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_damage_on_one_disk_makes_all_ranks_take_the_one_before(
    nodes: Nodes, node: int, damage, reason: str
) -> None:
    for step in (1, 2):
        nodes.save(step)
    damage(nodes.folders[node])
    chosen, logged = nodes.choose()
    assert [found and (found.name.step, found.is_newest) for found in chosen] == [(1, False)] * 4
    assert any(
        line.startswith("skipped CKP-1_2: ") and reason.format(leader=2 * node) in line
        for line in logged
    ), logged
    assert nodes.save(1, counter=1)[0].warning == ""
    chosen, _ = nodes.choose()
    assert [found and str(found.name) for found in chosen] == ["CKP_1-1_1"] * 4
    assert {found.sequence for found in published(nodes.folders[1 - node])} == {1, 2, 3}


def test_files_merged_into_one_folder_are_one_disk_again(nodes: Nodes, tmp_path) -> None:
    nodes.save(1)
    for folder in nodes.folders:
        shutil.copytree(folder, tmp_path / "shared", dirs_exist_ok=True)
    chosen = together(2, lambda w: choose(tmp_path / "shared", True, w, print))
    assert [found and found.source.is_spread for found in chosen] == [False] * 2
    for one, other in (nodes.folders, nodes.folders[::-1]):
        shutil.copytree(one, other, dirs_exist_ok=True)
    every, _ = nodes.choose()
    assert [found and found.source.is_spread for found in every] == [False] * 4


def loaded(world: World, source: Any, rank: int) -> torch.Tensor:
    tensor = torch.zeros(2)
    load({"w": Shard((8,), Box((2 * rank,), (2,)), tensor)}, source, rank=world.rank)
    return tensor


def test_ranks_read_local_files_and_report_others(nodes: Nodes) -> None:
    nodes.save(1)

    def work(world: World) -> tuple[torch.Tensor, str]:
        source = open_weights(nodes.of(world), world, lambda text: None)
        own = loaded(world, source, world.rank)
        neighbour = loaded(world, source, world.rank ^ 1)
        assert neighbour.tolist() == [2 * (world.rank ^ 1), 2 * (world.rank ^ 1) + 1]
        with pytest.raises(UserError) as caught:
            loaded(world, source, world.rank ^ 2)
        return own, str(caught.value)

    found = together(WORLD, work)
    assert torch.equal(torch.cat([own for own, _ in found]), NAMED["w"])
    assert found[1][1] == (
        f"{nodes.folders[0]}: rank 1 needs rank_3/CKP_rank_3-1_1.safetensors, which are not "
        "visible to it: without a shared file system a rank reads the files of its own machine, so "
        "layout and machine of each rank must be those of the save. Nearest: 4 ranks (dp_shard 4), "
        "each rank where it was. Put the folders of checkpoints together on a disk that all "
        "machines share, or copy the rank folders so that each machine has them all."
    )


def test_tools_check_the_files_of_one_disk(nodes: Nodes) -> None:
    nodes.save(1)
    (row,) = list_checkpoints(nodes.folders[1])
    assert row.state == "complete, but 2 of its files lie on other disks (ranks 0, 1)"
    verdict = verify(nodes.folders[1])
    assert (verdict.is_complete, verdict.files) == (True, 2)
    assert "2 of its files lie on other disks (ranks 0, 1): not checked" in verdict.remarks[0]
    (nodes.folders[1] / "rank_3/CKP_rank_3-1_1.safetensors").unlink()
    (row,) = list_checkpoints(nodes.folders[1])
    assert "damaged: rank 3: " in row.state
    assert not verify(nodes.folders[1]).is_complete


def test_a_rank_file_on_one_disk_selects_its_save(nodes: Nodes) -> None:
    for step in (1, 2):
        nodes.save(step)

    def work(world: World) -> list[bool]:
        file = nodes.of(world) / "rank_0" / "CKP_rank_0-1_1.safetensors"
        source = open_weights(file, world, lambda text: None)
        chosen = choose(file, True, world, lambda text: None)
        assert chosen is not None
        return [len(source.headers) == WORLD, chosen.name.step == 1, source.is_spread]

    assert together(WORLD, work) == [[True] * 3] * WORLD


@pytest.mark.parametrize("node", [0, 1])
def test_unreadable_files_on_one_disk_are_the_error_of_all(nodes: Nodes, node: int) -> None:
    nodes.save(1)
    for file in nodes.folders[node].glob("rank_*/*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))

    def work(world: World) -> str:
        file = nodes.of(world) / "rank_0" / "CKP_rank_0-1_1.safetensors"
        with pytest.raises(UserError) as caught:
            open_weights(file, world, lambda text: None)
        return str(caught.value)

    logged = together(WORLD, work)
    assert len(set(logged)) == 1
    assert f"rank_{2 * node}/CKP_rank_{2 * node}-1_1.safetensors" in logged[0]


def test_an_empty_folder_on_one_disk_is_the_error_of_all(tmp_path) -> None:
    nodes = Nodes(tmp_path)
    for rank in range(WORLD):
        (nodes.folders[rank // 2] / f"rank_{rank}").mkdir(parents=True)
    for rank in (0, 1):
        file = nodes.folders[0] / f"rank_{rank}" / f"CKP_rank_{rank}-1_1.safetensors"
        safetensors(file)

    def work(world: World) -> str:
        with pytest.raises(UserError) as caught:
            open_weights(nodes.of(world), world, lambda text: None)
        return str(caught.value)

    assert len(set(together(WORLD, work))) == 1


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("moment", ["_prepare", "_write", "_manifest_inputs", "_publish"])
def test_a_save_that_fails_on_one_disk_is_removed_from_all(
    nodes: Nodes, monkeypatch, moment: str, node: int
) -> None:
    nodes.save(1, keep=1)
    before = nodes.left()
    plain = getattr(Commit, moment)

    def full(commit: Commit, *arguments: Any) -> Any:
        if commit.root == nodes.folders[node]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")
        return plain(commit, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Commit, moment, full)
        (text,) = {str(outcome) for outcome in nodes.save(2, keep=1)}
    assert f"rank {2 * node}: No space left on device" in text
    assert nodes.left() == before
    nodes.save(2, keep=1)
    assert nodes.steps() == [[2], [2]]


def test_a_save_published_on_one_disk_is_not_overwritten_nor_lost(nodes: Nodes) -> None:
    nodes.save(1)
    before = nodes.left() - {"b: manifest/CKP-1_1.json"}
    (nodes.folders[1] / "manifest/CKP-1_1.json").unlink()
    (text,) = {str(outcome) for outcome in nodes.save(1)}
    assert "rank 0: it is published" in text
    assert nodes.left() == before


@pytest.mark.parametrize("node", [0, 1])
def test_a_crash_between_two_manifests_is_cleaned_up_on_both_disks(nodes: Nodes, node: int) -> None:
    name = SaveName("CKP", 0, 1, 2)
    nodes.save(1)
    before = nodes.left()
    nodes.save(2)
    (nodes.folders[node] / "manifest" / name.record).rename(
        in_progress_marker(nodes.folders[node], name)
    )
    chosen, logged = nodes.choose()
    assert [found and (found.name.step, found.is_newest) for found in chosen] == [(1, True)] * 4
    leader = 2 * node
    assert logged == [f"skipped CKP-1_2: the file system of rank {leader} has no valid manifest"]
    assert nodes.clean() == [8] * WORLD  # on each disk two files of ranks, a state, a marker
    assert nodes.left() == before
    assert nodes.clean() == [0] * WORLD


def test_a_crash_of_the_first_save_is_a_fresh_start(nodes: Nodes) -> None:
    name = nodes.save(1) and SaveName("CKP", 0, 1, 1)
    (nodes.folders[1] / "manifest" / name.record).rename(in_progress_marker(nodes.folders[1], name))
    chosen, logged = nodes.choose()
    assert chosen == [None] * WORLD
    assert len(logged) == 1


def test_leftovers_on_one_disk_are_cleaned_by_its_leader(nodes: Nodes) -> None:
    name = SaveName("CKP", 0, 1, 2)
    nodes.save(1)
    before = nodes.left()
    nodes.save(2)
    for folder, record in zip(nodes.folders, ("manifest", "state"), strict=True):
        for path in (folder / record, *folder.glob("rank_*")):
            for file in path.glob("*1_2.*"):
                file.unlink()
    (nodes.folders[1] / "manifest" / name.record).rename(in_progress_marker(nodes.folders[1], name))
    (nodes.folders[1] / "rank_2/.CKP_rank_2-1_2.safetensors.tmp").write_bytes(b"half")
    (nodes.folders[0] / "state" / name.record).unlink()
    assert nodes.clean() == [2] * WORLD
    assert nodes.left() == before


def test_saves_of_a_shared_disk_are_found_by_rank_0(tmp_path) -> None:
    """Manifests without several disks are those that rank 0 finds."""
    nodes = Nodes(tmp_path)
    for folder in nodes.folders:
        Store(folder, "CKP", 0, 5).save(
            SaveName("CKP", 0, 1, 1), held(NAMED, Mesh(), 0), {"global_step": 1},
            mesh=Mesh(), world=World(0, 1, torch.device("cpu")),
        )  # fmt: skip
    (nodes.folders[1] / "manifest/CKP-1_1.json").unlink()
    seen = together(WORLD, lambda w: scan(nodes.of(w), w))
    assert [(len(found.candidates), list(found.partial_saves)) for found in seen] == [
        (1, [])
    ] * WORLD
    chosen, _ = nodes.choose()
    assert [found and found.name.step for found in chosen] == [1] * WORLD
