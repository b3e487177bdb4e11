"""Files that a rank cannot access, because they are on the disk of another machine.

Owns what a rank reads then: of replicas in several files, one it can access. Invariant: a rank that
needs a file it cannot access reads nothing.
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
    """`source`, whose files are on several disks, for a rank that cannot access `elsewhere`."""
    unseen = frozenset(elsewhere)
    tensors = {name: _local_pieces(pieces, unseen) for name, pieces in source.tensors.items()}
    return replace(source, tensors=tensors, elsewhere=unseen, is_spread=True)


def _local_pieces(pieces: Pieces, unseen: Collection[Path]) -> Pieces:
    """Without replicas that cannot be accessed of boxes that can."""
    seen = {piece.box for piece in pieces if piece.file not in unseen}
    kept = [piece for piece in pieces if piece.file not in unseen or piece.box not in seen]
    return pieces if len(kept) == len(pieces) else Pieces(kept)


def check_local(reads: Iterable[Read], source: Source, rank: int) -> None:
    """Check that `rank` can access all that it is about to read. Raises `UserError` that names
    files."""
    if not source.elsewhere:
        return
    needed = sorted({read.piece.file for read in reads} & source.elsewhere)
    if needed:
        files = ", ".join(str(file.relative_to(source.path)) for file in needed[:FILES_SHOWN])
        more = f" and {len(needed) - FILES_SHOWN} more" * (len(needed) > FILES_SHOWN)
        raise UserError(
            f"rank {rank} needs {files}{more}, which are not visible to it",
            where=str(source.path),
            rule="without a shared file system a rank reads the files of its own machine, so "
            "layout and machine of each rank must be those of the save",
            nearest=f"Nearest: {layout_text(source.world_size, source.mesh)}, each rank where it "
            "was",
            advice="Put the folders of checkpoints together on a disk that all machines share, or "
            "copy the rank folders so that each machine has them all",
        )
