"""What is on disk: the tensors of a checkpoint as boxes inside files.

Owns detection and complete weights (`ranks.distributed` owns rank files). A path holds complete
weights (one file, or several with an index), a single file, or the rank files of a distributed
save. Which of them is detected from names. A question of one process: no collectives, and only
headers are read. Invariant: every `Piece` lies inside its file, because its header was checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from launcher.errors import UserError
from launcher.layout.box import Shape, full_box
from launcher.weights.complete import (
    HEADER_THREADS,
    choose,
    is_weight_file,
    listed,
    may_be_left_out,
)
from launcher.weights.formats import header_of
from launcher.weights.formats.rank_metadata import Checksums
from launcher.weights.formats.safetensors import Header
from launcher.weights.forms import EXTRAS_NAME, INDEX_NAMES, form_of, is_scalar
from launcher.weights.gc_pause import gc_paused
from launcher.weights.pieces import Piece, Pieces, pieces_of
from launcher.weights.scales import DEFAULT_BLOCK, SUFFIX, block_in, factors_of
from launcher.weights.threads import in_parallel

Kind = Literal["complete", "single", "distributed", "nothing"]

SHOWN = 5
"""Names in a message."""
CHILDREN = 100
"""Subfolders that are searched for weights when a folder has none."""


class Written(NamedTuple):
    """How a tensor is declared in complete weights that are written from it."""

    shape: Shape
    """With as many elements, in the same order."""
    dtype: str | None = None
    """Dtype that it is cast to in any case; None: as the others."""


@dataclass(frozen=True)
class Source:
    """All tensors of one checkpoint, by their names in the files."""

    kind: Kind
    path: Path
    tensors: Mapping[str, Pieces]
    headers: Mapping[Path, Header]
    mesh: Mapping[str, int] | None = None
    """Axis sizes of the layout that wrote the files; None for complete weights, and for rank files
    that do not describe it."""
    world_size: int = 1
    scales: Mapping[str, str] = field(default_factory=dict)
    """FP8 weight to the tensor of its block scales."""
    scale_block: tuple[int, int] = DEFAULT_BLOCK
    """Rows and columns of a weight that share a scale."""
    checksums: Mapping[Path, Checksums] = field(default_factory=dict)
    """Of the files that have checksums."""
    is_deduplicated: bool = False
    """Whether replicas were left out when the rank files were written."""
    is_spread: bool = False
    """Whether its files are on several disks, so that some ranks cannot access some of them."""
    elsewhere: frozenset[Path] = frozenset()
    """Files that this rank cannot access."""
    remarks: tuple[str, ...] = ()
    """Lines for the log: files that were skipped, ranks without a file that are not needed."""
    extras: Mapping[str, Pieces] = field(default_factory=dict)
    """Numbers of the run beside the model: step, epoch, loss scale."""
    index: Path | None = None
    """Index by which the files of complete weights were found; None: found by their names."""
    promised: Mapping[str, Path] = field(default_factory=dict)
    """Heads and obsolete buffers that the index lists and no file holds, to the file it names. A
    model that ties or derives them does not need them."""

    written: Mapping[str, Written] = field(default_factory=dict)
    """Of tensors that complete weights declare in another way than they are here."""

    def shape(self, name: str) -> Shape:
        """Global shape of tensor `name`."""
        return self.tensors[name][0].shape

    def dtype(self, name: str) -> str:
        """Dtype of tensor `name` in the files."""
        return self.tensors[name][0].entry.dtype

    def renamed(self, names: Mapping[str, str]) -> Source:
        """The same tensors, renamed as `names` maps them."""
        if not names:
            return self
        tensors = {names.get(name, name): pieces for name, pieces in self.tensors.items()}
        scales = {names.get(name, name): names.get(f, f) for name, f in self.scales.items()}
        promised = {names.get(name, name): file for name, file in self.promised.items()}
        return replace(self, tensors=tensors, scales=scales, promised=promised)

    def with_extras(self) -> Source:
        """The same source, with the extras among the tensors."""
        if not self.extras:
            return self
        return replace(self, tensors={**self.tensors, **self.extras}, extras={})


def rank_of(folder: Path) -> int | None:
    """The rank in the name of a rank folder (`rank_0` or `rank0`); None for other folders."""
    match = re.fullmatch(r"rank_?(\d+)", folder.name)
    return None if match is None else int(match[1])


def is_rank_folder(folder: Path) -> bool:
    """Whether a folder is a rank folder, by its name."""
    return rank_of(folder) is not None


def detect(path: Path) -> Kind:
    """What `path` holds, by names alone: no file is opened. Raises `UserError` for a folder that
    cannot be listed."""
    if os.path.isfile(path):  # False, not an error, where access is denied
        return "distributed" if is_rank_folder(path.parent) else "single"
    if not os.path.isdir(path):
        return "nothing"
    children = listed(path)
    names = {child.name for child in children}
    is_complete = any(map(is_weight_file, names)) or not names.isdisjoint(INDEX_NAMES)
    ranks = [child for child in children if is_rank_folder(child) and child.is_dir()]
    if ranks and not (is_complete and not any(map(_holds_weights, ranks))):
        return "distributed"
    return "complete" if is_complete else "nothing"


def _holds_weights(folder: Path) -> bool:
    return any(is_weight_file(child.name) for child in listed(folder))


def holds_complete(folder: Path) -> bool:
    """Whether `folder` holds complete weights, whatever else it holds: what pretrained_model_dir
    means."""
    if not os.path.isdir(folder):
        return False
    names = {child.name for child in listed(folder)}
    return any(map(is_weight_file, names)) or not names.isdisjoint(INDEX_NAMES)


def weights_below(path: Path) -> str:
    """`did you mean `output/checkpoint`?` for a subfolder of `path` that holds weights; empty
    without one."""
    with suppress(UserError, OSError):
        children = [child for child in listed(path) if child.is_dir() and not is_rank_folder(child)]
        children += path.glob("snapshots/*/")  # the cache of the Hub
        for child in sorted(children, key=_newest_first)[:CHILDREN]:
            ranks = filter(is_rank_folder, listed(child))
            if holds_complete(child) or any(map(_holds_weights, ranks)):
                return f"did you mean `{child}`?"
    return ""


def no_weights(path: Path) -> UserError:
    """The error for a path where `detect` finds nothing."""
    return UserError(
        f"{path} holds no weights" if os.path.exists(path) else f"{path}: there is no such path",
        rule="weights are a file, a folder of complete weights, or folders rank_0/, rank_1/, ...",
        nearest=weights_below(path),
        advice="Give the folder of the weights, such as {output_dir}/checkpoint",
    )


def _newest_first(folder: Path) -> tuple[bool, bool, int]:
    """Sort key: `checkpoint`, then `checkpoint-20` before `checkpoint-10`, then all others."""
    match = re.fullmatch(r".*checkpoint-(\d+)", folder.name)
    return folder.name != "checkpoint", match is None, -int(match[1]) if match else 0


def check_all_ranks(path: Path) -> None:
    """Check that `path` is not a rank folder. Raises `UserError`."""
    if is_rank_folder(path) and os.path.isdir(path):
        raise UserError(
            f"{path} is the folder of one rank",
            rule="pass the parent directory",
            nearest=f"did you mean `{path.parent}`?",
        )


def check_one_kind(path: Path) -> None:
    """Check that `path` does not hold both complete weights and rank folders."""
    if os.path.isdir(path) and detect(path) == "distributed" and holds_complete(path):
        names = [child.name for child in listed(path)]
        ranks = [name for name in names if is_rank_folder(path / name)]
        complete = [name for name in names if is_weight_file(name) or name in INDEX_NAMES]
        raise UserError(
            f"{path} holds two sets of weights: {complete[0]} and {ranks[0]}/",
            rule="a folder holds either complete weights or rank folders",
            nearest=f"One of them is `{path / complete[0]}`" * (complete[0] not in INDEX_NAMES),
            advice="Name a file, or move one of them into another folder",
        )


@gc_paused()
def open_complete(path: Path) -> Source:
    """The source at `path`: one file, or a directory of complete weights. Raises `UserError`."""
    if not os.path.isdir(path):
        return _complete("single", path, {path: None})
    choice = choose(path)
    source = _complete("complete", path, choice.taken.files)
    remarks = choice.remarks + source.remarks
    return _with_extras(replace(source, remarks=remarks, index=choice.taken.index))


def _with_extras(source: Source) -> Source:
    """`source` with the numbers of the run that lie in a file of their own."""
    file = source.path / EXTRAS_NAME
    if file in source.headers or not os.path.isfile(file):
        return source
    header = header_of(file)
    extras = {name: _pieces(file, header, name) for name in _read_names(header)}
    return replace(
        source, headers={**source.headers, file: header}, extras={**source.extras, **extras}
    )


def _read_names(header: Header) -> Iterator[str]:
    """The tensors of a file, without buffers that its program saves and nothing reads."""
    transient = form_of(header.metadata).transient
    for name in header.entries:
        if not transient or not name.startswith(transient):
            yield name


def _complete(kind: Kind, path: Path, files: Mapping[Path, set[str] | None]) -> Source:
    tensors: dict[str, Pieces] = {}
    extras: dict[str, Pieces] = {}
    headers = dict(zip(files, in_parallel(header_of, files, HEADER_THREADS), strict=True))
    for file, header in headers.items():
        for name in _read_names(header):
            kept = extras if is_scalar(name, header.entries[name].shape) else tensors
            if name not in kept or _is_listed(name, file, kept[name][0].file, files):
                kept[name] = _pieces(file, header, name)
    factors = factors_of(tensors) if any(name.endswith(SUFFIX) for name in tensors) else {}
    block = block_in(path if path.is_dir() else path.parent) if factors else DEFAULT_BLOCK
    promised = {
        name: file for file, names in files.items() for name in names or ()
        if name not in tensors and name not in extras
    }  # fmt: skip
    check_promised(promised, lambda name: not may_be_left_out(name))
    return Source(kind, path, tensors, headers, scales=factors, scale_block=block, extras=extras,
                  promised=promised, remarks=text_remarks(headers))  # fmt: skip


def _is_listed(name: str, file: Path, other: Path, files: Mapping[Path, set[str] | None]) -> bool:
    """Of two files that hold tensor `name`, whether the index lists it in `file`, not in the other
    one. Raises `UserError` where it does not decide."""
    listed = [name in (files[one] or ()) for one in (file, other)]
    if listed[0] == listed[1]:
        raise UserError(
            f"`{name}` is in two files: {other.name} and {file.name}",
            where=str(file.parent),
            rule="complete weights hold each tensor once",
            advice="Move away the files that do not belong to this model",
        )
    return listed[0]


def _pieces(file: Path, header: Header, name: str) -> Pieces:
    if name in header.chunks:
        return Pieces(pieces_of(file, header, name))
    entry = header.entries[name]
    return Pieces([Piece(file, entry, entry.shape, full_box(entry.shape), 0)])


def text_remarks(headers: Mapping[Path, Header]) -> tuple[str, ...]:
    """Lines about the texts that lie among the tensors of files; they are not loaded."""
    return tuple(
        f"{file}: left out, texts and no tensors: {', '.join(list(header.texts)[:SHOWN])}"
        + " ..." * (len(header.texts) > SHOWN)
        for file, header in headers.items() if header.texts
    )  # fmt: skip


def check_promised(promised: Mapping[str, Path], needed: Callable[[str], bool]) -> None:
    """Check that files hold the tensors that their index lists, as far as they are `needed`. Raises
    `UserError` that names a file and a tensor."""
    for name, file in sorted(promised.items(), key=lambda item: (item[1], item[0])):
        if needed(name):
            raise UserError(
                f"{file} lacks `{name}`",
                rule="the index beside it lists it there",
                advice="Copy both again from their origin",
            )
