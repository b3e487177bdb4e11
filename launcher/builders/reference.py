"""The reference of a loss on preferences: its log-probabilities, computed before training.

Owns the files `reference-KEY.bin` of the data cache: float32 [rows, 2], the log-probabilities of
both sequences of each row of a data set, NaN where they are not known yet, and a hash of these
bytes: a damaged file is computed again. KEY is a hash of the weights, the rows, the model and its
precision. Invariants: a file appears under its name complete
(rows that are known stay known); every rank has the values that rank 0 has, so that a resumed run
continues with the same bits on any layout; the model in memory is used, there is no second one.

    fresh run      weights of preference.reference, if any, or those that training starts from
    resumed run    the file that the checkpoint names; if it is gone, the first weights again
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from launcher.builders.adapter import Weights
from launcher.builders.job import Job
from launcher.builders.load_weights import load_or_init, pretrained_weights, weights_at
from launcher.builders.open_dataset import cache_folder
from launcher.checkpoint.files import write_bytes
from launcher.config.pet import adapter_of
from launcher.data.cache_key import hash_of
from launcher.data.loader import batches_of_rows
from launcher.data.order import GlobalOrder
from launcher.data.rows import Ints, RowDataset
from launcher.errors import UserError
from launcher.host_reads import host_read
from launcher.parallel.all_ranks import on_all_ranks
from launcher.parallel.apply import shards
from launcher.train.evaluate import EvaluationSet
from launcher.train.run import BuiltModel, TrainRun
from launcher.train.state import from_json
from launcher.weights.ranks.redundancy import file_replicas
from launcher.weights.tensor_mapping import mapped, shapes_in_files

REFERENCE = "reference"
"""The key in the metadata of a run: the hash of the weights of the reference."""
FLUSH_SECONDS = 60.0
_HASH_BYTES = 8
_ELEMENTS_AT_ONCE = 1 << 24
_SAMPLES_AT_ONCE = 1 << 20

Values = npt.NDArray[np.float32]


class _Wanted(NamedTuple):
    """Rows whose log-probabilities a run needs."""

    what: str
    """The data, for messages."""
    dataset: RowDataset
    rows: Ints


def add_reference(job: Job, run: TrainRun) -> None:
    """The reference of a fresh run, from the weights in its model. Called by all ranks together."""
    _log_base(job, run.model)
    if _is_needed(run.model):
        samples = range(run.total_steps * run.loader.global_batch)
        _add(job, run, _digest(job, run.model), samples, can_compute=True)


def _log_base(job: Job, model: BuiltModel) -> None:
    """Log that the base below an adapter is the reference, and not the adapter it starts with."""
    task = model.preference
    if task is None or not task.needs_reference or task.scores_before:
        return
    given = adapter_of(job.config)
    without = f", without {given.path} (merge it first to compare with both)" if given else ""
    job.log(f"reference: the base model below the adapter{without}")


def add_other_reference(job: Job, run: TrainRun) -> bool:
    """The reference of a fresh run from weights of its own (`preference.reference.weights`), which
    are in the model afterwards. Returns whether there are some."""
    if not _is_needed(run.model) or not job.config.preference.reference.weights:
        return False
    _load_reference(job, run.model)
    add_reference(job, run)
    return True


def add_base_as_reference(job: Job, run: TrainRun, weights: Weights | None) -> bool:
    """The reference of a fresh run that trains an adapter of `weights` further, where that has
    modules in full: the base without them, which is in the model afterwards. Returns whether it is
    so."""
    has_modules = job.spec.lora is not None and bool(job.spec.lora.modules_to_save)
    if weights is None or weights.adapter is None or not has_modules or not _is_needed(run.model):
        return False
    load_or_init(job, run.model.parts, run.model.layout, replace(weights, adapter=None))
    job.log(f"reference: the base model below the adapter, without {weights.adapter.path}")
    add_reference(job, run)
    return True


def restore_reference(job: Job, run: TrainRun, saved: Mapping[str, Any]) -> None:
    """The reference of a resumed run, before its own weights are loaded: that of the checkpoint.
    Raises `UserError` where it is neither in the cache nor can be computed again."""
    if not _is_needed(run.model):
        return
    digest, samples = saved.get(REFERENCE), _samples_left(job, run, saved)
    if digest is not None and _add(job, run, digest, samples, can_compute=False):
        return
    _load_reference(job, run.model)
    found = _digest(job, run.model)
    if digest is not None and found != digest:
        raise UserError(
            "the log-probabilities of the reference are not in the data cache, and the weights "
            "that the run started from are not those of this configuration",
            where=job.provenance.nearest("preference.reference.weights"),
            rule="a resumed run is compared with the same reference as before",
            advice="Name the first weights in preference.reference.weights, or give data_cache.dir "
            "of the first run",
        )
    _add(job, run, found, samples, can_compute=True)


def _samples_left(job: Job, run: TrainRun, saved: Mapping[str, Any]) -> range:
    """The samples that a resumed run reads."""
    batch, config = run.loader.global_batch, job.config
    state = from_json(dict(saved), "the checkpoint")
    if saved.get("global_batch_size") != batch:
        state = state.with_global_batch(batch)
    begin = state.data_position
    if config.ignore_data_skip or config.data_skip_steps is not None:
        begin = (config.data_skip_steps or 0) * batch
    return range(begin, begin + (run.total_steps - state.global_step) * batch)


def with_reference(
    job: Job, model: BuiltModel, sets: Sequence[EvaluationSet]
) -> list[EvaluationSet]:
    """The data of an evaluation without training, with the reference, whose weights are in the
    model afterwards."""
    if not _is_needed(model):
        return list(sets)
    _load_reference(job, model)
    digest = _digest(job, model)
    return [
        replace(one, reference=_values(job, model, digest, wanted, can_compute=True))
        for one, wanted in zip(sets, _wanted_by_evaluation(sets), strict=True)
    ]


def _is_needed(model: BuiltModel) -> bool:
    return model.preference is not None and model.preference.scores_before


def _load_reference(job: Job, model: BuiltModel) -> None:
    path = job.config.preference.reference.weights
    source = weights_at(job, Path(path)) if path else pretrained_weights(job)
    job.log("reference: " + (f"the weights of {source.path}" if source else "the first weights"))
    weights = None if source is None else Weights(source=source)
    load_or_init(job, model.parts, model.layout, weights)


def _add(job: Job, run: TrainRun, digest: str, samples: range, *, can_compute: bool) -> bool:
    """Add the reference to the data of a run, which reads `samples`. Returns False where it would
    have to be computed, and cannot."""
    wanted = _Wanted("train_dataset", run.loader.dataset, _rows_of(job, run, samples))
    each = [wanted, *_wanted_by_evaluation(run.evaluation)]
    found = [_values(job, run.model, digest, one, can_compute=can_compute) for one in each]
    if any(values is None for values in found):
        return False
    run.reference, *of_sets = found
    run.evaluation = [
        replace(one, reference=values) for one, values in zip(run.evaluation, of_sets, strict=True)
    ]
    run.metadata[REFERENCE] = digest
    return True


def _wanted_by_evaluation(sets: Sequence[EvaluationSet]) -> Iterator[_Wanted]:
    for one in sets:
        assert one.dataset is not None
        yield _Wanted(one.name or "eval_dataset", one.dataset, np.arange(len(one.dataset)))


def _rows_of(job: Job, run: TrainRun, samples: range) -> Ints:
    """The rows of the samples; all rows where a roll-back may leave out samples, or the shares of a
    mixture may change."""
    order, dataset = run.loader.order, run.loader.dataset
    is_known = isinstance(order, GlobalOrder) and not job.config.monitor_config.roll_back
    if not is_known or len(samples) >= len(dataset):
        return np.arange(len(dataset))
    needed = np.zeros(len(dataset), dtype=bool)
    for first in range(samples.start, samples.stop, _SAMPLES_AT_ONCE):
        part = np.arange(first, min(first + _SAMPLES_AT_ONCE, samples.stop))
        needed[order.rows(part)] = True
    return np.flatnonzero(needed)


def _values(
    job: Job, model: BuiltModel, digest: str, wanted: _Wanted, *, can_compute: bool
) -> torch.Tensor | None:
    """The log-probabilities of the wanted rows, float32 [rows of the data set, 2]; None where some
    are not in the cache and may not be computed."""
    started = time.monotonic()
    file = _CachedFile(job, _key(job, digest, wanted.dataset), len(wanted.dataset))
    values = file.read()
    missing = wanted.rows[np.isnan(values[wanted.rows]).any(1)]
    if len(missing) and not can_compute:
        return None
    if len(missing):
        _compute(job, model, wanted.dataset, missing, values, file)
        origin = f"{time.monotonic() - started:.1f} s"
    else:
        origin = f"from the cache {file.path}"
    job.log(
        f"reference: log-probabilities of {len(wanted.rows):,} samples of {wanted.what} ({origin})"
    )
    return torch.from_numpy(values)


def _compute(
    job: Job,
    model: BuiltModel,
    dataset: RowDataset,
    rows: Ints,
    values: Values,
    file: _CachedFile,
) -> None:
    """Fill `values` of these rows: each data rank computes its share, and all ranks get all."""
    task, world, mesh = model.preference, job.world, job.mesh
    assert task is not None
    size, rank = job.config.runner_config.batch_size, mesh.data_rank(world.rank)
    stride, flushed = size * mesh.data_parallel, time.monotonic()
    batches = batches_of_rows(dataset, rows, size, mesh.data_parallel, rank)
    for first, batch in zip(range(0, len(rows), stride), batches, strict=True):
        scores = torch.zeros(stride, 2, device=world.device)
        scores[rank * size : (rank + 1) * size] = task.score(model, batch)
        now = rows[first : first + stride]
        with host_read("reference"):
            values[now] = world.sum(scores)[: len(now)].cpu().numpy()
        job.console.progress(f"reference: {first + len(now):,} of {len(rows):,} samples")
        if time.monotonic() - flushed >= FLUSH_SECONDS:
            file.write(values)
            flushed = time.monotonic()
    job.console.end_progress()
    file.write(values)


class _CachedFile:
    """One file of the cache, read and written by the main rank."""

    def __init__(self, job: Job, key: str, rows: int) -> None:
        self.path = cache_folder(job.config) / f"reference-{key}.bin"
        self._job, self._rows = job, rows

    def read(self) -> Values:
        """What is known, the same on every rank; NaN elsewhere."""
        world = self._job.world
        found = on_all_ranks(world, lambda: self._known() if world.is_main else None)
        values: Values = world.from_main(found)
        return values

    def _known(self) -> Values:
        shape = (self._rows, 2)
        try:
            content = self.path.read_bytes()
            values = np.frombuffer(content[:-_HASH_BYTES], dtype="<f4").astype(np.float32)
            if content[-_HASH_BYTES:] == _hash(content[:-_HASH_BYTES]):
                return values.reshape(shape)
        except (OSError, ValueError):  # not there, or of another program
            pass
        return np.full(shape, np.nan, dtype=np.float32)

    def write(self, values: Values) -> None:
        """Add what is known here to what another job may have written meanwhile."""
        if not self._job.world.is_main:
            return
        known = np.where(np.isnan(values), self._known(), values)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = known.astype("<f4").tobytes()
            write_bytes(self.path, content + _hash(content))
        except OSError as error:
            self._job.log(
                f"warning: {self.path} cannot be written ({error.strerror}): a resumed run will "
                "compute the reference again"
            )


def _hash(content: bytes) -> bytes:
    return xxhash.xxh3_64(content).digest()


def _key(job: Job, digest: str, dataset: RowDataset) -> str:
    """The name of a file."""
    description = {
        "weights": digest, "rows": dataset.fingerprint, "model": job.spec.hf_config,
        "compute_dtype": str(job.compute_dtype),
    }  # fmt: skip
    return hash_of(description)


@torch.no_grad()
def _digest(job: Job, model: BuiltModel) -> str:
    """A hash of the weights in memory that does not depend on their layout: of each tensor the sums
    of its bits, as integers, and of their squares, modulo 2^64. It differs between the weights of
    runs; it is no protection against an attack."""
    rank = job.world.rank
    names = sorted(shapes_in_files(model.layout.shapes, model.mappings_of))
    held = mapped(shards(model.parts.named_tensors(), model.layout, rank), model.mappings_of)
    replicas = file_replicas(model.layout, rank, model.mappings_of)
    sums = torch.zeros(len(names), 2, dtype=torch.int64, device=job.world.device)
    for index, name in enumerate(names):
        if name in held and min(replicas[name]) == rank:
            for piece in held[name].tensor.detach().flatten().split(_ELEMENTS_AT_ONCE):
                bits = piece.view(_INTEGERS[piece.element_size()]).long()
                sums[index] += torch.stack([bits.sum(), (bits * bits).sum()])
    kinds = sorted({str(p.dtype) for p in model.parts.named_tensors().values()})
    return hash_of([names, job.world.sum(sums).tolist(), job.world.from_main(kinds)])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
