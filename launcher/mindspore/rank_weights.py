"""Rank files of MindSpore, which do not describe their layout: a source made with strategy files.

Owns the checks between the two. Invariants: every tensor of the source is complete, from replicas
where the file of a rank is missing; numbers of the run (step, epoch) are among the extras, as the
first rank has them; a strategy that visibly does not fit the files is refused. Torch-free.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.mindspore.names import COUNTERS, GRADIENTS, TRANSIENT
from launcher.mindspore.rank_files import ADVICE, Run, open_run
from launcher.mindspore.strategy import Strategy
from launcher.mindspore.strategy_files import holds_strategies, read_strategy
from launcher.weights.formats import rank_header_of
from launcher.weights.formats.rank_metadata import REDUNDANCY
from launcher.weights.forms import is_scalar
from launcher.weights.log import Log
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.pieces import Piece, Pieces, pieces_of
from launcher.weights.ranks.distributed import (
    NAMED,
    OpenFiles,
    check_complete,
    without,
)
from launcher.weights.ranks.rank_folders import rank_folders, weight_files
from launcher.weights.ranks.saves import STRATEGY_FOLDER, layout_mark
from launcher.weights.source import Source, text_remarks

COMPARED_TENSORS = 4
"""Number of replicated tensors that are compared between ranks."""


def mindspore_opener(directory: Path, strategy: Path | None, log: Log) -> OpenFiles:
    """What opens the rank files of a save in `directory`: with the strategy files at `strategy`, or
    in `strategy/` beside it. The file of a run of one rank is complete without any."""
    beside = directory.resolve().parent / STRATEGY_FOLDER
    if strategy is not None or holds_strategies(beside):
        known = read_strategy(strategy or beside, log)
        return partial(open_mindspore_ranks, strategy=known)
    return open_single_rank if [*rank_folders(directory)] == [0] else _refuse


def _refuse(path: Path, files: Sequence[Path]) -> Source:
    rank_header_of(files[0])  # files that cannot be read have errors of their own
    raise UserError(
        f"{files[0]} does not describe its layout",
        rule="rank files of MindSpore need the strategy files of the run that wrote them",
        advice="Set src_strategy_path_or_dir (--src_strategy_dirs) to the folder strategy/ of "
        "that run",
    )


def holds_foreign(root: Path) -> bool:
    """Whether rank files in `root` do not describe their layout, by those of the first rank folder;
    what cannot be read does not count."""
    folders = rank_folders(root) if root.is_dir() else {}
    first = next(iter(folders.values()), None)
    return first is not None and any(map(_needs_strategy, weight_files(first)))


def _needs_strategy(file: Path) -> bool:
    try:
        return file.suffix == ".ckpt" or not layout_mark(file)
    except UserError:
        return False


def open_mindspore_ranks(path: Path, files: Sequence[Path], strategy: Strategy) -> Source:
    """The source made of the rank files of one save of MindSpore, with the layouts of `strategy`.

    `path` is the folder of the rank folders, for messages. Raises `UserError` when files are of
    different saves, when the strategy does not fit them, or when ranks are missing whose parts no
    other rank holds.
    """
    run = open_run(path, files, strategy)
    cut = _Sorted()
    for rank, file in run.files.items():
        for name in run.headers[file].entries:
            _sort_in(cut, run, rank, name)
    _check_counters(run, cut.counters)
    _check_stages(run, cut)
    _check_extras(run, cut.extras)
    tensors = {name: _chosen(by_stage) for name, by_stage in cut.pieces.items()}
    source = Source(
        "distributed", path, tensors, run.headers, None, run.world_size,
        is_deduplicated=any(h.metadata.get(REDUNDANCY) == "True" for h in run.headers.values()),
        extras={name: Pieces(pieces) for name, pieces in cut.extras.items()},
        remarks=text_remarks(run.headers),
    )  # fmt: skip
    lost = run.lost
    _check_named(run, tensors, lost)
    _check_complete(run, source, lost)
    _check_copies(run, tensors)
    return without(source, lost) if lost else source


def open_single_rank(path: Path, files: Sequence[Path]) -> Source:
    """The source made of the file of a run of one rank, which needs no strategy.

    Whether it holds all of a model is checked when it is loaded. Raises `UserError`.
    """
    (file,) = files
    header = rank_header_of(file)
    tensors: dict[str, Pieces] = {}
    extras: dict[str, Pieces] = {}
    for name, entry in header.entries.items():
        if not any(part in name for part in TRANSIENT):
            kept = extras if is_scalar(name, entry.shape) else tensors
            kept[name] = Pieces(pieces_of(file, header, name))
    remark = f"{path}: one rank folder and no strategy files: its tensors are taken as not sharded"
    return Source(
        "distributed", path, tensors, {file: header}, extras=extras,
        remarks=(remark, *text_remarks({file: header})),
    )  # fmt: skip


@dataclass(frozen=True)
class _Sorted:
    """The tensors of the files, sorted by kind."""

    pieces: dict[str, dict[int, list[Piece]]] = field(default_factory=dict)
    """Tensor to its pieces, for each stage that lists it."""
    astray: dict[str, int] = field(default_factory=dict)
    """Tensor to the first rank that holds it although its stage does not list it."""
    extras: dict[str, list[Piece]] = field(default_factory=dict)
    counters: dict[str, list[Piece]] = field(default_factory=dict)


def _sort_in(cut: _Sorted, run: Run, rank: int, name: str) -> None:
    if name.startswith(GRADIENTS):
        return
    file = run.files[rank]
    header = run.headers[file]
    place = run.place(name, rank, header.entries[name].shape)
    pieces = pieces_of(file, header, name, place, rank)
    if place is not None:
        by_stage = cut.pieces.setdefault(name, {})
        by_stage.setdefault(rank // run.stage_ranks, []).extend(pieces)
    elif name in run.names:
        cut.astray.setdefault(name, rank)
    elif not any(part in name for part in TRANSIENT):
        cut.extras.setdefault(name, pieces)
        if name in COUNTERS:
            cut.counters.setdefault(name, []).append(pieces[0])


def _chosen(by_stage: Mapping[int, Sequence[Piece]]) -> Pieces:
    """The pieces of a tensor: those of the first stage that has all of it."""
    options = [Pieces(pieces) for _, pieces in sorted(by_stage.items())]
    return next((pieces for pieces in options if _is_complete(pieces)), options[0])


def _is_complete(pieces: Pieces) -> bool:
    held = sum(box.numel for box in pieces.replica_ranks)
    return held == full_box(pieces[0].shape).numel and pieces.is_disjoint


def _check_counters(run: Run, counters: Mapping[str, Sequence[Piece]]) -> None:
    for name, (first, *others) in counters.items():
        value = run.first_bytes(first)
        for piece in others:
            if run.first_bytes(piece) != value:
                raise UserError(
                    f"{first.file} has {name} {_number(value)}, {piece.file} has "
                    f"{_number(run.first_bytes(piece))}",
                    where=str(run.path),
                    rule="the files of one save are of one step",
                    advice="Move the files of the other run or step away",
                )


def _number(value: bytes) -> int:
    return int.from_bytes(value, "little", signed=True)


def _check_stages(run: Run, cut: _Sorted) -> None:
    """Check that every tensor is held by a stage that lists it."""
    for name, rank in cut.astray.items():
        if name not in cut.pieces:
            stage = next(index for index, known in enumerate(run.stages) if name in known)
            first = stage * run.stage_ranks
            raise UserError(
                f"{run.files[rank]} holds `{name}`",
                where=str(run.path),
                rule=f"the strategy files have it in pipeline stage {stage}, which is ranks "
                f"{first} to {first + run.stage_ranks - 1}",
                advice=ADVICE,
            )


def _check_extras(run: Run, extras: Mapping[str, Sequence[Piece]]) -> None:
    """Check that no matrix is missing in the strategy: only scalars and vectors may be."""
    unknown = [name for name, pieces in extras.items() if len(pieces[0].shape) > 1]
    if unknown:
        shown = ", ".join(f"`{name}`" for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" * (len(unknown) > NAMED)
        raise UserError(
            f"the strategy files do not have {shown}{more}",
            where=str(run.path),
            rule="they list every matrix of the run that wrote the rank files, and its optimizer "
            "state",
            advice=ADVICE,
        )


def _check_named(run: Run, tensors: Mapping[str, Pieces], lost: Sequence[int]) -> None:
    """Check that no tensor was only in the files of the `lost` ranks. Optimizer state of a kind
    that is in no file was not saved."""
    if not lost:
        return
    kinds = {_kind(run, name) for name in tensors}
    absent = sorted(
        name
        for name in run.names.difference(tensors)
        if not any(part in name for part in TRANSIENT) and _kind(run, name) in kinds
    )
    if absent:
        more = f" and {len(absent) - NAMED} more" * (len(absent) > NAMED)
        raise UserError(
            f"no file holds {', '.join(f'`{name}`' for name in absent[:NAMED])}{more}",
            where=str(run.path),
            rule=f"the strategy files list them; of {run.world_size} ranks the file is missing of "
            f"{', '.join(map(str, lost[:NAMED]))}{' ...' * (len(lost) > NAMED)}",
            advice="Copy the missing rank folders. " + ADVICE,
        )


def _kind(run: Run, name: str) -> str:
    """`adam_m` for the state `adam_m.x` of a parameter `x`; empty for a parameter."""
    kind, _, parameter = name.partition(".")
    return kind if parameter in run.names else ""


def _check_complete(run: Run, source: Source, lost: Sequence[int]) -> None:
    try:
        check_complete(source, lost)
    except UserError as error:
        counts = f"The strategy files describe {run.world_size} ranks, {len(run.files)} have a file"
        raise UserError(replace(problem, nearest=counts) for problem in error.problems) from error


def _check_copies(run: Run, tensors: Mapping[str, Pieces]) -> None:
    """Check a few bytes of replicas: shapes do not show whether ranks hold replicas or shards."""
    for name, (first, *others) in itertools.islice(_copies(tensors), COMPARED_TENSORS):
        value = run.first_bytes(first)
        for piece in others:
            if run.first_bytes(piece) != value:
                raise UserError(
                    f"`{name}` differs in {first.file} and {piece.file}",
                    where=str(run.path),
                    rule="by the strategy files these ranks hold replicas of one shard",
                    advice=ADVICE,
                )


def _copies(tensors: Mapping[str, Pieces]) -> Iterator[tuple[str, list[Piece]]]:
    """(tensor, pieces that should be equal) of sharded tensors; weights first, as state may be all
    zeros."""
    for name in sorted(tensors, key=is_optimizer_state):
        replica_ranks = tensors[name].replica_ranks
        if len(tensors[name]) > len(replica_ranks) > 1:
            yield name, max(replica_ranks.values(), key=len)
