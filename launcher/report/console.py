"""The console of rank 0, and the log files of every rank in `log/rank_N/`.

On a terminal, progress is one line below the messages that is updated in place; elsewhere it is a
plain line every `PLAIN_INTERVAL_SECONDS`.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

LOG_BYTES, LOG_BACKUPS = 50_000_000, 5
FILE_FORMAT = "[%(levelname)s] %(asctime)s [%(filename)s:%(lineno)d] %(message)s"
PLAIN_INTERVAL_SECONDS = 15.0
LIVE_INTERVAL_SECONDS = 0.1

logger = logging.getLogger("slipway")


class Console:
    """Output of the main process. Messages scroll, progress stays on one line."""

    def __init__(self, *, enabled: bool, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")  # for terminals without Unicode
        self._line = ""
        self._shown = -1e9

    def log(self, text: str) -> None:
        """Write a message to the log of this rank, and on the main rank to the console."""
        logger.info(text)
        if self.enabled:
            erase = "\r\033[K" if self._line else ""
            print(f"{erase}{text}", file=self.stream, flush=True)
            self._redraw()

    def write(self, text: str) -> None:
        """Write a piece of a line to the console, not to the log."""
        if self.enabled and text:
            print(text, end="", file=self.stream, flush=True)

    def progress(
        self, text: str, *, last: bool = False, plain_seconds: float = PLAIN_INTERVAL_SECONDS
    ) -> None:
        """Show progress, at most once per interval (`plain_seconds` where it is plain lines);
        `last` is always shown."""
        interval = LIVE_INTERVAL_SECONDS if self.live else plain_seconds
        now = time.monotonic()
        if not self.enabled or (now - self._shown < interval and not last):
            return
        self._shown = now
        if not self.live:
            print(text, file=self.stream, flush=True)
            return
        if not last:  # a line that wraps could not be erased
            text = text[: shutil.get_terminal_size((1000, 24)).columns - 1]
        self._line = "" if last else text
        print(f"\r\033[K{text}", end="\n" if last else "", file=self.stream, flush=True)

    def end_progress(self) -> None:
        """Erase the line of progress of work that is done; plain lines stay."""
        if self._line:
            print("\r\033[K", end="", file=self.stream, flush=True)
        self._line, self._shown = "", -1e9

    def _redraw(self) -> None:
        if self._line:
            print(self._line, end="", file=self.stream, flush=True)


def open_logs(output_dir: Path, rank: int) -> None:
    """Send the log of this process to `log/rank_{rank}/info.log`, errors also to `error.log`."""
    folder = output_dir / "log" / f"rank_{rank}"
    folder.mkdir(parents=True, exist_ok=True)
    close_logs()
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for name, level in (("info.log", logging.INFO), ("error.log", logging.ERROR)):
        handler = RotatingFileHandler(
            folder / name,
            maxBytes=LOG_BYTES,
            backupCount=LOG_BACKUPS,
            encoding="utf-8",
            errors="backslashreplace",  # file names may have any bytes
        )
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(FILE_FORMAT))
        logger.addHandler(handler)


def close_logs() -> None:
    """Flush and close the log files of this process."""
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
