"""Shared by all tests: one thread a process, no network, a workshop of real materials."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each of the processes that tests start would else compile all of launcher and models again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

from tests.workshop import Workshop, build_materials

settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")


def pytest_collection_finish() -> None:
    """Modules and tests live as long as the session: full collections need not walk them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


LONGEST_FIRST = ("tests/end_to_end", "tests/test_msrun.py", "tests/parallel", "tests/test_docs.py")
"""Files whose tests start many processes: begun last, one would keep a worker busy alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of files for `--no-loadscope-reorder`."""
    items.sort(key=lambda item: not any(name in item.path.as_posix() for name in LONGEST_FIRST))


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Corpus and tokenizer, made once; do not write here."""
    return build_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture
def workshop(materials: Workshop, tmp_path) -> Workshop:
    """The materials in a fresh folder."""
    return materials.copy_to(tmp_path / "work")
