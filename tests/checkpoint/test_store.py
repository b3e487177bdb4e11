"""The folder of checkpoints: names, publication, retention, crashes, resume."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.checkpoint.catalog import Published, in_progress_marker, next_counter, published
from launcher.checkpoint.cleanup import remove_unfinished
from launcher.checkpoint.commit import Commit
from launcher.checkpoint.names import (
    SaveName,
    epoch_and_step_in_name,
    global_step_of_name,
    parse_rank_file,
)
from launcher.checkpoint.resolve import open_weights
from launcher.checkpoint.resume import choose
from launcher.checkpoint.retention import superseded
from launcher.checkpoint.store import Store
from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.world import World
from tests.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))


def shards(value: float = 1.0) -> dict[str, Shard]:
    tensor = torch.full((4, 3), float(value))
    return {"w": Shard((4, 3), full_box((4, 3)), tensor)}


def save(
    root: Path, step: int, *, prefix: str = "CKP", counter: int = 0, keep: int = 5
) -> SaveName:
    name = SaveName(prefix, counter, 1, step)
    store = Store(root, prefix, counter, keep)
    store.save(name, shards(step), {"global_step": step}, mesh=Mesh(), world=ALONE)
    return name


NAMES = [
    ("CKP_rank_0-1_10", ("CKP", 0, 1, 10, 0)),
    ("CKP_rank_12_3-2_10.safetensors", ("CKP", 3, 2, 10, 12)),
    ("llama_3_rank_1-10_2.safetensors", ("llama_3", 0, 10, 2, 1)),
    ("my-model-8b_rank_0_1-1_1", ("my-model-8b", 1, 1, 1, 0)),
    ("CKP-1_10.safetensors", None),
    ("CKP_rank_x-1_10.safetensors", None),
    ("CKP_rank_0-1_10.ckpt", ("CKP", 0, 1, 10, 0)),
    ("CKP_rank_0-1_10.pt", None),
]


@pytest.mark.parametrize(("text", "expected"), NAMES)
def test_names_are_read_as_they_are_written(text: str, expected) -> None:
    found = parse_rank_file(text)
    if expected is None:
        assert found is None
        return
    prefix, counter, epoch, step, rank = expected
    assert found == (SaveName(prefix, counter, epoch, step), rank)
    assert found[0].format == ("ckpt" if text.endswith(".ckpt") else "safetensors")
    assert found[0].rank_file(rank).removesuffix(".safetensors") == text.removesuffix(
        ".safetensors"
    )


@pytest.mark.parametrize(
    ("global_step", "sink_size", "expected"),
    [(1, 1, (1, 1)), (10, 1, (1, 10)), (11, 1, (2, 1)), (20, 2, (10, 2)), (21, 2, (11, 2))],
)
def test_epoch_and_step_of_a_name(global_step: int, sink_size: int, expected) -> None:
    assert epoch_and_step_in_name(global_step, 10, sink_size) == expected
    rounded = -(-global_step // sink_size) * sink_size  # a partial last sink is named alike
    assert global_step_of_name(*expected, 10, sink_size) == rounded


def test_a_save_writes_the_tree_of_the_contract(tmp_path) -> None:
    save(tmp_path, 10)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "manifest/CKP-1_10.json", "rank_0/CKP_rank_0-1_10.safetensors", "rank_0/meta.json",
        "state/CKP-1_10.json",
    ]  # fmt: skip
    meta = json.loads((tmp_path / "rank_0/meta.json").read_text())
    assert meta == {
        "last_epoch": 1, "last_step": 10, "last_ckpt_file": "CKP_rank_0-1_10.safetensors",
    }  # fmt: skip
    manifest = json.loads((tmp_path / "manifest/CKP-1_10.json").read_text())
    assert manifest["files"][0]["bytes"] == (tmp_path / manifest["files"][0]["file"]).stat().st_size


def test_newest_is_the_highest_sequence_number_whatever_the_times(tmp_path) -> None:
    for step in (10, 30, 20):
        save(tmp_path, step)
    os.utime(tmp_path / "manifest/CKP-1_10.json", (2e9, 2e9))
    assert [c.name.step for c in published(tmp_path)] == [10, 30, 20]
    chosen = choose(tmp_path, True, ALONE, print)
    assert chosen is not None
    assert (chosen.name.step, chosen.is_newest) == (20, True)


@pytest.mark.parametrize("meta", ["absent", "older", "no json"])
def test_meta_json_does_not_choose_the_save(tmp_path, meta: str) -> None:
    save(tmp_path, 10)
    path = tmp_path / "rank_0/meta.json"
    older = path.read_text()
    save(tmp_path, 20)
    if meta == "absent":
        path.unlink()
    else:
        path.write_text(older if meta == "older" else "{")
    chosen = choose(tmp_path, True, ALONE, print)
    assert chosen is not None
    assert chosen.name.step == 20


@pytest.mark.parametrize("minutes", [0, 10])
def test_retention_leaves_the_saves_of_other_runs(tmp_path, minutes: int) -> None:
    """By number and by time; the third run resumes the second one."""
    for step in (1, 2):
        save(tmp_path, step, keep=3)
    later = [Store(tmp_path, "CKP", 1, 0 if minutes else 1, keep_minutes=minutes),
             Store(tmp_path, "CKP", 2, 0 if minutes else 2, keep_minutes=minutes,
                   resumed_label="CKP_1")]  # fmt: skip
    for store in later:
        for step in (3, 4, 5):
            name = SaveName("CKP", store.counter, 1, step)
            store.save(name, shards(), {"global_step": step}, mesh=Mesh(), world=ALONE)
        if store is later[0]:
            assert [c.name.step for c in published(tmp_path)][:3] == [1, 2, 3 if minutes else 5]
    save(tmp_path, 9, prefix="other", keep=1)
    left = [str(c.name) for c in published(tmp_path)]
    newest = ["CKP_1-1_3", "CKP_2-1_5"] if minutes else ["CKP_2-1_4", "CKP_2-1_5"]
    assert left == ["CKP-1_1", "CKP-1_2", *newest, "other-1_9"]
    files = {p.name for p in (tmp_path / "rank_0").glob("*.safetensors")}
    assert files == {c.files[0].name for c in published(tmp_path)}


def test_keep_zero_keeps_all(tmp_path) -> None:
    for step in range(1, 8):
        save(tmp_path, step, keep=0)
    assert len(published(tmp_path)) == 7


def test_a_new_run_takes_the_next_counter(tmp_path) -> None:
    assert next_counter(tmp_path, "CKP") == 0
    save(tmp_path, 1)
    assert next_counter(tmp_path, "CKP") == 1
    assert next_counter(tmp_path, "other") == 0
    save(tmp_path, 1, counter=4)
    assert next_counter(tmp_path, "CKP") == 5


def crash_while_saving(root: Path, step: int, *, prefix: str = "CKP") -> SaveName:
    """The files after a process is killed between rank file and manifest."""
    name = save(root, step, prefix=prefix)
    (root / "manifest" / name.record).rename(in_progress_marker(root, name))
    return name


def test_files_of_a_crash_are_removed_and_other_files_stay(tmp_path) -> None:
    save(tmp_path, 10)
    crash_while_saving(tmp_path, 20)
    folder = tmp_path / "rank_0"
    (folder / ".CKP_rank_0-1_20.safetensors.tmp").write_bytes(b"half")
    copied = folder / "CKP_rank_0-1_40.safetensors"  # put here by the user, without a manifest
    copied.write_bytes((folder / "CKP_rank_0-1_10.safetensors").read_bytes())
    (folder / "notes.txt").write_text("mine")
    removed = {path.name for path in remove_unfinished(tmp_path)}
    assert removed == {
        ".CKP-1_20.json.tmp", ".CKP_rank_0-1_20.safetensors.tmp", "CKP_rank_0-1_20.safetensors",
        "CKP-1_20.json",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == {
        "CKP_rank_0-1_10.safetensors", copied.name, "notes.txt", "meta.json",
    }  # fmt: skip
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["CKP-1_10.json"]
    assert remove_unfinished(tmp_path) == []


def test_a_first_save_that_was_never_finished_is_a_fresh_start(tmp_path) -> None:
    (tmp_path / "rank_0").mkdir()
    assert choose(tmp_path, True, ALONE, print) is None
    crash_while_saving(tmp_path, 20)
    assert choose(tmp_path, True, ALONE, print) is None


def test_a_published_name_is_never_written_again(tmp_path) -> None:
    before = save(tmp_path, 10)
    content = (tmp_path / "rank_0" / before.rank_file(0)).read_bytes()
    with pytest.raises(UserError, match="it is published"):
        save(tmp_path, 10)
    assert (tmp_path / "rank_0" / before.rank_file(0)).read_bytes() == content
    assert [c.name for c in published(tmp_path)] == [before]


def test_what_a_run_was_started_from_is_never_deleted(tmp_path) -> None:
    start = save(tmp_path, 1)
    inputs = frozenset([(tmp_path / "rank_0" / start.rank_file(0)).resolve()])
    store = Store(tmp_path, "CKP", 1, 1, inputs)
    for step in (1, 2, 3):
        name = SaveName("CKP", 1, 1, step)
        store.save(name, shards(), {"global_step": step}, mesh=Mesh(), world=ALONE)
    assert [(c.name.counter, c.name.step) for c in published(tmp_path)] == [(0, 1), (1, 3)]


def test_prefixes_that_look_like_counters_do_not_share_manifests(tmp_path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1, counter=next_counter(tmp_path, "CKP"))
    assert next_counter(tmp_path, "CKP_1") == 1
    save(tmp_path, 1, prefix="CKP_1", counter=1)
    assert len(published(tmp_path)) == 3


@pytest.mark.parametrize(
    "damage",
    [
        *("flip", "header", "cut", "remove", "no state"),
        *("manifest cut", "manifest of another", "manifest lies"),
    ],
)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage: str) -> None:
    save(tmp_path, 10)
    name = save(tmp_path, 20)
    file = tmp_path / "rank_0" / name.rank_file(0)
    manifest = tmp_path / "manifest" / name.record
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "header":
        file.write_bytes(content.replace(b'"F32"', b'"I32"'))
    elif damage == "cut":
        file.write_bytes(content[:-4])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "manifest of another":
        changed = json.loads(manifest.read_text())
        changed["save"]["prefix"] = "../../elsewhere"
        manifest.write_text(json.dumps(changed))
    elif damage == "no state":
        (tmp_path / "state" / name.record).unlink()
    else:
        manifest.write_text(json.dumps({"sequence": "x", "files": 3, "save": []}))
    logged: list[str] = []
    chosen = choose(tmp_path, True, ALONE, logged.append)
    assert chosen is not None
    assert chosen.name.step == 10
    if not damage.startswith("manifest"):
        assert "skipped CKP-1_20" in logged[0]


def test_without_a_valid_save_there_is_an_error(tmp_path) -> None:
    name = save(tmp_path, 10)
    (tmp_path / "rank_0" / name.rank_file(0)).unlink()
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used"):
        choose(tmp_path, True, ALONE, print)


def test_empty_folders_and_damaged_files(tmp_path) -> None:
    assert choose(tmp_path / "absent", True, ALONE, print) is None
    assert choose(tmp_path, True, ALONE, print) is None
    (tmp_path / "rank_0").mkdir()
    (tmp_path / "rank_0" / "x.safetensors").write_bytes(b"?")
    with pytest.raises(UserError, match=r"(?s)is complete.*x.safetensors is not a valid"):
        choose(tmp_path, True, ALONE, print)
    with pytest.raises(UserError, match=r"x.safetensors is not a valid safetensors file"):
        open_weights(tmp_path, ALONE, print)


@pytest.mark.parametrize("place", ["", "model.safetensors"])
def test_complete_weights_cannot_be_resumed(tmp_path, place: str) -> None:
    save_file({"w": torch.ones(4, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        choose(tmp_path / place, True, ALONE, print)
    logged = str(caught.value)
    assert f"{tmp_path / place} has weights, but no checkpoint to resume from" in logged
    assert "Use run_mode finetune to start from weights alone" in logged


def test_a_rank_file_selects_its_save(tmp_path) -> None:
    name = save(tmp_path, 10)
    source = open_weights(tmp_path / "rank_0" / name.rank_file(0), ALONE, print)
    assert (source.kind, set(source.tensors)) == ("distributed", {"w"})
    chosen = choose(tmp_path / "rank_0" / name.rank_file(0), True, ALONE, print)
    assert chosen is not None
    assert chosen.name == name


@pytest.mark.parametrize("moment", ["_prepare", "_write", "_publish"])
def test_the_only_checkpoint_survives_a_save_that_fails(tmp_path, monkeypatch, moment: str) -> None:
    """A full disk in each phase of a save; one checkpoint is kept."""
    save(tmp_path, 10, keep=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "disk")

    with monkeypatch.context() as patch:
        patch.setattr(Commit, moment, full)
        with pytest.raises(UserError, match="No space left on device"):
            save(tmp_path, 20, keep=1)
    chosen = choose(tmp_path, True, ALONE, print)
    assert chosen is not None
    assert (chosen.name.step, chosen.is_newest) == (10, True)
    assert not [path for path in tmp_path.rglob("*") if "1_20" in path.name]
    save(tmp_path, 30, keep=1)
    assert [c.name.step for c in published(tmp_path)] == [30]


def _save_on_ranks(root: str, failing_rank: int) -> str:
    from launcher.parallel import world as worlds

    world = worlds.start(force_cpu=True)
    if world.rank == failing_rank:
        # A file where the folder of this rank belongs: mkdir fails on this rank alone.
        (Path(root) / f"rank_{world.rank}").write_text("in the way")
    mesh = Mesh(dp_replicate=world.size)
    try:
        Store(Path(root), "CKP", 0, 5).save(
            SaveName("CKP", 0, 1, 20), shards(), {"global_step": 20}, mesh=mesh, world=world
        )
    except UserError as error:
        return str(error)
    finally:
        worlds.stop()
    return ""


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_when_one_rank_cannot_write_no_rank_publishes(tmp_path, failing_rank: int) -> None:
    errors = run_ranks(2, _save_on_ranks, str(tmp_path), failing_rank)
    assert errors[0] == errors[1]
    assert f"rank {failing_rank}: File exists" in errors[0]
    assert published(tmp_path) == []


def test_two_ranks_publish_together(tmp_path) -> None:
    assert run_ranks(2, _save_on_ranks, str(tmp_path), -1) == ["", ""]
    (checkpoint,) = published(tmp_path)
    assert [file.is_file() for file in checkpoint.files] == [True, True]
    assert checkpoint.manifest["mesh"]["dp_replicate"] == 2


def test_one_checkpoint_of_so_many_minutes_stays(tmp_path, monkeypatch) -> None:
    store = Store(tmp_path, "CKP", 0, 0, keep_minutes=10)
    for step in range(1, 9):
        monkeypatch.setattr("time.time", lambda step=step: 1e9 + 60 * 4 * step)
        name = SaveName("CKP", 0, 1, step)
        store.save(name, shards(step), {"global_step": step}, mesh=Mesh(), world=ALONE)
    assert [c.name.step for c in published(tmp_path)] == [1, 4, 7, 8]


def test_saves_of_unknown_times_stay_and_a_clock_set_back_removes_none(tmp_path) -> None:
    def found(step: int, saved_at: float) -> Published:
        manifest = {"sequence": step, "saved_at": saved_at}
        return Published(tmp_path, SaveName("CKP", 0, 1, step), manifest)

    times = (0, 0, 9000, 9060, 100, 160, 700, 760)
    saves = [found(step, at) for step, at in enumerate(times, 1)]
    old = superseded(saves, 0, keep_minutes=10)
    assert [save.name.step for save in old] == [4, 6]
