"""One driver for each device and number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.cuda.driver import Driver


@pytest.fixture(scope="session")
def drivers() -> Iterator[Callable[[str, int], Driver]]:
    """The driver of a device and a number of ranks."""
    opened: dict[tuple[str, int], Driver] = {}

    def driver(device: str, ranks: int) -> Driver:
        return opened.setdefault((device, ranks), Driver(device, ranks))

    yield driver
    for one in opened.values():
        one.close()
