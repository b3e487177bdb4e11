"""The type checker knows torch and the modules of Slipway: misspelled attributes are errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MISSPELLED = """\
import torch

from models.decoder import Decoder


def weight(model: Decoder, tensor: torch.Tensor) -> torch.Tensor:
    model.modle
    model.model.layrs["0"]
    model.decoder_layers()[0].self_atn
    return tensor.reshpae(3)


def right(model: Decoder, tensor: torch.Tensor) -> torch.Tensor:
    model.model.layers["0"]
    return tensor.reshape(3)
"""


def test_misspelled_attributes_of_modules_and_tensors_are_found(tmp_path: Path) -> None:
    (tmp_path / "misspelled.py").write_text(MISSPELLED)
    pyrefly = str(Path(sys.executable).with_name("pyrefly"))
    options = {"--preset": "default", "--search-path": str(ROOT), "--output-format": "min-text",
               "--python-interpreter-path": sys.executable}  # fmt: skip
    words = [word for option in options.items() for word in option]
    done = subprocess.run(
        [pyrefly, "check", *words, "misspelled.py"], cwd=tmp_path, capture_output=True, text=True
    )
    errors = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
    lines = [int(error.split(":")[1]) for error in errors]
    assert lines == [7, 8, 9, 10], done.stdout
    for error, name in zip(errors, ("modle", "layrs", "self_atn", "reshpae"), strict=True):
        assert name in error
