"""Files of weights without torch: a header, a note and zeros, for rules that read headers."""

from __future__ import annotations

from pathlib import Path

from launcher.layout.box import Box
from launcher.layout.mesh import Mesh
from launcher.weights.formats.rank_metadata import RankFileMetadata
from launcher.weights.formats.safetensors import Slot, header_bytes

MINDSPORE_CKPT = b"\x0a\x1a\x0a\x01w\x12\x15\x08\x02\x12\x07Float32\x1a\x08" + bytes(8)
"""A .ckpt of MindSpore: one parameter w of two numbers."""
TORCH_ZIP = b"PK\x03\x04" + bytes(40)
"""The beginning of a file of torch."""


def safetensors(path: Path, metadata: dict[str, str] | None = None, rows: int = 2) -> None:
    """One tensor `w` of `rows` float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    slot = Slot("w", "F32", (rows,))
    path.write_bytes(header_bytes([slot], metadata or {"format": "pt"}) + bytes(slot.nbytes))


def rank_files(
    root: Path, mesh: Mesh, *, name: str = "CKP_rank_{}-1_10", deduplicated: bool = False,
    is_ours: bool = True,
) -> None:  # fmt: skip
    """What the ranks of `mesh` would save of a tensor `w` that has two rows for each."""
    for rank in range(mesh.world_size):
        places = {"w": ((2 * mesh.world_size,), Box((2 * rank,), (2,)))}
        note = RankFileMetadata(mesh.world_size, rank, mesh.sizes(), places)
        metadata = {"format": "pt" if is_ours else "ms", "remove_redundancy": str(deduplicated)}
        own = {"slipway": note.text(("0" * 16,))} if is_ours else {}
        file = root / f"rank_{rank}" / f"{name.format(rank)}.safetensors"
        safetensors(file, {**metadata, **own})
