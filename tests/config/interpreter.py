"""Runs many command lines in one interpreter and reports on each as JSON.

Usage: python -m tests.config.interpreter < cases.json > reports.json
Starting Python costs more than checking a configuration, so one process serves a whole table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one command line did."""

    code: int
    out: str
    err: str
    torch_imported: bool
    seconds: float


def run_many(cases: list[dict[str, Any]]) -> list[Report]:
    """Run each {"argv", "cwd", "env"} through `launcher.cli.main` in one fresh interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(
        [sys.executable, "-m", "tests.config.interpreter"],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return [Report(**report) for report in json.loads(done.stdout)]


def _run(case: dict[str, Any]) -> dict[str, Any]:
    from launcher import cli

    os.chdir(case["cwd"])
    out, err = io.StringIO(), io.StringIO()
    before = dict(os.environ)
    os.environ.update(case.get("env", {}))
    start = time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(case["argv"])
    seconds = time.perf_counter() - start
    os.environ.clear()
    os.environ.update(before)
    return {
        "code": code,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "torch_imported": "torch" in sys.modules,
        "seconds": seconds,
    }


if __name__ == "__main__":
    json.dump([_run(case) for case in json.load(sys.stdin)], sys.stdout)
