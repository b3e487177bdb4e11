"""Sight: files that a rank does not see, because they lie on the disk of another machine.

Owns what a rank reads then: of pieces that several files hold, one it sees. Invariant: a rank that
needs what it does not see reads nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from launcher.errors import UserError
from launcher.layout.mesh import layout_text
from launcher.weights.pieces import Pieces
from launcher.weights.reading.plan import Read
from launcher.weights.source import Source

FILES_SHOWN = 3


def with_local_files(source: Source, elsewhere: Collection[Path]) -> Source:
    """`source`, whose files lie on several disks, to a rank that does not see those `elsewhere`."""
    unseen = frozenset(elsewhere)
    tensors = {name: _local_pieces(pieces, unseen) for name, pieces in source.tensors.items()}
    return replace(source, tensors=tensors, elsewhere=unseen, is_spread=True)


def _local_pieces(pieces: Pieces, unseen: Collection[Path]) -> Pieces:
    """Without the unseen copies of what is seen."""
    seen = {piece.box for piece in pieces if piece.file not in unseen}
    kept = [piece for piece in pieces if piece.file not in unseen or piece.box not in seen]
    return pieces if len(kept) == len(pieces) else Pieces(kept)


def check_local(reads: Iterable[Read], source: Source, rank: int) -> None:
    """Check that `rank` sees all it is about to read. Raises `UserError` that names files."""
    if not source.elsewhere:
        return
    needed = sorted({read.piece.file for read in reads} & source.elsewhere)
    if needed:
        files = ", ".join(str(file.relative_to(source.path)) for file in needed[:FILES_SHOWN])
        more = f" and {len(needed) - FILES_SHOWN} more" * (len(needed) > FILES_SHOWN)
        raise UserError(
            f"rank {rank} needs {files}{more}, which it does not see",
            where=str(source.path),
            rule="without a shared disk a rank reads what lies on its own: after a save the layout "
            "stays, and the machine of each rank",
            nearest=f"Nearest: {layout_text(source.world_size, source.mesh)}, each rank where it "
            "was",
            advice="Put the folders of checkpoints together on a disk that all machines share, or "
            "copy the rank folders so that each machine has them all",
        )
