"""Rank files: the source made of one file for each rank.

Owns what a folder of rank files must be. The layout is in the metadata of the files. Invariants:
the files are of one save; every tensor is complete, from replicas where the file of a rank is
missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.layout.mesh import layout_text
from launcher.weights.formats import rank_header_of
from launcher.weights.formats.rank_metadata import (
    REDUNDANCY,
    RankFileMetadata,
    inventory_of,
    read_rank_metadata,
)
from launcher.weights.formats.safetensors import Header
from launcher.weights.forms import is_scalar
from launcher.weights.pieces import Piece, Pieces, pieces_of
from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.source import HEADER_THREADS, Source
from launcher.weights.threads import in_parallel

NAMED = 5
"""Ranks or tensors named in a message."""
COMPARED_BYTES = 1 << 20
"""Bytes of each rank file that are compared with the files of other ranks."""


def open_rank_files(
    path: Path, files: Sequence[Path], known: Mapping[Path, Header] | None = None
) -> Source:
    """The source made of rank files that describe their layout.

    `known`: headers of files that cannot be read here. Raises `UserError` when a file does not
    describe its layout, when two are of one rank, when the files are of different saves, or when
    ranks are missing whose parts no other rank holds.
    """
    if not files:
        raise UserError(
            f"{path} holds no rank files", rule="*.safetensors or *.ckpt in rank_*/ is expected"
        )
    read = dict(known or {})
    unread = [file for file in files if file not in read]
    read |= zip(unread, in_parallel(rank_header_of, unread, HEADER_THREADS), strict=True)
    headers = {file: read[file] for file in files}
    metadata = {file: _rank_metadata(file, header) for file, header in headers.items()}
    first = next(iter(metadata))
    for file, rank_metadata in metadata.items():
        if (rank_metadata.world_size, rank_metadata.mesh) != (
            metadata[first].world_size,
            metadata[first].mesh,
        ):
            raise UserError(
                f"{path} mixes two saves: {first.name} is of {_layout_of(metadata[first])}, "
                f"{file.name} of {_layout_of(rank_metadata)}",
                rule="all ranks of a save have one layout",
                advice="Move the files of the other run away",
            )
    by_rank: dict[int, Path] = {}
    for file, rank_metadata in metadata.items():
        twin = by_rank.get(rank_metadata.rank)
        if twin is not None or rank_metadata.rank >= rank_metadata.world_size:
            raise UserError(
                f"{file} was written by rank {rank_metadata.rank} of {rank_metadata.world_size}",
                where=str(path),
                rule="a save has one file for each rank"
                + (f"; {twin} is of that rank too" if twin is not None else ""),
                advice="Move the files of the other run away",
            )
        by_rank[rank_metadata.rank] = file
    tensors: dict[str, list[Piece]] = {}
    extras: dict[str, Pieces] = {}
    for file, header in headers.items():
        for name, place in metadata[file].places.items():
            pieces = pieces_of(file, header, name, place, metadata[file].rank)
            if is_scalar(name, place[0]):
                extras.setdefault(name, Pieces(pieces))
            else:
                tensors.setdefault(name, []).extend(pieces)
    rank_metadata = metadata[first]
    absent = (rank for rank in range(rank_metadata.world_size) if rank not in by_rank)
    lost = list(itertools.islice(absent, NAMED + 1))
    source = Source(
        "distributed",
        path,
        {name: Pieces(pieces) for name, pieces in tensors.items()},
        headers,
        rank_metadata.mesh,
        rank_metadata.world_size,
        checksums={
            file: found.checksums for file, found in metadata.items() if found.checksums.values
        },
        is_deduplicated=any(h.metadata.get(REDUNDANCY) == "True" for h in headers.values()),
        extras=extras,
    )
    check_complete(source, lost)
    if not lost:
        return source
    _check_inventory(source, rank_metadata, lost)
    return without(source, lost)


OpenFiles = Callable[[Path, Sequence[Path]], Source]
"""(folder of the rank folders, rank files of one save) -> their source."""


def slipway_opener(directory: Path, strategy: Path | None, log: Callable[[str], None]) -> OpenFiles:
    """`open_rank_files`, which needs no strategy files."""
    return open_rank_files


def _check_inventory(source: Source, rank_metadata: RankFileMetadata, lost: Sequence[int]) -> None:
    """Check that no tensor was only in the files of the `lost` ranks.

    Without an inventory this is not known; then every rank must have held a part of every tensor.
    """
    if rank_metadata.inventory is None:
        gone = source.is_deduplicated or rank_metadata.mesh.get("pp", 1) > 1
        what = "may lack tensors"
    else:
        gone = (
            inventory_of({name: source.shape(name) for name in source.tensors})
            != rank_metadata.inventory
        )
        what = f"holds {len(source.tensors)} of {rank_metadata.inventory.tensors} tensors"
    if gone:
        raise UserError(
            f"{source.path} {what}",
            rule=_without_files(source, lost),
            advice="Copy the missing rank folders, or choose another checkpoint",
        )


def _rank_metadata(file: Path, header: Header) -> RankFileMetadata:
    rank_metadata = read_rank_metadata(file, header)
    if rank_metadata is None:
        raise UserError(
            f"{file} does not describe its layout",
            rule="rank files have the layout in their metadata, as Slipway writes it",
            advice="Move the files of other programs away",
        )
    return rank_metadata


def _layout_of(rank_metadata: RankFileMetadata) -> str:
    return layout_text(rank_metadata.world_size, rank_metadata.mesh)


def check_complete(source: Source, lost: Sequence[int] = ()) -> None:
    """Check that the pieces of every tensor match and cover it. `lost`: ranks without a file.

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
                    rule="shape and dtype of a tensor are the same on all ranks of a save",
                    advice="Move the files of the other run away",
                )
        held = sum(box.numel for box in pieces.replica_ranks)
        if held != _numel(first) or not pieces.is_disjoint:
            holes.append(f"`{name}` ({held} of {_numel(first)} elements)")
    if not holes:
        return
    more = f" and {len(holes) - NAMED} more" * (len(holes) > NAMED)
    raise UserError(
        f"{source.path} does not hold all of {', '.join(holes[:NAMED])}{more}",
        rule=_without_files(source, lost) if lost else
        "every element must be held exactly once (replicas apart)",
        advice="Copy the missing rank folders, or choose another checkpoint",
    )  # fmt: skip


