"""A save that cannot fit fails before it writes; one that fits, or may fit, does not."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.checkpoint.space import SMALL_FILES_BYTES, bytes_on_host, room_for
from launcher.parallel.world import World
from tests.checkpoint.crew import ALONE, together


def disk(monkeypatch: pytest.MonkeyPatch, **of_disk: int) -> None:
    """Make `statvfs` report these numbers of blocks of 4096 bytes."""
    found = {"f_blocks": 10_000, "f_bavail": 1000, "f_bfree": 9000, "f_frsize": 4096, **of_disk}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**found))


FREE = 1000 * 4096
ROOM = FREE - SMALL_FILES_BYTES


def test_what_fits_to_the_byte_has_room(monkeypatch, tmp_path: Path) -> None:
    disk(monkeypatch)
    room_for(tmp_path, ROOM)
    with pytest.raises(OSError, match="no room") as caught:
        room_for(tmp_path, ROOM + 1)
    assert caught.value.errno == errno.ENOSPC


def test_what_only_root_may_fill_is_not_counted(monkeypatch, tmp_path: Path) -> None:
    disk(monkeypatch, f_bavail=0)
    with pytest.raises(OSError, match=r"0\.0 MB are free"):
        room_for(tmp_path, 0)


def test_a_file_system_without_a_size_has_room(monkeypatch, tmp_path: Path) -> None:
    disk(monkeypatch, f_blocks=0, f_bavail=0)
    room_for(tmp_path, 1 << 60)


def test_real_folders(tmp_path: Path) -> None:
    room_for(tmp_path, 0)
    with pytest.raises(OSError, match="no room"):
        room_for(tmp_path, 1 << 60)
    with pytest.raises(FileNotFoundError):
        room_for(tmp_path / "absent", 0)


def test_each_machine_needs_room_for_its_own_ranks(monkeypatch) -> None:
    assert bytes_on_host(ALONE, 5) == 5
    monkeypatch.setattr(socket, "gethostname", lambda: "one")

    def work(world: World) -> int:
        return bytes_on_host(world, 10**world.rank)

    assert together(3, work) == [111, 111, 111]


class Pair(World):
    """Two ranks on two machines, seen from the first."""

    def gather(self, value: tuple[str, int]) -> list[tuple[str, int]]:
        return [value, ("another machine", 1000)]


def test_ranks_of_other_machines_do_not_count() -> None:
    assert bytes_on_host(Pair(0, 2, ALONE.device), 7) == 7
