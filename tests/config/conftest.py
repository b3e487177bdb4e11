"""The folder of workspace.py, as the current directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.workspace import build


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `right.yaml` and what it names; the test runs in it, as one process."""
    build(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path
