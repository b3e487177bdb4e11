"""Snapshots: which thread and stream copies, what waits for it, and where the memory comes from."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checkpoint import host_memory, snapshot
from launcher.checkpoint.catalog import published
from launcher.checkpoint.host_memory import HostBuffer, available_bytes
from launcher.checkpoint.monitor import CheckpointMonitor
from launcher.checkpoint.snapshot import Snapshot
from launcher.config.schema import CheckpointMonitorSection
from launcher.layout.box import full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.streams import STREAMS
from launcher.weights.ranks.rank_file import write_rank_file
from tests.streams import LateStreams

PAGE = 4096


def held(**tensors: torch.Tensor) -> dict[str, Shard]:
    return {n: Shard(tuple(t.shape), full_box(tuple(t.shape)), t) for n, t in tensors.items()}


def state() -> dict[str, torch.Tensor]:
    """Of several dtypes, one not contiguous, some empty, larger than a few pages together."""
    return {
        "w": torch.randn(40, 300), "t": torch.randn(50, 70).t(), "h": torch.randn(999).bfloat16(),
        "b": torch.randn(7) > 0, "e": torch.empty(0, 3), "s": torch.tensor(5), "adam_m.w":
        torch.randn(40, 300),
    }  # fmt: skip


@pytest.fixture(params=[1 << 30, PAGE], ids=["one portion", "many portions"])
def portion(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(host_memory, "PORTION_BYTES", request.param)
    return request.param


def test_a_copy_is_of_the_values_before_the_update_however_late_it_is(portion: int) -> None:
    streams = LateStreams()
    taker, tensors = Snapshot(streams), state()
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    copy = taker.take(held(**tensors), early={"b", "h", "not there"})
    assert streams.pending > 0, "the host has not waited"
    for name in ("b", "h"):
        tensors[name].zero_()  # in a forward pass
    copy.before_update()
    assert streams.pending == 0
    for tensor in tensors.values():
        tensor.zero_()
    writer = threading.Thread(target=copy.finish, name="writer")
    writer.start()
    writer.join()
    for name, shard in copy.shards.items():
        assert torch.equal(shard.tensor, expected[name]), name
        assert shard.box == full_box(shard.shape)
    order = [what for what in streams.whats() if what not in ("enter", "register", "copy")]
    assert order == [
        "wait for current", "record", "record", "current waits", "current waits", "synchronize",
    ]  # fmt: skip
    assert streams.threads("copy") == {"MainThread"}
    assert streams.threads("synchronize") == {"writer"}
    assert streams.threads("register") == {"pin"}, "a refusal is the last error of its thread"
    sizes = [call.detail for call in streams.calls if call.what == "copy"]
    assert max(sizes) <= portion


def test_without_the_wait_the_copy_would_be_of_later_values() -> None:
    """The device of these tests does tell."""
    taker, tensors = Snapshot(LateStreams()), state()
    copy = taker.take(held(**tensors))
    tensors["w"].zero_()
    copy.finish()
    assert not copy.shards["w"].tensor.any()


def test_the_next_snapshot_waits_for_the_copy_that_is_pending() -> None:
    streams = LateStreams()
    taker = Snapshot(streams)
    first = taker.take(held(w=torch.ones(10)))
    assert streams.pending == 1
    second = taker.take(held(w=torch.zeros(10)))
    assert streams.whats().index("synchronize") < len(streams.calls) - 2
    assert streams.pending == 1
    second.finish()
    assert streams.pending == 0
    before = len(streams.calls)
    for again in (first, second, taker):
        again.finish()
    assert len(streams.calls) == before, "each is waited for once"


def test_temporary_tensors_live_until_they_are_copied() -> None:
    """Zeros for state that no step has made are freed by everyone else."""
    taker, tensor = Snapshot(LateStreams()), torch.ones(9)
    memory = tensor.untyped_storage()._weak_ref()
    copy = taker.take(held(w=tensor))
    del tensor
    assert not torch.UntypedStorage._expired(memory)
    copy.finish()
    assert torch.UntypedStorage._expired(memory)
    torch.UntypedStorage._free_weak_ref(memory)


def test_an_error_in_a_snapshot_leaves_no_copy_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = LateStreams()
    taker = Snapshot(streams)
    plain, left = Snapshot._copy, iter(range(2))

    def fail(self: Snapshot, *arguments: Any) -> list[torch.Tensor]:
        if next(left, None) is None:
            raise MemoryError("no room on the device")
        return plain(self, *arguments)

    monkeypatch.setattr(Snapshot, "_copy", fail)
    with pytest.raises(MemoryError):
        taker.take(held(**state()))
    assert streams.pending == 0
    monkeypatch.setattr(Snapshot, "_copy", plain)
    copy = taker.take(held(w=torch.ones(3)))
    copy.finish()
    assert copy.shards["w"].tensor.tolist() == [1, 1, 1]


def test_memory_is_pinned_once_and_before_the_first_save(portion: int) -> None:
    streams = LateStreams()
    taker, tensors = Snapshot(streams), state()
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert "pinned in the background" in taker.prepare(nbytes, nbytes)
    for _ in range(3):
        taker.take(held(**tensors)).finish()
        assert taker.prepare(nbytes, nbytes) == ""
    registered = [call.detail for call in streams.calls if call.what == "register"]
    assert sum(registered) == taker.nbytes == -(-nbytes // PAGE) * PAGE
    assert streams.whats().index("register") < streams.whats().index("copy")
    assert all(address % PAGE == 0 for address in streams.registered)
    larger = held(w=torch.ones(nbytes))
    taker.take(larger).finish()
    assert sum(streams.registered.values()) == taker.nbytes == -(-4 * nbytes // PAGE) * PAGE
    del taker
    assert not streams.registered, "released with the buffer"


def test_what_cannot_be_pinned_is_copied_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PORTION_BYTES", PAGE)
    budget = iter([True, True])
    streams = LateStreams(register=lambda address, nbytes: next(budget, False))
    taker = Snapshot(streams)
    copy = taker.take(held(w=torch.arange(9000.0)))
    copy.finish()
    assert torch.equal(copy.shards["w"].tensor, torch.arange(9000.0))
    assert not streams.registered, "all of it or nothing"


@pytest.mark.parametrize("free", [10**9, None, 10**6])
def test_memory_that_a_machine_lacks_is_not_pinned(
    free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "available_bytes", lambda: free)
    streams = LateStreams()
    taker = Snapshot(streams)
    line = taker.prepare(1000, 8 * 10**5 + 1)
    lacks = free == 10**6
    assert ("not pinned" in line) == lacks
    assert not lacks or ("0.8 MB" in line and "1.0 MB" in line)
    taker.take(held(w=torch.ones(250))).finish()
    assert ("register" in streams.whats()) != lacks


def test_the_host_pins_nothing() -> None:
    taker = Snapshot()
    assert taker.prepare(10, 10) == ""
    assert taker.nbytes == 0
    copy = taker.take(held(**state()))
    assert copy.shards["w"].tensor.shape == (40, 300)


def test_a_buffer_is_cut_where_its_registrations_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "PORTION_BYTES", PAGE)
    buffer = HostBuffer(3 * PAGE, LateStreams())
    assert list(buffer.pieces(5, 2 * PAGE + 1)) == [(5, 2 * PAGE + 1)]
    assert buffer.pin()
    assert buffer.is_pinned
    assert list(buffer.pieces(5, 2 * PAGE + 1)) == [
        (5, PAGE), (PAGE, 2 * PAGE), (2 * PAGE, 2 * PAGE + 1)
    ]  # fmt: skip
    assert list(buffer.pieces(PAGE, 2 * PAGE)) == [(PAGE, 2 * PAGE)]
    assert list(buffer.pieces(PAGE, PAGE)) == [(PAGE, PAGE)]


def test_free_memory_is_that_of_the_container_where_it_is_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(host_memory, "_MEMORY_LIMITS", [(str(limit), str(used))])
    of_machine = available_bytes()
    assert of_machine is None or of_machine > 10**6
    used.write_text("500\n")
    limit.write_text("max\n")
    assert (available_bytes() is None) == (of_machine is None)
    limit.write_text("1500\n")
    assert available_bytes() == 1000


def test_a_synchronous_save_of_a_device_goes_through_pinned_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = state() | {"large": torch.randn(1500, 1000), "larger": torch.randn(2500, 1000)}
    write_rank_file(tmp_path / "host", held(**tensors), mesh=Mesh(), rank=0)
    streams = LateStreams()
    monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    for extension in ("safetensors", "ckpt"):
        kept = {n: t for n, t in tensors.items() if extension == "safetensors" or n != "e"}
        path = tmp_path / f"device.{extension}"
        write_rank_file(path, held(**kept), mesh=Mesh(), rank=0, file_format=extension)
        assert streams.pending == 0
    assert (tmp_path / "device.safetensors").read_bytes() == (tmp_path / "host").read_bytes()
    monkeypatch.undo()
    write_rank_file(tmp_path / "ckpt", held(**kept), mesh=Mesh(), rank=0, file_format="ckpt")
    assert (tmp_path / "device.ckpt").read_bytes() == (tmp_path / "ckpt").read_bytes()
    assert [call.detail for call in streams.calls if call.what == "pinned"] == [4 << 20] * 4
    assert "MainThread" not in streams.threads("copy")
    assert streams.threads("copy") == streams.threads("enter")


class Run:
    """What CheckpointMonitor needs of a run: two tensors, one of which a forward pass changes."""

    def __init__(self, folder: Path) -> None:
        from benchmarks.saving import Run as Base

        self.trained = torch.zeros(1000)
        self.buffer = torch.zeros(10)
        self.base = Base(folder, {"w": self.trained, "bias": self.buffer})
        self.base.state_names = lambda: {"w": ()}  # type: ignore[method-assign]
        self.lines = list[str]()
        self.waits = list[Any]()
        self.base.log = self.lines.append  # type: ignore[method-assign]
        self.base.add_pending_read = self.waits.append  # type: ignore[method-assign]

    def step(self) -> None:
        """Forward, then the update."""
        self.base.global_step += 1
        self.buffer.fill_(self.base.global_step)
        while self.waits:
            self.waits.pop()()
        self.trained.fill_(self.base.global_step)


@pytest.fixture
def monitored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    streams = LateStreams()
    monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    run = Run(tmp_path)
    monitor = CheckpointMonitor(CheckpointMonitorSection(async_save=True, save_checkpoint_steps=1))
    monitor.on_train_begin(run.base)
    return run, monitor, streams


def test_saves_beside_training_hold_their_step(monitored: tuple[Any, ...], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run, monitor, streams = monitored
    assert any("pinned in the background" in line for line in run.lines)
    for _ in range(4):
        run.step()
        monitor.on_steps_end(run.base, [])
    monitor.on_train_end(run.base)
    saves = published(tmp_path / "checkpoint")
    assert [save.name.step for save in saves] == [1, 2, 3, 4]
    for save in saves:
        found = load_file(save.files[0])
        assert found["w"].eq(save.name.step).all()
        assert found["bias"].eq(save.name.step).all()
    assert streams.threads("register") == {"pin"}
    assert len([call for call in streams.calls if call.what == "register"]) == 1


def test_a_run_that_fails_waits_for_the_copy(monitored: tuple[Any, ...], tmp_path: Path) -> None:
    run, monitor, streams = monitored
    run.step()
    monitor.on_steps_end(run.base, [])
    monitor.on_exception(run.base, RuntimeError("the run fails"))
    assert streams.pending == 0
    assert [save.name.step for save in published(tmp_path / "checkpoint")] == [1]


def test_an_error_of_the_device_is_raised_in_the_run(
    monitored: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, monitor, streams = monitored

    def fail(event: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    run.step()
    monkeypatch.setattr(streams, "synchronize", fail)
    monitor.on_steps_end(run.base, [])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        monitor.on_train_end(run.base)
