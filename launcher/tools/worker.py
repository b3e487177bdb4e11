"""What torchrun starts instead of a script: it redirects the output of a worker to its log.

    worker.py LOG_DIR SCRIPT [ARGUMENT ...]

Redirects standard output and standard error to LOG_DIR/worker_{rank}.log, then becomes the script.
Imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Have Linux send SIGTERM when the launcher dies, even if it is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Replace this process by the script."""
    folder, *command = sys.argv[1:]
    path = Path(folder) / f"worker_{os.environ['RANK']}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _end_with_parent()
    os.environ["SLIPWAY_WORKER_LOG"] = str(path)
    os.execv(sys.executable, [sys.executable, "-u", *command])


if __name__ == "__main__":
    main()
