"""The console and the logs: rank 0 speaks, every rank writes `log/rank_N/`.

On a terminal the newest progress is one line that is rewritten in place below the messages; where
output is not a terminal it is a plain line now and then.
"""

from __future__ import annotations

import logging
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
    """What the main process shows. Messages scroll, progress stays on one line."""

    def __init__(self, *, enabled: bool, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")  # a terminal without these characters
        self._line = ""
        self._shown = -1e9

    def log(self, text: str) -> None:
        """A message: into the log of this rank, and on the console of the main one."""
        logger.info(text)
        if self.enabled:
            erase = "\r\033[K" if self._line else ""
            print(f"{erase}{text}", file=self.stream, flush=True)
            self._redraw()

    def progress(self, text: str, *, last: bool = False) -> None:
        """The newest state of something long; `last` is always shown."""
        interval = LIVE_INTERVAL_SECONDS if self.live else PLAIN_INTERVAL_SECONDS
        now = time.monotonic()
        if not self.enabled or (now - self._shown < interval and not last):
            return
        self._shown = now
        if not self.live:
            print(text, file=self.stream, flush=True)
            return
        self._line = "" if last else text
        print(f"\r\033[K{text}", end="\n" if last else "", file=self.stream, flush=True)

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
            errors="backslashreplace",  # names of files may be any bytes
        )
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(FILE_FORMAT))
        logger.addHandler(handler)


def close_logs() -> None:
    """Flush and close the log files of this process."""
    for handler in list(logger.handlers):
        handler.close()
        logger.removeHandler(handler)
