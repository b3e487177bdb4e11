"""Of two sets of weights in a folder, the one that transformers reads is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.modeling_utils import _get_resolved_checkpoint_files

from launcher.weights.source import open_complete
from tests.weights.test_complete import TAKEN

NOT_READ_THERE = {
    "lost shards, and a file of torch", "a variant alone", "MindSpore's complete weights",
    "files that no index names",
}  # fmt: skip
"""Cases in which transformers raises an error."""


@pytest.mark.parametrize("case", TAKEN)
def test_the_files_are_those_of_transformers(tmp_path: Path, case: str) -> None:
    for build in TAKEN[case][0]:
        build(tmp_path)
    arguments = {"variant": None, "gguf_file": None, "use_safetensors": None, "user_agent": None}
    try:
        files, _ = _get_resolved_checkpoint_files(str(tmp_path), is_remote_code=False, **arguments)
    except OSError:
        files = ["none"]
    theirs = {Path(file) for file in files}
    is_read = all(file.is_file() for file in theirs)
    assert is_read == (case not in NOT_READ_THERE)
    if is_read:
        assert theirs == open_complete(tmp_path).headers.keys()
