"""Loading: strict, box by box, with a table of everything that does not fit.

Owns the comparison between what a model needs and what the files hold. Invariant: either every
element of every target is written exactly once, or nothing is written and the error lists all
differences. With `strict_load: False` what fits is loaded and the rest is reported; files without
any tensor of the model are refused in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from launcher.errors import UserError
from launcher.layout.box import Box, Shape
from launcher.layout.shard import Shard
from launcher.weights.gc_pause import gc_paused
from launcher.weights.mxfp4 import BLOCKS, Packed, packed_of
from launcher.weights.optimizer_state import STATE_PREFIXES
from launcher.weights.reading.local_files import check_local
from launcher.weights.reading.mismatch import Differences, mismatch
from launcher.weights.reading.plan import plan_box
from launcher.weights.reading.read import Exponents, Fill, fill
from launcher.weights.reading.recheck import check_read
from launcher.weights.reading.tensor_bytes import TORCH_DTYPES
from launcher.weights.scales import EIGHT_BITS, check_idle, scales_of
from launcher.weights.source import Source, check_promised


@dataclass(frozen=True)
class LoadReport:
    """What a load did, for the log."""

    loaded: int
    """Tensors of the model, on all ranks, that the files had."""
    bytes_read: int
    tied: tuple[str, ...] = ()
    not_loaded: tuple[str, ...] = ()
    left_in_files: tuple[str, ...] = field(default=())


@gc_paused()
def load(
    targets: Mapping[str, Shard],
    source: Source,
    *,
    tied: Mapping[str, str] | None = None,
    ignore_prefixes: Collection[str] = STATE_PREFIXES,
    strict: bool = True,
    rank: int = 0,
    expected: Mapping[str, Shape] | None = None,
    leave: Callable[[str], bool] = lambda name: False,
    reads: Callable[[str], bool] = lambda name: True,
) -> LoadReport:
    """Fill every target from `source`; floating dtypes are cast on the way.

    `expected`: all tensors of the model, name to global shape, where `targets` are only those of
    this rank, so that every rank finds the same differences. `leave(name)`: whether a tensor of the
    files is known and not needed. `reads(name)`: False for targets that another rank reads and
    broadcasts. `tied`: name of a tied parameter to the parameter whose memory it shares; files may
    hold both, or either. Tensors with one of `ignore_prefixes` are ignored. Raises `UserError` with
    the table of missing, extra and mismatched tensors.
    """
    tied = dict(tied or {})
    if expected is None:
        expected = {name: target.shape for name, target in targets.items()}
    found = _names_in_files(source, expected, tied)
    has_blocks = any(name.endswith(BLOCKS) for name in source.tensors)
    packed = packed_of(source.tensors) if has_blocks else {}
    packed = {name: p for name, p in packed.items() if name in expected}
    found |= {name: name for name in packed}
    factors, ignored = {*source.scales.values()}, tuple(ignore_prefixes)
    factors |= {part for p in packed.values() for part in (p.blocks, p.scales)}
    unknown = [
        name
        for name in source.tensors
        if name not in expected
        and name not in tied
        and name not in factors
        and not name.startswith(ignored)
    ]
    missing = [name for name in expected if name not in found]
    extra = [name for name in unknown if not leave(name)]
    if unknown:
        check_idle(source, unknown)
    check_promised(source.promised, frozenset(missing).__contains__)
    unfit = _unfit(source, expected, targets, found, packed)
    differences = Differences(expected, found, missing, extra, unfit)
    fits_nothing = bool(expected) and not found
    if unfit or fits_nothing or (strict and (missing or extra)):
        raise mismatch(source, differences)
    jobs = [
        _fill_of(target, source, found[name], rank, packed.get(name))
        for name, target in targets.items()
        if name in found and reads(name)
    ]
    if source.elsewhere:
        check_local((read for job in jobs for read in job.reads), source, rank)
    bytes_read = fill(jobs, source)
    if source.checksums:
        check_read(jobs, source)
    if strict:
        _check_tied({n: t for n, t in targets.items() if reads(n)}, source, tied, rank)
    return LoadReport(len(found), bytes_read, tuple(sorted(tied)), tuple(missing), tuple(unknown))


def _names_in_files(
    source: Source, expected: Mapping[str, Shape], tied: Mapping[str, str]
) -> dict[str, str]:
    """Model name to name in the files, where a tied parameter may have its other name."""
    found = {name: name for name in expected if name in source.tensors}
    for alias, name in tied.items():
        if name in expected and name not in found and alias in source.tensors:
            found[name] = alias
    return found


def _unfit(
    source: Source,
    expected: Mapping[str, Shape],
    targets: Mapping[str, Shard],
    found: Mapping[str, str],
    packed: Mapping[str, Packed],
) -> dict[str, tuple[str, str]]:
    """Name to (what the files have, what the model needs) for tensors of another shape or dtype."""
    unfit = {}
    # Tensors of other ranks have the dtype of those of this rank: all find the same differences.
    usual = next((t.tensor.dtype for t in targets.values()), torch.float32)
    for name, file_name in found.items():
        shape = packed[name].shape if name in packed else source.shape(file_name)
        if shape != expected[name]:
            unfit[name] = (str(list(shape)), str(list(expected[name])))
        elif name not in packed:
            disk = TORCH_DTYPES[source.dtype(file_name)]
            model = targets[name].tensor.dtype if name in targets else usual
            if disk != model and not (disk.is_floating_point and model.is_floating_point):
                unfit[name] = (_dtype_name(disk), _dtype_name(model))
    return unfit


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fill_of(
    target: Shard, source: Source, name: str, rank: int, packed: Packed | None = None
) -> Fill:
    """The reads of tensor `name` of the files that fill `target`."""
    if packed is not None:
        blocks = source.tensors[packed.blocks]
        box = packed.blocks_for(target.box) if target.box.numel else Box((), (0,))
        reads = plan_box(packed.blocks, box, blocks, prefer_rank=rank)
        exponents = Exponents(packed.scales, source.tensors[packed.scales])
        return Fill(target.tensor, target.box, reads, exponents=exponents)
    reads = plan_box(name, target.box, source.tensors[name], prefer_rank=rank)
    is_scaled = source.dtype(name) in EIGHT_BITS
    return Fill(target.tensor, target.box, reads, scales_of(source, name) if is_scaled else None)


def _check_tied(
    targets: Mapping[str, Shard], source: Source, tied: Mapping[str, str], rank: int
) -> None:
    """Check that a tied tensor that files hold under both names is the same under both."""
    for alias, name in tied.items():
        if alias not in source.tensors or name not in source.tensors or name not in targets:
            continue
        target = targets[name]
        other = torch.empty_like(target.tensor)
        job = _fill_of(Shard(target.shape, target.box, other), source, alias, rank)
        check_local(job.reads, source, rank)
        fill([job], source)
        if not torch.equal(_bits(other), _bits(target.tensor)):
            raise UserError(
                f"`{alias}` and `{name}` differ in the files",
                where=str(source.path),
                rule="the model ties them: it has one tensor for both",
                advice="Set tie_word_embeddings: False, or strict_load: False to drop the former",
            )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes: a NaN is equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
