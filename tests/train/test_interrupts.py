"""Reasons to stop: signals, and a request by the process itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from launcher.train import interrupts as module
from launcher.train.interrupts import REQUEST, STOP_REASONS, Interrupted, Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_recorded(number: int, code: int) -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), number)
        assert interrupts.as_values() == [float(wish == number) for wish in STOP_REASONS]
    assert Interrupted(number).exit_code == code


def test_a_request_is_not_a_signal(monkeypatch) -> None:
    monkeypatch.setattr(module, "ECHO_SECONDS", 0.0)
    with Interrupts() as interrupts:
        interrupts.request()
        assert interrupts.as_values() == [0.0, 0.0, 1.0]
        os.kill(os.getpid(), signal.SIGTERM)  # the first one: it must not end the process
        assert interrupts.as_values() == [0.0, 1.0, 1.0]
    assert Interrupted(REQUEST).exit_code == 0
    assert str(Interrupted(REQUEST)) == "a request to stop"


def test_a_second_signal_ends_the_process() -> None:
    code = (
        "import os, signal, time\n"
        "from launcher.train import interrupts\n"
        "interrupts.ECHO_SECONDS = 0.0\n"
        "with interrupts.Interrupts():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == ""
