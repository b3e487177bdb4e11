"""What is on disk: the tensors of a checkpoint as boxes inside files.

Owns detection and complete weights (`distributed` has rank files). A path holds complete weights
(of Hugging Face or MindSpore: one file, or several with an index), a single file, or the rank files
of a distributed save; which of them is read off the files, never asked. Reads headers only.
Invariant: every `Piece` lies inside its file, as its header was checked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from launcher.errors import UserError
from launcher.layout.box import Shape, whole
from launcher.weights.formats import header_of
from launcher.weights.formats.note import Checksums
from launcher.weights.formats.safetensors import Header, parse_json
from launcher.weights.garbage import none_collected
from launcher.weights.pieces import Piece, Pieces
from launcher.weights.scales import DEFAULT_BLOCK, block_in, factors_of
from launcher.weights.threads import in_parallel

Kind = Literal["complete", "single", "distributed", "nothing"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
MINDSPORE_INDEX_NAME = "param_name_map.json"
MINDSPORE_EXTRAS = "hyper_param.safetensors"
"""Beside MindSpore's complete weights: step, epoch and whatever else was not cut."""
INDEX_NAMES = (INDEX_NAME, MINDSPORE_INDEX_NAME, TORCH_INDEX_NAME)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Extensions of files of weights, the format to be read by preference first."""
_NO_WEIGHTS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "rng_state.pth",
)
"""Files of torch beside weights that have none in them."""
OPTIMIZER_PREFIXES = ("adam_m.", "adam_v.")
GRADIENTS = "accu_grads"
"""Begins the names of gradients under way, which MindSpore saves and nothing reads again."""
LARGEST_INDEX = 1 << 28
HEADER_READERS = 8


@dataclass(frozen=True)
class Source:
    """All tensors of one checkpoint: name in the files to the pieces that make it up."""

    kind: Kind
    path: Path
    tensors: Mapping[str, Pieces]
    headers: Mapping[Path, Header]
    mesh: Mapping[str, int] | None = None
    """Axis sizes of the layout the files were written in; None for complete weights, and where the
    files do not say."""
    world_size: int = 1
    scales: Mapping[str, str] = field(default_factory=dict)
    """A weight in 8 bits to the tensor of the factors that its blocks are multiplied by."""
    scale_block: tuple[int, int] = DEFAULT_BLOCK
    """Rows and columns of a weight that share a factor."""
    checksums: Mapping[Path, Checksums] = field(default_factory=dict)
    """Of the files that have some."""
    is_deduplicated: bool = False
    """Whether copies were left out when the rank files were written."""
    is_spread: bool = False
    """Whether its files lie on several disks, so that some ranks do not see some of them."""
    elsewhere: frozenset[Path] = frozenset()
    """Those that this rank does not see."""
    remarks: tuple[str, ...] = ()
    """What a user should hear about the files: ranks that are lost and not needed."""
    extras: Mapping[str, Pieces] = field(default_factory=dict)
    """What stands in files of MindSpore beside the model: step, epoch, loss scale. Whole."""

    def shape(self, name: str) -> Shape:
        """Global shape of tensor `name`."""
        return self.tensors[name][0].shape

    def dtype(self, name: str) -> str:
        """Dtype of tensor `name` in the files."""
        return self.tensors[name][0].entry.dtype

    def renamed(self, names: Mapping[str, str]) -> Source:
        """The same tensors, those in `names` under the other name given there."""
        tensors = {names.get(name, name): pieces for name, pieces in self.tensors.items()}
        scales = {names.get(name, name): names.get(f, f) for name, f in self.scales.items()}
        return replace(self, tensors=tensors, scales=scales)

    def with_extras(self) -> Source:
        """The same source, with the extras among the tensors."""
        return replace(self, tensors={**self.tensors, **self.extras}, extras={})


def rank_of(folder: Path) -> int | None:
    """The rank whose folder it is, by its name: `rank_0`, `rank_1`, ...; None for others."""
    match = re.fullmatch(r"rank_(\d+)", folder.name)
    return None if match is None else int(match[1])


def is_rank_folder(folder: Path) -> bool:
    """Whether a folder is that of one rank, by its name."""
    return rank_of(folder) is not None


def detect(path: Path) -> Kind:
    """What `path` holds, from names alone: no file is opened. Raises `UserError` for a folder that
    cannot be listed."""
    if os.path.isfile(path):  # where the question itself is refused, the answer is no
        return "distributed" if is_rank_folder(path.parent) else "single"
    if not os.path.isdir(path):
        return "nothing"
    children = listed(path)
    names = {child.name for child in children}
    if any(is_rank_folder(child) and child.is_dir() for child in children):
        return "distributed"
    return "complete" if _weight_files(names) or names & {*INDEX_NAMES} else "nothing"


def listed(folder: Path) -> list[Path]:
    """What is in `folder`, by name. Raises `UserError` when it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed: {error.strerror}", advice="Check the rights of the folder"
        ) from error


def _weight_files(names: Collection[str]) -> list[str]:
    """The files of weights among `names`: of one extension, the preferred one; hidden ones are
    other programs' or unfinished."""
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(
            name for name in names
            if name.endswith(suffix) and name not in _NO_WEIGHTS and not name.startswith(".")
        )  # fmt: skip
        if files:
            return files
    return []


