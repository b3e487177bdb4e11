"""The golden file of messages: a changed sentence, a missing entry and a stale one are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import messages


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty golden file, read again at each comparison."""
    path = tmp_path / "golden"
    path.write_text("")
    monkeypatch.setattr(messages, "GOLDEN", path)
    monkeypatch.setattr(messages, "_golden", messages._golden.__wrapped__)
    monkeypatch.delenv(messages.UPDATE, raising=False)
    return path


def test_entries_are_written_on_request_and_compared(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="no entry 'a: one'"):
        messages.check("a", "one", "first\nsecond\n")
    with monkeypatch.context() as context:
        context.setenv(messages.UPDATE, "1")
        messages.check("a", "two\nlines", "another text")
        messages.check("a", "one", "first\nsecond\n")
    messages.check("a", "one", "first\nsecond\n")
    assert golden.read_text() == "## a: one\nfirst\nsecond\n\n## a: two\\nlines\nanother text\n"
    with pytest.raises(AssertionError, match="another wording"):
        messages.check("a", "one", "first")


def test_stale_entries_are_found_and_removed(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden.write_text("## a: one\nx\n\n## a: old\ny\n\n## b: other\nz\n")
    with pytest.raises(AssertionError):
        messages.check_cases("a", ["one"])
    with monkeypatch.context() as context:
        context.setenv(messages.UPDATE, "1")
        messages.check_cases("a", ["one"])
    assert golden.read_text() == "## a: one\nx\n\n## b: other\nz\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = 1: rule. did you mean `y`?", ("y",)),
        ("x = 3: rule. Nearest: 2 or 4. Advice.", ("2", "4")),
        ("x = 3: rule. Nearest: 0.5.", ("0.5",)),
        ("2 processes: rule. Nearest: data_parallel 2. Or start", ("2",)),
        ("x = 3: rule. It belongs to A. B takes c.", ("A",)),
        ("x = 3: rule. Advice.", ()),
    ],
)
def test_nearest_values(line: str, expected: tuple[str, ...]) -> None:
    assert messages.nearest(line) == expected
