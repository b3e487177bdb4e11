"""Complete weights from any source: a directory that transformers opens, or MindSpore's form.

Owns how tensors are shared out over files, and the index beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import UserError
from launcher.layout.box import whole
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.source import (
    INDEX_NAME,
    MINDSPORE_INDEX_NAME,
    OPTIMIZER_PREFIXES,
    Source,
)
from launcher.weights.stream import Output, Progress, stream

DEFAULT_SHARD_BYTES = 5_000_000_000
Format = Literal["huggingface", "mindspore"]


@dataclass(frozen=True)
class Exported:
    """What a complete export wrote."""

    tensors: int
    total_bytes: int
    files: tuple[str, ...]


def write_complete(
    source: Source,
    directory: Path,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    form: Format = "huggingface",
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> Exported:
    """Write the tensors of `source` whose name passes `keep` as complete weights.

    Model weights become `model-0000x-of-0000y.safetensors` with an index; optimizer state becomes
    `optimizer-0000x-of-0000y.safetensors`, outside the index of Hugging Face. `directory` exists
    and is ours. `share` = (k, n) writes every n-th file, from the k-th on, so that n processes
    write a directory together; the first also writes the index.
    """
    names = sorted(name for name in source.tensors if keep(name))
    model = [name for name in names if not name.startswith(OPTIMIZER_PREFIXES)]
    optimizer = [name for name in names if name.startswith(OPTIMIZER_PREFIXES)]
    if not names:
        raise UserError(
            f"nothing of {source.path} is left to write",
            rule="every tensor was filtered out",
            advice="Give another prefix to --filter_out_param_prefix",
        )
    outputs, weight_map = [], dict[str, str]()
    metadata = {"format": "ms" if form == "mindspore" else "pt"}
    for stem, group in (("model", model), ("optimizer", optimizer)):
        shards = _shards(source, group, max_shard_bytes)
        for index, shard in enumerate(shards, 1):
            file = f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
            boxes = {name: (name, whole(source.shape(name))) for name in shard}
            outputs.append(Output(directory / file, boxes, metadata))
            if stem == "model" or form == "mindspore":
                weight_map |= dict.fromkeys(shard, file)
    first, step = share
    stream(source, outputs[first::step], progress)
    if weight_map and first == 0:
        total = sum(_nbytes(source, name) for name in weight_map)
        _write_index(directory, form, weight_map, total)
    return Exported(
        len(names),
        sum(_nbytes(source, name) for name in names),
        tuple(output.path.name for output in outputs),
    )


def _write_index(directory: Path, form: Format, weight_map: Mapping[str, str], total: int) -> None:
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    name, indent = (MINDSPORE_INDEX_NAME, 4) if form == "mindspore" else (INDEX_NAME, 2)
    (directory / name).write_text(json.dumps(content, indent=indent) + "\n")


def _nbytes(source: Source, name: str) -> int:
    return math.prod(source.shape(name)) * ITEM_BYTES[source.dtype(name)]


def _shards(source: Source, names: Sequence[str], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes (one tensor at least)."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = _nbytes(source, name)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
