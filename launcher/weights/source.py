"""What is on disk: the tensors of a checkpoint as boxes inside files.

Owns detection and complete weights (`distributed` has rank files). A path holds complete weights
(of Hugging Face or MindSpore: one file, or several with an index), a single file, or the rank files
of a distributed save; which of them is read off the files, never asked. Reads headers only.
Invariant: every `Piece` lies inside its file, as its header was checked.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.errors import UserError
from launcher.layout.box import Shape, whole
from launcher.weights.formats import header_of
from launcher.weights.formats.safetensors import Header
from launcher.weights.pieces import Piece, Pieces
from launcher.weights.threads import in_parallel

Kind = Literal["complete", "single", "distributed", "nothing"]

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
    scale_block: tuple[int, int] = (128, 128)
    """Rows and columns of a weight that share a factor."""
    is_deduplicated: bool = False
    """Whether copies were left out when the rank files were written."""
    remarks: tuple[str, ...] = ()
    """What a user should hear about the files: ranks that are lost and not needed."""

    def shape(self, name: str) -> Shape:
        """Global shape of tensor `name`."""
        return self.tensors[name][0].shape

    def dtype(self, name: str) -> str:
        """Dtype of tensor `name` in the files."""
        return self.tensors[name][0].entry.dtype


def detect(path: Path) -> Kind:
    """What `path` holds, from names alone: no file is opened. Raises `UserError` for a folder that
    cannot be listed."""
    if path.is_file():
        return "distributed" if path.parent.name.startswith("rank_") else "single"
    if not path.is_dir():
        return "nothing"
    names = {child.name for child in listed(path)}
    if any(name.startswith("rank_") for name in names):
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
    """The files of weights among `names`: of one extension, the preferred one."""
    for suffix in WEIGHT_SUFFIXES:
        files = sorted(name for name in names if name.endswith(suffix) and name not in _NO_WEIGHTS)
        if files:
            return files
    return []


def open_complete(path: Path) -> Source:
    """The source at `path`: one file, or a directory of complete weights. Raises `UserError`."""
    if path.is_file():
        return _complete("single", path, {path: None})
    for name in INDEX_NAMES:
        if (path / name).is_file():
            files = _index_files(path / name)
            extras = path / MINDSPORE_EXTRAS
            if name == MINDSPORE_INDEX_NAME and extras.is_file():
                files[extras] = None
            return _complete("complete", path, files)
    names = [child.name for child in listed(path)]
    files_found = _weight_files(names)
    models = [name for name in files_found if name.startswith(("model", "pytorch_model"))]
    if not files_found:
        raise UserError(
            f"{path} holds no weights",
            rule="complete weights are *.safetensors, or files of torch (*.bin, *.pt, *.ckpt)",
            advice=f"It holds: {', '.join(names[:8]) + ' ...' * (len(names) > 8) or 'nothing'}",
        )
    return _complete("complete", path, {path / name: None for name in models or files_found})


def _index_files(index: Path) -> dict[Path, set[str] | None]:
    """The files an index names, each with the tensors it should hold."""
    content = read_index(index)
    by_file: dict[Path, set[str] | None] = {}
    for name, file in content.items():
        names = by_file.setdefault(index.parent / file, set())
        assert names is not None
        names.add(name)
    missing = sorted(file.name for file in by_file if not file.is_file())
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
        content: Any = json.loads(index.read_bytes())
        if index.name == MINDSPORE_INDEX_NAME and "weight_map" not in content:
            content = {"weight_map": content}  # MindSpore also reads a flat map
        weight_map = content["weight_map"]
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"`{name}` is in {file!r}, which is no name of a file beside it")
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise UserError(
            f"{index} is not an index of weights",
            rule=f"it needs a map named `weight_map` from tensor to file ({why})",
            advice="Copy it again from its origin",
        ) from error
    return dict(weight_map)


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
    scales = _scales(tensors)
    block = _scale_block(path if path.is_dir() else path.parent) if scales else (128, 128)
    return Source(kind, path, tensors, headers, scales=scales, scale_block=block)


def _scales(tensors: Mapping[str, Pieces]) -> dict[str, str]:
    """Weights in 8 bits and the tensors of their factors: `x.weight`, `x.weight_scale_inv`."""
    return {
        name: f"{name}_scale_inv"
        for name, pieces in tensors.items()
        if f"{name}_scale_inv" in tensors and pieces[0].entry.dtype.startswith("F8_")
    }


def _scale_block(folder: Path) -> tuple[int, int]:
    """`quantization_config.weight_block_size` of the config.json in `folder`; 128 x 128 where there
    is none. Raises `UserError` for another way to quantise."""
    config = folder / "config.json"
    if not config.is_file():
        return 128, 128
    try:
        content = json.loads(config.read_bytes())["quantization_config"]
        method, block = content["quant_method"], content.get("weight_block_size", [128, 128])
        rows, columns = block
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{config}: quantization_config cannot be read ({type(error).__name__})",
            rule="weights in 8 bits need quant_method and weight_block_size",
            advice="Copy config.json from the origin of the weights",
        ) from error
    if method != "fp8" or not all(type(n) is int and n > 0 for n in (rows, columns)):
        raise UserError(
            f"{config}: quant_method {method!r}, weight_block_size {block!r}",
            rule="weights in 8 bits are read where blocks of them share a factor",
            nearest="Possible: quant_method fp8, weight_block_size [128, 128]",
            advice="Give weights that are not quantised",
        )
    return rows, columns


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