def _without_files(source: Source, ranks: Sequence[int]) -> str:
    """Why a save cannot be used; it names the folder, as another machine may have the files."""
    has, their = ("has", "its") if len(ranks) == 1 else ("have", "their")
    return (
        f"{_ranks_text(ranks)} {has} no valid file in {source.path}, and no other rank holds "
        f"{their} parts"
    )


def _numel(piece: Piece) -> int:
    return Box((0,) * len(piece.shape), piece.shape).numel


def without(source: Source, lost: Sequence[int]) -> Source:
    """`source` with the remark that the `lost` ranks have no valid file."""
    is_one = len(lost) == 1
    remark = (
        f"{source.path}: {_ranks_text(lost)} {'has' if is_one else 'have'} no valid file; "
        f"{'its' if is_one else 'their'} parts are read from the ranks that hold the same"
    )
    return replace(source, remarks=(remark, *source.remarks))


def _ranks_text(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:NAMED])) + " ..." * (len(ranks) > NAMED)
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def check_copies(source: Source) -> None:
    """Check that rank files without a manifest are of one step of one run: replicas must be equal.

    The smallest replicas are compared, at most `COMPARED_BYTES` of each file. A save without
    replicas, such as a de-duplicated one, passes. Raises `UserError` that names two files and the
    tensor in which they differ.
    """
    compared = _small_copies(source)
    by_file: dict[Path, list[Piece]] = {}
    for piece in itertools.chain(*compared.values()):
        by_file.setdefault(piece.file, []).append(piece)
    digests: dict[Piece, str] = {}
    for found in in_parallel(lambda f: _digests(by_file[f], source), by_file, HEADER_THREADS):
        digests |= found
    for (name, _), (first, *others) in compared.items():
        for piece in others:
            if digests[piece] != digests[first]:
                raise UserError(
                    f"`{name}` differs in {first.file} and {piece.file}",
                    rule="replicas of one save are equal: these files are of two runs or steps",
                    advice="Move the files of the other run away",
                )


def _small_copies(source: Source) -> dict[tuple[str, Box], list[Piece]]:
    """(tensor, box) to its replicas, where there are several; smallest first, up to
    `COMPARED_BYTES` of each file."""
    copies = {
        (name, box): replica_ranks
        for name, pieces in source.tensors.items()
        for box, replica_ranks in pieces.replica_ranks.items()
        if len(replica_ranks) > 1
    }
    left = dict.fromkeys(source.headers, COMPARED_BYTES)
    chosen = {}
    for name, box in sorted(copies, key=lambda key: (key[1].numel, key[0], key[1].offset)):
        replica_ranks = copies[name, box]
        size = replica_ranks[0].entry.stop - replica_ranks[0].entry.start
        if all(left[piece.file] >= size for piece in replica_ranks):
            chosen[name, box] = replica_ranks
            left |= {piece.file: left[piece.file] - size for piece in replica_ranks}
    return chosen


def _digests(pieces: Sequence[Piece], source: Source) -> dict[Piece, str]:
    """The checksum of each of the pieces, which are in one file."""
    file = pieces[0].file
    header = source.headers[file]
    result = {}
    with Files() as files:
        descriptor = files.descriptor(file, header.file_bytes, header.modified)
        for piece in pieces:
            memory = np.empty(piece.entry.stop - piece.entry.start, np.uint8)
            read_exactly(descriptor, file, memory.data, piece.entry.start)
            result[piece] = xxhash.xxh3_128_hexdigest(memory.data)
    return result
