"""`.ckpt` files of MindSpore, which are not read: errors with the way to convert them."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from launcher.errors import UserError


def refuse_ckpt(path: Path) -> NoReturn:
    """Raise `UserError` for a protobuf checkpoint of MindSpore."""
    raise UserError(
        f"{path} is a .ckpt file of MindSpore",
        rule="of .ckpt files only those of torch are read",
        advice="Convert it with mindspore.ckpt_to_safetensors",
    )


def refuse_encrypted(path: Path) -> NoReturn:
    """Raise `UserError` for an encrypted checkpoint of MindSpore."""
    raise UserError(
        f"{path} is an encrypted file of MindSpore",
        rule="encrypted weights are not read",
        advice="Load it with mindspore.load_checkpoint(path, dec_key=...) and save it as "
        "safetensors",
    )
