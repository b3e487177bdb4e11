"""Rank files: the source made of one file a rank.

Owns what a folder of rank files must be. The layout comes from the notes of the files; those of
MindSpore, which have none, need its strategy files (`launcher.weights.mindspore`). Invariants: the
files are of one save; every tensor is whole, from replicas where the file of a rank is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.weights.formats.safetensors import Header, read_header
from launcher.weights.note import Note, read_note
from launcher.weights.pieces import Piece, Pieces
from launcher.weights.source import HEADER_READERS, Source
from launcher.weights.threads import in_parallel

REDUNDANCY = "remove_redundancy"
"""Key of the metadata that says whether copies were left to other ranks."""
NAMED = 5
"""Ranks or tensors named in a message."""


def open_rank_files(path: Path, files: Sequence[Path]) -> Source:
    """The source made of one file a rank, of those that describe themselves.

    Raises `UserError` when a file does not describe itself, when two are of one rank, when the
    files are of different saves, or when ranks are missing whose parts no other rank holds.
    """
    headers = dict(zip(files, in_parallel(read_header, files, HEADER_READERS), strict=True))
    notes = {file: _note(file, header) for file, header in headers.items()}
    first = next(iter(notes))
    for file, note in notes.items():
        if (note.world_size, note.mesh) != (notes[first].world_size, notes[first].mesh):
            raise UserError(
                f"{path} mixes two saves: {first.name} is of {_layout_text(notes[first])}, "
                f"{file.name} of {_layout_text(note)}",
                rule="all ranks of a save have one layout",
                advice="Move the files of the other run away",
            )
    by_rank: dict[int, Path] = {}
    for file, note in notes.items():
        if note.rank in by_rank or note.rank >= note.world_size:
            raise UserError(
                f"{file} was written by rank {note.rank} of {note.world_size}",
                where=str(path),
                rule="one file a rank belongs to a save"
                + (f"; {by_rank[note.rank]} is of that rank too" * (note.rank in by_rank)),
                advice="Move the files of the other run away",
            )
        by_rank[note.rank] = file
    tensors: dict[str, list[Piece]] = {}
    for file, header in headers.items():
        for name, entry in header.entries.items():
            shape, box = notes[file].places[name]
            tensors.setdefault(name, []).append(Piece(file, entry, shape, box, notes[file].rank))
    note = notes[first]
    lost = sorted(set(range(note.world_size)) - set(by_rank))
    source = Source(
        "distributed", path, {name: Pieces(pieces) for name, pieces in tensors.items()}, headers,
        note.mesh, note.world_size,
        is_deduplicated=any(h.metadata.get(REDUNDANCY) == "True" for h in headers.values()),
    )  # fmt: skip
    check_whole(source, lost)
    return source if not lost else _without(source, lost)


def _note(file: Path, header: Header) -> Note:
    note = read_note(file, header)
    if note is None:
        raise UserError(
            f"{file} does not say which part of the model it holds",
            rule="rank files of MindSpore need the strategy files of the run that wrote them",
            advice="Set src_strategy_path_or_dir (--src_strategy_dirs) to the folder strategy/ of "
            "that run",
        )
    return note


def _layout_text(note: Note) -> str:
    axes = " x ".join(f"{axis} {size}" for axis, size in note.mesh.items() if size > 1)
    return f"{note.world_size} ranks ({axes or 'not cut'})"


def check_whole(source: Source, lost: Sequence[int] = ()) -> None:
    """Check that the pieces of every tensor agree and cover it. `lost`: ranks without a file.

    Raises `UserError` that names the tensors and, when ranks are lost, these.
    """
    holes = []
    for name, pieces in source.tensors.items():
        first = pieces[0]
        for piece in pieces:
            if (piece.shape, piece.entry.dtype) != (first.shape, first.entry.dtype):
                raise UserError(
                    f"`{name}` is {first.entry.dtype} {list(first.shape)} in {first.file}, "
                    f"{piece.entry.dtype} {list(piece.shape)} in {piece.file}",
                    where=str(source.path),
                    rule="all ranks of one save agree on it",
                    advice="Move the files of the other run away",
                )
        held = sum(box.numel for box in pieces.holders)
        if held != _numel(first) or not pieces.is_disjoint:
            holes.append(f"`{name}` ({held} of {_numel(first)} elements)")
    if not holes:
        return
    more = f" and {len(holes) - NAMED} more" * (len(holes) > NAMED)
    raise UserError(
        f"{source.path} does not hold all of {', '.join(holes[:NAMED])}{more}",
        rule=f"no other rank has what the lost {_ranks_text(lost)} held" if lost else
        "every element must be held exactly once (replicas apart)",
        advice="Copy the missing rank folders, or choose another checkpoint",
    )  # fmt: skip


def _numel(piece: Piece) -> int:
    return Box((0,) * len(piece.shape), piece.shape).numel


def _without(source: Source, lost: Sequence[int]) -> Source:
    is_one = len(lost) == 1
    remark = (
        f"{source.path}: {_ranks_text(lost)} {'has' if is_one else 'have'} no file; "
        f"{'its' if is_one else 'their'} parts are read from the ranks that hold the same"
    )
    return replace(source, remarks=(remark,))


def _ranks_text(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:NAMED])) + " ..." * (len(ranks) > NAMED)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
