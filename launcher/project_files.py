"""Where `run.py` and `configs/` are: in a checkout, or as the package was installed."""

from __future__ import annotations

import sysconfig
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
"""The checkout, or the folder that packages are installed to."""

IS_CHECKOUT = (ROOT / "pyproject.toml").is_file() and (ROOT / "run.py").is_file()


def run_script() -> Path:
    """The script that `run.py` names: an installed package starts the same with its own module."""
    return ROOT / "run.py" if IS_CHECKOUT else PACKAGE / "__main__.py"


def configs() -> Path:
    """The folder of the configurations that come with the project; a wheel installs them as data
    files."""
    if IS_CHECKOUT:
        return ROOT / "configs"
    return Path(sysconfig.get_path("data")) / "share" / "slipway" / "configs"
