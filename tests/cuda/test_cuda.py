"""The same promises on a GPU: skipped where there is none.

python -m pytest tests/cuda -m cuda      one process for all cases of one GPU
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cuda.cases import CASES, Place
from tests.cuda.driver import Driver
from tests.workshop import Workshop

DEVICES = torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.parametrize(
    "device",
    [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("cpu", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("name", CASES)
def test_case(
    name: str, device: str, workshop: Workshop, drivers: Callable[[str, int], Driver]
) -> None:
    ranks = CASES[name].ranks
    if device == "cuda" and ranks > DEVICES:
        needs = "a CUDA device" if ranks == 1 else f"{ranks} GPUs: NCCL refuses two ranks on one"
        pytest.skip(f"needs {needs}")
    drivers(device, ranks).run(name, workshop.folder)


@pytest.fixture
def driver() -> Driver:
    return Driver("cpu")


def test_a_case_that_fails_leaves_the_process_and_one_that_dies_does_not(
    driver: Driver, tmp_path: Path
) -> None:
    """The cases of this test are found by their module, which the process imports too."""
    try:
        driver.run("draws are those of the CPU", tmp_path)
        with pytest.raises(AssertionError, match="KeyError: 'no such case'"):
            driver.run("no such case", tmp_path)
        driver.run("draws are those of the CPU", tmp_path)
        assert driver.starts == 1
        driver._processes[0].kill()
        driver._processes[0].wait()
        driver.run("draws are those of the CPU", tmp_path)
        assert driver.starts == 2
    finally:
        driver.close()


def test_a_place_gives_what_a_run_printed_when_it_fails(workshop: Workshop) -> None:
    name = workshop.yaml(model={"model_config": {"hidden_size": -1}})
    place = Place(workshop.folder, "cpu")
    with pytest.raises(AssertionError, match="exit code 2"):
        place.launch("train", str(workshop.folder / name))
