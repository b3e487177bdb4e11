"""The terminal of a chat: lines from the keyboard, and Ctrl-C while an answer is generated.

While an answer is generated the terminal hands over every key: Ctrl-C is then a key that stops the
answer, also where the process is a worker of torchrun, which does not get the signals of its
terminal; other keys are kept for the next line. Where standard input is not a terminal, lines are
read as they are. Invariant: the terminal is as it was whenever a line is read, and at the end.
"""

from __future__ import annotations

import codecs
import os
import select
import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from launcher.environment import has_own_log
from launcher.predict.line_input import read_line

MARK = "> "
_CONTINUED = "... "
_CTRL_C = b"\x03"
_KEYBOARD = 0
"""The descriptor of standard input."""


class Terminal:
    """Reads lines and writes text; `handles_signals`: SIGINT stops an answer too."""

    def __init__(self, *, handles_signals: bool = True) -> None:
        self._handles_signals = handles_signals
        self._typed = ""
        """Keys that were typed ahead."""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._is_stopped = False
        self.is_terminal = os.isatty(_KEYBOARD)
        self._readline = _readline() if self.is_terminal else None
        if self.is_terminal and has_own_log():  # standard output is the log of a worker
            sys.stdout.flush()
            os.dup2(_KEYBOARD, 1)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=errors)

    def write(self, text: str) -> None:
        """Write text, at once."""
        print(text, end="", flush=True)

    def read(self) -> str:
        """The next input: a line, and those after it while one ends in a backslash.

        Raises EOFError at the end of the input (Ctrl-D), KeyboardInterrupt at Ctrl-C.
        """
        lines: list[str] = []
        while True:
            line = self._line(_CONTINUED if lines else MARK)
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line.removesuffix("\\"))

    def prefill(self, text: str) -> None:
        """Offer a text as the next line, to be edited."""
        self._typed = text.replace("\n", " ") + self._typed

    def _line(self, mark: str) -> str:
        if not self.is_terminal:
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            return line.removesuffix("\n")
        typed, end, rest = self._typed.partition("\n")
        self._typed = rest
        if end:  # a complete line was typed ahead
            self.write(f"{mark}{typed}\n")
            return typed
        editor = self._readline
        if editor is None:
            return typed + read_line(lambda: input(mark + typed))
        editor.set_startup_hook(lambda: editor.insert_text(typed))
        try:
            return read_line(lambda: input(mark))
        finally:
            editor.set_startup_hook(None)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While an answer is generated: `is_stopped` becomes True at Ctrl-C."""
        self._is_stopped = False
        before = signal.signal(signal.SIGINT, self._stop) if self._handles_signals else None
        mode = self._hand_over_keys()
        try:
            yield
        finally:
            if mode is not None:
                self._take_keys()
                with suppress(termios.error):  # the terminal is closed
                    termios.tcsetattr(_KEYBOARD, termios.TCSADRAIN, mode)
            if before is not None:
                signal.signal(signal.SIGINT, before)

    def is_stopped(self) -> bool:
        """Whether Ctrl-C was pressed since `listening` began."""
        if self.is_terminal:
            self._take_keys()
        return self._is_stopped

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopped = True

    def _hand_over_keys(self) -> list[Any] | None:
        """Have keys arrive at once and unseen, Ctrl-C among them. Returns the mode before."""
        if not self.is_terminal:
            return None
        mode = termios.tcgetattr(_KEYBOARD)
        changed = termios.tcgetattr(_KEYBOARD)
        changed[3] &= ~(termios.ICANON | termios.ECHO)
        keys = changed[6]
        keys[termios.VINTR] = b"\0"  # off; Ctrl-\ and Ctrl-Z still are signals
        keys[termios.VMIN], keys[termios.VTIME] = 0, 0
        termios.tcsetattr(_KEYBOARD, termios.TCSADRAIN, changed)
        return mode

    def _take_keys(self) -> None:
        """Take the keys that were pressed: Ctrl-C stops, others are kept."""
        while select.select([_KEYBOARD], [], [], 0)[0]:
            try:
                keys = os.read(_KEYBOARD, 1024)
            except OSError:
                keys = b""
            if not keys or _CTRL_C in keys:  # nothing: the terminal is closed
                self._is_stopped = True
            if not keys:
                return
            text = self._decoder.decode(keys.replace(_CTRL_C, b""))
            self._typed += "".join(c for c in text if c.isprintable() or c == "\n")


def _readline() -> Any:
    """The editor of lines with its history; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    return readline
