"""Complete weights from any source: a directory that transformers opens, or another form.

Owns how tensors are distributed over files, and the index beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError
from launcher.extensions import SAVE_FORMATS, required
from launcher.layout.box import full_box
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.forms import EXTRAS_NAME, CompleteForm
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.source import Source
from launcher.weights.streaming.cast import CASTS
from launcher.weights.streaming.stream import WORKERS, Edit, Output, Progress, stream

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    tensors: int
    total_bytes: int
    files: tuple[str, ...]


def write_complete(
    source: Source,
    directory: Path,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    form: str = "huggingface",
    workers: int = WORKERS,
    dtype: str | None = None,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
    metadata: Mapping[str, str] | None = None,
    edit: Edit | None = None,
) -> Exported:
    """Write the tensors of `source` whose name passes `keep` as complete weights.

    Model weights become `model-0000x-of-0000y.safetensors` with an index. Optimizer state becomes
    `optimizer-0000x-of-0000y.safetensors`, which only some forms index. The extras of the source
    (step, epoch) become `hyper_param.safetensors`, in no index. `directory` exists and is empty.
    `form`: a key of `SAVE_FORMATS`. `share` = (k, n): write every n-th file from the k-th on, so
    that n processes write a directory together; the first also writes the index. `workers`:
    portions in flight. `dtype`: safetensors dtype that floating model weights are cast to.
    `metadata`: of the files, beside that of the form. `edit`: see `stream`.
    """
    target: CompleteForm = required(SAVE_FORMATS, form, f"the format {form!r} of complete weights")
    everything = source.with_extras()
    names = sorted(name for name in everything.tensors if keep(name))
    groups = _groups(names, source.extras)
    if not groups["model"] and not groups["optimizer"]:
        raise UserError(
            f"nothing of {source.path} is left to write",
            rule="every tensor was filtered out",
            advice="Give another prefix to --filter_out_param_prefix",
        )
    sizes = {
        name: _nbytes(everything, name, dtype if name in groups["model"] else None)
        for name in names
    }
    outputs, weight_map = [], dict[str, str]()
    metadata = {"format": target.metadata, **(metadata or {})}
    for stem in ("model", "optimizer"):
        shards = _shards({name: sizes[name] for name in groups[stem]}, max_shard_bytes)
        for index, shard in enumerate(shards, 1):
            file = f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
            boxes = {name: (name, full_box(everything.shape(name))) for name in shard}
            cast_to = dtype if stem == "model" else None
            outputs.append(Output(directory / file, boxes, metadata, dtype=cast_to))
            if stem == "model" or target.lists_optimizer:
                weight_map |= dict.fromkeys(shard, file)
    if groups["extra"]:
        boxes = {name: (name, full_box(everything.shape(name))) for name in groups["extra"]}
        outputs.append(Output(directory / EXTRAS_NAME, boxes, metadata))
    first, step = share
    stream(everything, outputs[first::step], progress, workers=workers, edit=edit)
    if weight_map and first == 0:
        _write_index(directory, target, weight_map, sum(sizes[name] for name in weight_map))
    return Exported(
        len(names),
        sum(sizes.values()),
        tuple(output.path.name for output in outputs),
    )


def _groups(names: Sequence[str], extras: Collection[str]) -> dict[str, list[str]]:
    """The names in each kind of file: `model`, `optimizer` and `extra`."""
    groups: dict[str, list[str]] = {"model": [], "optimizer": [], "extra": []}
    for name in names:
        kind = "optimizer" if is_optimizer_state(name) else "model"
        groups["extra" if name in extras else kind].append(name)
    return groups


def _write_index(
    directory: Path, form: CompleteForm, weight_map: Mapping[str, str], total: int
) -> None:
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / form.index).write_text(json.dumps(content, indent=form.indent) + "\n")


def _nbytes(source: Source, name: str, dtype: str | None) -> int:
    found, declared = source.dtype(name), source.written.get(name)
    dtype = (declared and declared.dtype) or dtype
    item = ITEM_BYTES[dtype if dtype is not None and found in CASTS else found]
    return math.prod(source.shape(name)) * item


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes (at least one tensor)."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
