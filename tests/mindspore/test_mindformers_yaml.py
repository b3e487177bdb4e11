"""MindFormers' own YAML files are accepted as they are, or refused for exactly what is missing.

`SLIPWAY_MINDFORMERS` names checkouts of MindFormers, several separated by a colon.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.errors import Problem
from tests.mindspore import yaml_survey
from tests.mindspore.yaml_survey import Materials, configurations, known_files
from tests.workshop import Workshop

FOLDERS = [Path(text) for text in os.environ.get("SLIPWAY_MINDFORMERS", "").split(":") if text]
SNAPSHOT_OF_JULY_2025 = {"accepted": 54, "accepted with readers": 55}
"""Of its 65 files, as a minimum."""

IMPOSSIBLE = ("tests/st/test_grace_exit_save_ckpt/test_grace_exit_save_ckpt.yaml",)
"""It has 8 key/value heads for 4 heads, which the test that it is for changes."""

_LOADER = re.compile(r"(train|eval)_dataset\.data_loader\.(type|handler) = ")
needs_checkouts = pytest.mark.skipif(not FOLDERS, reason="SLIPWAY_MINDFORMERS is not set")


def reason(problem: Problem) -> str:
    """The kind of a problem, without its place and values."""
    return f"{problem.what.partition(' = ')[0][:60]}: {problem.rule[:60]}"


def is_missing_reader(found: Sequence[Problem]) -> bool:
    """Whether a reader of data is the one thing that is missing."""
    return len(found) == 1 and bool(_LOADER.match(found[0].what)) and "not built" in found[0].rule


@needs_checkouts
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_files_of_a_checkout(
    folder: Path, materials: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Materials(tmp_path / "given", materials.folder / "tokenizer")
    table, accepted, waiting, wrong = known_files(), [], [], []
    reasons: Counter[str] = Counter()
    files = configurations(folder)
    for file in files:
        name = str(file.relative_to(folder))
        found = yaml_survey.problems(file, place, monkeypatch)
        reasons.update({reason(problem) for problem in found})
        level = table[name].level if name in table and name not in IMPOSSIBLE else 3
        if not found:
            accepted.append(name)
        elif is_missing_reader(found):
            waiting.append(name)
        if (level == 1 and found) or (level == 2 and found and not is_missing_reader(found)):
            wrong.append(f"{name}: " + "; ".join(map(str, found)))
    print(f"{folder}: {len(files)} files, {len(accepted)} accepted, {len(waiting)} need a reader")
    for text, count in reasons.most_common():
        print(f"{count:5} {text}")
    assert not wrong, "\n".join(wrong)
    if {name for name, row in table.items() if "o" in row.snapshots} <= {
        str(file.relative_to(folder)) for file in files
    }:
        assert len(accepted) >= SNAPSHOT_OF_JULY_2025["accepted"]
        assert len(accepted) + len(waiting) >= SNAPSHOT_OF_JULY_2025["accepted with readers"]
