"""Damage: whatever happened to the files of the newest save, a resume detects it, logs it, and uses
replicas or the save before."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launcher.checkpoint.catalog import published
from launcher.checkpoint.names import SaveName
from launcher.checkpoint.resume import choose
from launcher.checkpoint.store import Store
from launcher.errors import UserError
from launcher.layout.layout import Layout, ShardSpec
from launcher.layout.mesh import Mesh
from launcher.parallel import world as worlds
from launcher.parallel.world import World
from launcher.weights.formats.rank_metadata import inventory_of
from tests.ranks import run_ranks
from tests.weights.worlds import shards

ALONE = World(0, 1, torch.device("cpu"))
FLIPS = 200
SHAPES = {"a": (64, 48), "b": (8, 2048), "c": (5,)}
OLD, NEW = 5, 10


def write(root: str, mesh: Mesh, value: float = 0.0) -> None:
    """A rank's part of two saves; `c` is replicated on all ranks."""
    world = worlds.start(force_cpu=True)
    layout = Layout(
        SHAPES, mesh, {"a": ShardSpec(0), "b": ShardSpec(1), "c": ShardSpec(sharded=False)}
    )
    store = Store(Path(root), "CKP", 0, 0, inventory=inventory_of(SHAPES))
    for step in (OLD, NEW):
        values = {name: torch.full(shape, value + step) for name, shape in SHAPES.items()}
        held = shards(layout, world.rank, values)
        store.save(SaveName("CKP", 0, 1, step), held, {"global_step": step}, mesh=mesh, world=world)
    worlds.stop()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[int, Path]:
    """Number of ranks to a folder with the saves of two steps; do not write here."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 4)}
    for ranks, folder in folders.items():
        run_ranks(ranks, write, str(folder), Mesh(tp=ranks))
    return folders


def chosen(root: Path) -> tuple[int, str]:
    """The step that is resumed, and the log."""
    logged: list[str] = []
    found = choose(root, True, ALONE, logged.append)
    assert found is not None
    return int(found.state["global_step"]), "\n".join(logged)


def files_of(root: Path) -> list[Path]:
    """Every file of the newest save."""
    (_, newest) = published(root)
    return [*newest.files, newest.state_path, newest.manifest_path]


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_flipped_bit_anywhere(saved, tmp_path: Path, ranks: int) -> None:
    """Every bit of a file is equally likely."""
    root = shutil.copytree(saved[ranks], tmp_path / "root")
    assert chosen(root)[0] == NEW
    chance = random.Random(ranks)
    files = files_of(root)
    for _ in range(FLIPS // 2):
        file = chance.choice(files)
        content = bytearray(file.read_bytes())
        position, bit = chance.randrange(len(content)), chance.randrange(8)
        content[position] ^= 1 << bit
        file.write_bytes(content)
        step, logged = chosen(root)
        content[position] ^= 1 << bit
        file.write_bytes(content)
        assert step == OLD, (file, position, bit)
        assert file.name in logged, (logged, file, position, bit)
    assert chosen(root)[0] == NEW


def cut_to(part: float) -> Callable[[Path], None]:
    def cut(file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * part)])

    return cut


def a_folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


def of_the_other_step(file: Path) -> None:
    other = file.with_name(file.name.replace(f"_{NEW}", f"_{OLD}"))
    file.write_bytes(other.read_bytes())


DAMAGE = {
    "empty": cut_to(0), "half": cut_to(0.5), "all but a byte": cut_to(0.9999), "gone": Path.unlink,
    "a folder": a_folder_in_its_place, "of the other step": of_the_other_step,
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("role", ["rank_0", "rank_3", "state", "manifest"])
def test_damaged_files(saved, tmp_path: Path, role: str, damage: str) -> None:
    root = shutil.copytree(saved[4], tmp_path / "root")
    (file,) = (file for file in files_of(root) if file.parent.name == role)
    DAMAGE[damage](file)
    step, logged = chosen(root)
    assert step == OLD
    if (role, damage) != ("manifest", "gone"):  # a save without one was never finished
        assert file.name in logged


def test_a_rank_folder_that_is_gone(saved, tmp_path: Path) -> None:
    """It had the file of the older save too, so that no save is valid; both are logged."""
    root = shutil.copytree(saved[4], tmp_path / "root")
    shutil.rmtree(root / "rank_2")
    logged: list[str] = []
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        choose(root, True, ALONE, logged.append)
    for step in (OLD, NEW):
        assert f"CKP_rank_2-1_{step}.safetensors is missing" in "\n".join(logged)


def test_replicas_replace_a_lost_rank(tmp_path: Path) -> None:
    root = tmp_path / "copies"
    run_ranks(4, write, str(root), Mesh(dp_replicate=2, tp=2))
    shutil.rmtree(root / "rank_2")
    step, logged = chosen(root)
    assert step == NEW
    assert "rank_2" in logged


def test_files_of_two_runs_mixed(saved, tmp_path: Path) -> None:
    """Same names, sizes and layout, other values: the checksum of the header differs."""
    root = shutil.copytree(saved[4], tmp_path / "root")
    other = tmp_path / "other"
    run_ranks(4, write, str(other), Mesh(tp=4), 1.0)
    name = f"rank_1/CKP_rank_1-1_{NEW}.safetensors"
    assert (root / name).stat().st_size == (other / name).stat().st_size
    shutil.copy(other / name, root / name)
    step, logged = chosen(root)
    assert step == OLD
    assert f"CKP_rank_1-1_{NEW}.safetensors: its header changed" in logged
