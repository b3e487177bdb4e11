"""Real file systems for tests: small ones and read-only ones, seen by one process alone.

A process first gets mounts of its own (`private`), which end with it. That needs a system that lets
it (root, or user namespaces); elsewhere `NotAllowed` says so.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


class NotAllowed(Exception):
    """This system gives a process no mounts of its own."""


def private() -> None:
    """Give this process mounts of its own, and the right to change them."""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        _call("unshare", _NEW_MOUNTS)
    else:
        _call("unshare", _NEW_MOUNTS | _NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)


def small_disk(folder: Path, nbytes: int) -> None:
    """Let an empty file system of `nbytes` lie at `folder`."""
    folder.mkdir(exist_ok=True)
    _call("mount", b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={nbytes}".encode())


def resize(folder: Path, nbytes: int) -> None:
    """Change the size of a small disk."""
    _call("mount", b"tmpfs", bytes(folder), b"tmpfs", _REMOUNT, f"size={nbytes}".encode())


def read_only(folder: Path) -> None:
    """Let nothing be written below `folder`."""
    _call("mount", bytes(folder), bytes(folder), None, _BIND, None)
    _call("mount", None, bytes(folder), None, _BIND | _REMOUNT | _READ_ONLY, None)


def writable(folder: Path) -> None:
    """Take that back."""
    _call("mount", None, bytes(folder), None, _BIND | _REMOUNT, None)


def _call(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments):
        code = ctypes.get_errno()
        raise NotAllowed(f"{name}: {os.strerror(code)}")
