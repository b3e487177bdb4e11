"""What is on disk: the tensors of a checkpoint as boxes inside files.

Owns detection. A path holds complete Hugging Face weights (one file, or shards with an index), a
single file, or the rank files of a distributed save; which one is read off the files, never asked.
Reads headers only. Invariant: every `Piece` lies inside its file, as its header was checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import Problem, UserError
from launcher.layout.box import Box, Shape, whole
from launcher.weights.formats.safetensors import Entry, Header, read_header

Kind = Literal["complete", "single", "distributed", "nothing"]

INDEX_NAME = "model.safetensors.index.json"
_NOTE_KEYS = {"world_size", "rank", "mesh", "tensors"}
OPTIMIZER_PREFIXES = ("adam_m.", "adam_v.")


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a global tensor and the file entry that holds it."""

    file: Path
    entry: Entry
    shape: Shape
    box: Box
    rank: int


@dataclass(frozen=True)
class Source:
    """All tensors of one checkpoint: global name to the pieces that make it up."""

    kind: Kind
    path: Path
    tensors: dict[str, tuple[Piece, ...]]
    headers: dict[Path, Header]
    mesh: dict[str, int] | None = None
    """Axis sizes of the layout the files were written in; None for complete weights."""
    world_size: int = 1

    def shape(self, name: str) -> Shape:
        """Global shape of tensor `name`."""
        return self.tensors[name][0].shape


def detect(path: Path) -> Kind:
    """What `path` holds, from names alone: no file is opened."""
    if path.is_file():
        return "distributed" if path.parent.name.startswith("rank_") else "single"
    if not path.is_dir():
        return "nothing"
    if any(child.name.startswith("rank_") for child in path.iterdir()):
        return "distributed"
    return "complete" if any(path.glob("*.safetensors")) else "nothing"


def open_complete(path: Path) -> Source:
    """The source at `path`: one safetensors file or a directory of complete weights."""
    if path.is_file():
        return _complete("single", path, {path: None})
    index = path / INDEX_NAME
    if index.is_file():
        return _complete("complete", path, _index_files(index))
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{path} holds no weights",
            rule="a directory of complete weights has *.safetensors files",
            advice=f"It holds: {_listing(path)}",
        )
    return _complete("complete", path, dict.fromkeys(files))


def _index_files(index: Path) -> dict[Path, set[str] | None]:
    try:
        weight_map: Any = json.loads(index.read_text())["weight_map"]
        by_file: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            names = by_file.setdefault(index.parent / Path(file).name, set())
            assert names is not None
            names.add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a weight index", rule=f"it needs a map named `weight_map` "
                        f"from tensor to file ({type(error).__name__})") from error  # fmt: skip
    missing = sorted(str(file.name) for file in by_file if not file.is_file())
    if missing:
        raise UserError(
            f"{index} names {len(missing)} files that are not there: {', '.join(missing[:5])}",
            advice="Copy the missing files beside the index",
        )
    return by_file


def _complete(kind: Kind, path: Path, files: dict[Path, set[str] | None]) -> Source:
    tensors: dict[str, tuple[Piece, ...]] = {}
    headers = {}
    for file, expected in files.items():
        header = headers[file] = read_header(file)
        absent = sorted((expected or set()) - set(header.entries))
        if absent:
            raise UserError(f"{file} lacks `{absent[0]}`", rule=f"{INDEX_NAME} says it is there")
        for name, entry in header.entries.items():
            if name in tensors:
                raise UserError(
                    f"`{name}` stands in two files: {tensors[name][0].file.name} and {file.name}",
                    where=str(path),
                    rule="complete weights hold each tensor once",
                )
            tensors[name] = (Piece(file, entry, entry.shape, whole(entry.shape), 0),)
    return Source(kind, path, tensors, headers)


def open_rank_files(path: Path, files: Sequence[Path]) -> Source:
    """The source made of one file a rank. Layout comes from the headers, no side file is needed.

    Raises `UserError` when a file does not describe itself, when ranks are missing or doubled, or
    when the files are of different runs.
    """
    headers = {file: read_header(file) for file in files}
    notes = {file: _layout_note(file, header) for file, header in headers.items()}
    worlds = {(note["world_size"], json.dumps(note["mesh"])) for note in notes.values()}
    if len(worlds) > 1:
        raise UserError(f"{path} mixes rank files of different layouts: {sorted(worlds)}")
    world_size = next(iter(worlds))[0]
    ranks = sorted(note["rank"] for note in notes.values())
    if ranks != list(range(world_size)):
        absent = sorted(set(range(world_size)) - set(ranks))
        raise UserError(
            f"{path} holds rank files {ranks}",
            rule=f"they were written by {world_size} ranks; missing: {absent}",
            advice="Copy the missing rank folders, or choose another checkpoint",
        )
    tensors: dict[str, list[Piece]] = {}
    for file, header in headers.items():
        note = notes[file]
        for name, entry in header.entries.items():
            tensors.setdefault(name, []).append(_piece(file, name, entry, note))
    mesh = next(iter(notes.values()))["mesh"]
    frozen = {name: _same_shape(path, name, pieces) for name, pieces in tensors.items()}
    return Source("distributed", path, frozen, headers, mesh, world_size)


def _layout_note(file: Path, header: Header) -> dict[str, Any]:
    try:
        note = header.slipway()
        whole_note = note is None or note.keys() >= _NOTE_KEYS
    except (ValueError, AttributeError):
        whole_note = False
    if not whole_note:
        raise UserError(f"{file} is damaged", rule="its `slipway` metadata cannot be read",
                        advice="Choose another checkpoint")  # fmt: skip
    if note is None:
        raise UserError(
            f"{file} does not say which part of the model it holds",
            rule="rank files of other programs need a strategy file, which is not built yet",
            advice="Give complete weights, or rank files written by this launcher",
        )
    return note


def _piece(file: Path, name: str, entry: Entry, note: dict[str, Any]) -> Piece:
    place = note["tensors"].get(name)
    if place is None or len(place["boxes"]) != 1:
        raise UserError(f"{file} does not describe `{name}`", rule="one box a tensor is expected")
    offset, size = (tuple(part) for part in place["boxes"][0])
    if size != entry.shape:
        raise UserError(f"{file}: `{name}` has shape {entry.shape}, its box says {size}")
    return Piece(file, entry, tuple(place["shape"]), Box(offset, size), note["rank"])


def _same_shape(path: Path, name: str, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    pieces = tuple(pieces)
    shapes = {piece.shape for piece in pieces}
    if len(shapes) > 1:
        raise UserError([Problem(where=str(path), what=f"`{name}` has the shapes {sorted(shapes)}",
                                 rule="all ranks of one save agree on it")])  # fmt: skip
    return pieces


def _listing(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir())
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") if names else "nothing"
