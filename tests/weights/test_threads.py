"""Work of several threads ends with all of its threads."""

from __future__ import annotations

import subprocess
import sys

INTERRUPTED = """
import itertools, os, signal, sys, threading
from launcher.weights.threads import in_parallel
sys.setswitchinterval(1e-6)
left = 0
for number in range(200):
    begun = itertools.count()
    may_end = threading.Event()
    def work(item):
        if next(begun) == number % 3:
            os.kill(os.getpid(), signal.SIGINT)
        may_end.wait(0.001)
    try:
        in_parallel(work, range(8), 8)
    except KeyboardInterrupt:
        left += threading.active_count() > 1
    else:
        sys.exit("no interrupt")
sys.exit(left)
"""


def test_an_interrupt_while_threads_start_leaves_none_behind() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
