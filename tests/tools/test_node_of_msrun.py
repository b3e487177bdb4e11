"""One node of several: its exit code is that of the job, also where its own ranks ended well."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.parallel.failure import Failure
from launcher.tools import msrun
from launcher.tools.launch import read


@pytest.mark.parametrize("fails", [False, True])
def test_a_failure_elsewhere_is_the_exit_code_of_every_node(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import run as torchrun

    monkeypatch.setattr(torchrun, "run", lambda arguments: None)
    launch = read(["run.py", "2", "1", "127.0.0.1", "29400", "1", str(tmp_path), "False", "60"])
    failure = Failure(rank=0, host="other", exit_code=3, reason="no room") if fails else None
    reported: list[str] = []
    code = msrun._torchrun(launch, SimpleNamespace(failure=failure), reported.append)  # type: ignore
    assert code == (3 if fails else 0)
    assert reported == (["msrun: rank 0 on other failed: no room"] if fails else [])
