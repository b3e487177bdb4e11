"""What tests of weights have in common: large pages."""

from pathlib import Path

import pytest

from launcher.weights.reading import pages


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which an administrator allows large pages, whatever this machine's says."""
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never")
    monkeypatch.setattr(pages, "ENABLED", file)
    return file
