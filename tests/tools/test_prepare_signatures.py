"""Pairs from docstrings to signatures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.tools import prepare_signatures
from launcher.tools.prepare_signatures import main, pairs

SOURCE = '''
class A:
    def first(self, x, *, y=1):
        """Add one thing
        to another.

        More words."""

    async def second(a: int) -> str:
        "Return the text of a number."


def short():
    """No."""


def without(x): ...
'''


def test_pairs_of_a_file() -> None:
    assert sorted(pairs(SOURCE)) == [
        ("Add one thing to another.", "def first(self, x, *, y=1):"),
        ("Return the text of a number.", "def second(a: int):"),
    ]


def test_a_file_of_another_language_has_none() -> None:
    assert list(pairs("print 'two'")) == []


def test_the_folder(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    for number in range(40):
        text = f'def f{number}(x):\n    """Return the number {number} of all things."""\n'
        (library / f"m{number}.py").write_text(text)
    monkeypatch.setattr(prepare_signatures, "standard_library", lambda: library)
    target = tmp_path / "out" / "signatures"
    assert main(["--output_dir", str(target)]) == 0
    train, heldout = (
        [json.loads(line)["messages"] for line in (target / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert len(train) + len(heldout) == 40
    assert 0 < len(heldout) < 10
    assert [turn["role"] for turn in train[0]] == ["user", "assistant"]
    assert train[0][1]["content"].startswith("def f")
    assert not any(turns in train for turns in heldout)
    before = (target / "train.jsonl").read_bytes()
    assert main(["--output_dir", str(target)]) == 2
    assert "exists" in capsys.readouterr().err
    assert (target / "train.jsonl").read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["signatures"]