def first_weight_file(folder: Path) -> Path | None:
    """One of the files of complete weights in `folder`; None without any."""
    files = _weight_files({child.name for child in listed(folder)})
    return folder / files[0] if files else None


@none_collected()
def open_complete(path: Path) -> Source:
    """The source at `path`: one file, or a directory of complete weights. Raises `UserError`."""
    if not os.path.isdir(path):
        return _complete("single", path, {path: None})
    files, may_have_extras = complete_files(path)
    return _with_extras(_complete("complete", path, files), may_have_extras)


def complete_files(path: Path) -> tuple[dict[Path, set[str] | None], bool]:
    """The files that complete weights in the directory `path` are read from, each with the tensors
    it should hold (None: nobody says), and whether MindSpore's extras may stand beside them.
    Raises `UserError`. No file of weights is opened."""
    for name in INDEX_NAMES:
        if name == TORCH_INDEX_NAME and os.path.isfile(path / SINGLE_NAME):
            continue  # both forms of one model: safetensors come first
        if os.path.isfile(path / name):
            return _index_files(path / name), name == MINDSPORE_INDEX_NAME
    names = [child.name for child in listed(path)]
    files_found = _weight_files(names)
    models = [name for name in files_found if name.startswith(("model", "pytorch_model"))]
    if not files_found:
        raise UserError(
            f"{path} holds no weights",
            rule="complete weights are *.safetensors, or files of torch (*.bin, *.pt, *.ckpt)",
            advice=f"It holds: {', '.join(names[:8]) + ' ...' * (len(names) > 8) or 'nothing'}",
        )
    parts = [name for name in models or files_found if name != MINDSPORE_EXTRAS]
    may_have_extras = MINDSPORE_EXTRAS in files_found and bool(parts)
    return {path / name: None for name in parts or files_found}, may_have_extras


def _with_extras(source: Source, may_have_extras: bool) -> Source:
    """`source` with what MindSpore put beside its complete weights."""
    file = source.path / MINDSPORE_EXTRAS
    if not may_have_extras or file in source.headers or not os.path.isfile(file):
        return source
    found = _complete("single", file, {file: None})
    extras = {n: p for n, p in found.tensors.items() if not n.startswith(GRADIENTS)}
    return replace(source, headers={**source.headers, **found.headers}, extras=extras)


def _index_files(index: Path) -> dict[Path, set[str] | None]:
    """The files an index names, each with the tensors it should hold."""
    content = read_index(index)
    names: dict[str, set[str]] = {}
    for name, file in content.items():
        names.setdefault(file, set()).add(name)
    by_file: dict[Path, set[str] | None] = {index.parent / file: names[file] for file in names}
    missing = sorted(file.name for file in by_file if not os.path.isfile(file))
    if missing:
        raise UserError(
            f"{index} names {_count(len(missing), 'file')} that cannot be found: "
            f"{', '.join(missing[:5])}",
            rule="all files of an index lie beside it",
            advice="Copy the missing files beside the index",
        )
    return by_file


def read_index(index: Path) -> dict[str, str]:
    """Tensor to file name, as an index of Hugging Face, torch or MindSpore says."""
    try:
        if index.stat().st_size > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX >> 20} MiB")
        content: Any = parse_json(index.read_bytes().decode())
        if index.name == MINDSPORE_INDEX_NAME and "weight_map" not in content:
            content = {"weight_map": content}  # MindSpore also reads a flat map
        weight_map = content["weight_map"]
        named = set[str]()
        for name, file in weight_map.items():
            if not isinstance(file, str) or not (file in named or _is_file_name(file)):
                raise ValueError(f"`{name}` is in {file!r}, which is no name of a file beside it")
            named.add(file)
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error)[:300] if isinstance(error, ValueError) else type(error).__name__
        raise UserError(
            f"{index} is not an index of weights",
            rule=f"it needs a map named `weight_map` from tensor to file ({why})",
            advice="Copy it again from its origin",
        ) from error
    return dict(weight_map)


def _is_file_name(name: str) -> bool:
    return Path(name).name == name not in ("", "..") and len(name.encode()) < 256


def _complete(kind: Kind, path: Path, files: Mapping[Path, set[str] | None]) -> Source:
    tensors: dict[str, Pieces] = {}
    headers = dict(zip(files, in_parallel(header_of, files, HEADER_READERS), strict=True))
    for file, expected in files.items():
        absent = sorted((expected or set()) - set(headers[file].entries))
        if absent:
            raise UserError(
                f"{file} lacks `{absent[0]}`",
                rule="the index beside it says that it is there",
                advice="Copy both again from their origin",
            )
        for name, entry in headers[file].entries.items():
            if name in tensors:
                raise UserError(
                    f"`{name}` stands in two files: {tensors[name][0].file.name} and {file.name}",
                    where=str(path),
                    rule="complete weights hold each tensor once",
                    advice="Move away the files that do not belong to this model",
                )
            tensors[name] = Pieces([Piece(file, entry, entry.shape, whole(entry.shape), 0)])
    factors = factors_of(tensors)
    block = block_in(path if path.is_dir() else path.parent) if factors else DEFAULT_BLOCK
    return Source(kind, path, tensors, headers, scales=factors, scale_block=block)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
