"""Strategy files on disk: read one, read a folder of them, merge a folder into one file.

Owns which files are read, and that output appears complete or not at all. An input is never written
to.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.errors import UserError
from launcher.mindspore.strategy import MERGED, Strategy, parse, serialize
from launcher.mindspore.strategy_json import parse_json, serialize_json
from launcher.weights.formats.placeholders import is_pointer, placeholder
from launcher.weights.log import Log, no_log

LARGEST_FILE = 1 << 28
SUFFIXES = (".ckpt", ".json")


def merge_pipeline_strategys(
    src_strategy_dirs: str | os.PathLike[str],
    dst_strategy_file: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    log: Log = no_log,
) -> Strategy:
    """Merge the strategy files of all pipeline stages in a folder into one file; returns it.

    One file of each stage is enough. Written under a temporary name and renamed; in JSON when the
    name ends in `.json`. Raises `UserError`: see `read_folder`, and for an existing
    `dst_strategy_file` without `overwrite`. Name and arguments are MindSpore's.
    """
    source, target = Path(src_strategy_dirs), Path(dst_strategy_file)
    merged = read_folder(source, log)
    _check_target(source, target, overwrite)
    _write(target, (serialize_json if target.suffix == ".json" else serialize)(merged))
    return merged


def read_strategy(path: Path, log: Log = no_log) -> Strategy:
    """The strategies at `path`: a strategy file, merged or of one stage, or a folder of files."""
    return read_folder(path, log) if os.path.isdir(path) else _parse(_content(path), path)


def holds_strategies(directory: Path) -> bool:
    """Whether there is a strategy file in `directory`, by file names."""
    return os.path.isdir(directory) and any(
        child.suffix in SUFFIXES and not child.name.startswith(".") for child in directory.iterdir()
    )


def read_folder(directory: Path, log: Log = no_log) -> Strategy:
    """The strategies of all pipeline stages in `directory`, merged, stage by stage.

    A merged file, as MindFormers leaves `merged_ckpt_strategy.ckpt`, is used when it is the only
    file, or when it contains the others and further stages; if it contradicts them it is left out,
    with a line in the log. Raises `UserError` when `directory` is not a folder, has no strategy
    files, both kinds of them, a damaged one, two that contradict each other, or not every stage.
    """
    found = list(_strategies(directory))
    merged = [(path, strategy) for path, strategy in found if _is_merged(strategy)]
    others = [(path, strategy) for path, strategy in found if not _is_merged(strategy)]
    if merged and not others:
        return _only_merged(directory, merged)
    for path, strategy in merged:
        if _contains(strategy, others):
            log(f"{path}: used, it has the stages of the other strategy files and more")
            return strategy
        log(f"{path}: left out, {len(others)} strategy files beside it are merged instead")
    return _merged_stages(directory, others)


def _is_merged(strategy: Strategy) -> bool:
    """Whether every parameter is named with its stage."""
    names = [name.partition("-") for name, _ in strategy.layouts]
    return bool(names) and all(stage.isdecimal() and hyphen for stage, hyphen, _ in names)


def _only_merged(directory: Path, merged: Sequence[tuple[Path, Strategy]]) -> Strategy:
    first, strategy = merged[0]
    for path, other in merged[1:]:
        if other.by_stage() != strategy.by_stage():
            raise UserError(
                f"holds two merged files that differ: {first.name} and {path.name}",
                where=str(directory),
                rule="a folder has the strategies of one run",
                advice="Name the one that is meant",
            )
    return strategy


def _contains(merged: Strategy, others: Sequence[tuple[Path, Strategy]]) -> bool:
    """Whether a merged file has the content of the others, and further stages."""
    stages = merged.by_stage()
    single = {strategy.stage: dict(strategy.layouts) for _, strategy in others}
    is_equal = all(stages.get(stage) == layouts for stage, layouts in single.items())
    return is_equal and len(stages) > len(single)


def _merged_stages(directory: Path, found: Sequence[tuple[Path, Strategy]]) -> Strategy:
    stages: dict[int, tuple[Path, Strategy]] = {}
    for path, strategy in found:
        _check_of_one_stage(path, strategy)
        first, known = stages.setdefault(strategy.stage, (path, strategy))
        _check_agree(first, known, path, strategy)
    _check_complete(directory, stages)
    _check_own_parameters(directory, stages)
    ordered = [strategy for _, (_, strategy) in sorted(stages.items())]
    return Strategy(
        tuple(operator for strategy in ordered for operator in strategy.operators),
        tuple(
            (f"{strategy.stage}-{name}", layout)
            for strategy in ordered
            for name, layout in strategy.layouts
        ),
        MERGED,
    )


def _strategies(directory: Path) -> Iterator[tuple[Path, Strategy]]:
    """(file, content) of the files with different bytes, in the order of their numbers."""
    seen = set()
    for path in _files(directory):
        data = _content(path)
        digest = hashlib.sha256(data).digest()
        if digest not in seen:
            seen.add(digest)
            yield path, _parse(data, path)


def _files(directory: Path) -> list[Path]:
    if not os.path.isdir(directory):
        raise UserError(
            "is a file" if os.path.exists(directory) else "there is no such folder",
            where=str(directory),
            rule="strategies are merged from a folder with the file of every pipeline stage",
            nearest=f"Its folder is {directory.parent}" if os.path.isfile(directory) else "",
            advice="Give the folder, usually {output_dir}/strategy",
        )
    try:
        inside = sorted(directory.iterdir(), key=_by_rank_number)
    except OSError as error:
        raise UserError(
            f"cannot be listed: {error.strerror}", where=str(directory), advice="Check the rights"
        ) from None
    kinds = [
        [path for path in inside if path.suffix == suffix and not path.name.startswith(".")]
        for suffix in SUFFIXES
    ]
    if all(kinds):
        raise UserError(
            f"holds {kinds[0][0].name} and {kinds[1][0].name}",
            where=str(directory),
            rule="strategy files are all .ckpt or all .json",
            nearest=f"There are {len(kinds[0])} .ckpt and {len(kinds[1])} .json",
            advice="Move one kind away",
        )
    files = [path for path in kinds[0] + kinds[1] if path.is_file()]
    if not files:
        raise UserError(
            "holds no strategy file",
            where=str(directory),
            rule="strategy files end in .ckpt or .json, and subfolders are not searched",
            nearest=f"There are: {', '.join(path.name for path in inside[:5])}" if inside else "",
            advice="Give the folder that holds ckpt_strategy_rank_0.ckpt",
        )
    return files


def _by_rank_number(path: Path) -> list[tuple[int, str]]:
    """Sort key in which rank_2 comes before rank_10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", path.name)]


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}",
            where=str(path),
            advice="Give a strategy file, or a folder of them",
        ) from None
    if is_pointer(path) and (found := placeholder(path)):
        raise UserError(found)
    if len(data) > LARGEST_FILE:
        raise UserError(
            f"has more than {LARGEST_FILE >> 20} MiB",
            where=str(path),
            rule="a strategy file has a few megabytes at most",
            nearest="Files of weights also end in .ckpt",
            advice="Give the folder that holds ckpt_strategy_rank_0.ckpt",
        )
    return data


def _parse(data: bytes, path: Path) -> Strategy:
    return (parse_json if path.suffix == ".json" else parse)(data, str(path))


def _check_of_one_stage(path: Path, strategy: Strategy) -> None:
    if not strategy.operators or not strategy.layouts:
        raise UserError(
            "describes no operator" if strategy.layouts else "describes no parameter",
            where=str(path),
            rule="the first operator gives the pipeline stage of the file, and layouts follow",
            advice="Have the run that wrote it write it again",
        )
    if hyphen := next((name for name, _ in strategy.layouts if "-" in name), None):
        raise UserError(
            f"names a parameter {hyphen}",
            where=str(path),
            rule="in a file of one stage no name has a hyphen, which separates stage and parameter",
            advice="Rename the parameter",
        )


def _check_own_parameters(directory: Path, stages: dict[int, tuple[Path, Strategy]]) -> None:
    """Check that every stage has parameters that the others do not have."""
    names = {stage: {name for name, _ in known.layouts} for stage, (_, known) in stages.items()}
    for stage, own in names.items():
        for other, more in names.items():
            if stage != other and own <= more:
                raise UserError(
                    f"all {len(own)} parameters of {stages[stage][0].name} (stage {stage}) are "
                    f"also in {stages[other][0].name} (stage {other})",
                    where=str(directory),
                    rule="the stages of a pipeline have parameters of their own",
                    advice="The files are of two runs: move those of one away",
                )


def _check_agree(first: Path, known: Strategy, path: Path, strategy: Strategy) -> None:
    """Check that two files of one stage differ at most in order."""
    before, after = dict(known.layouts), dict(strategy.layouts)
    if before == after:
        return
    name = next(n for n in sorted({*before, *after}) if before.get(n) != after.get(n))
    raise UserError(
        f"contradicts {first.name}: both are of pipeline stage {strategy.stage}, and {name} has "
        "another layout",
        where=str(path),
        rule="all files of a stage have the same content",
        nearest=f"{first.name}: {_text(before.get(name))}; {path.name}: {_text(after.get(name))}",
        advice="Move the files of the other run away",
    )


def _text(layout: object) -> str:
    if layout is None:
        return "not there"
    names = ("dev_matrix", "tensor_map", "shard_step", "shard_size")
    return ", ".join(f"{name} {getattr(layout, name)}" for name in names)


def _check_complete(directory: Path, stages: dict[int, tuple[Path, Strategy]]) -> None:
    missing = sorted(set(range(max(stages))) - set(stages))
    if missing:
        raise UserError(
            f"has no file of pipeline stage {', '.join(map(str, missing[:10]))}",
            where=str(directory),
            rule="the stages are 0 to n - 1 without gaps",
            nearest=f"There are stages {', '.join(map(str, sorted(stages)))}",
            advice="Collect the strategy files of all nodes in one folder",
        )
    ranks = {stage: strategy.layouts[0][1].ranks for stage, (_, strategy) in stages.items()}
    if len(set(ranks.values())) > 1:
        other = next(stage for stage in ranks if ranks[stage] != ranks[0])
        raise UserError(
            f"stage 0 has {ranks[0]} ranks, stage {other} has {ranks[other]}",
            where=str(directory),
            rule="all stages have the same number of ranks",
            nearest=f"{stages[0][0].name} and {stages[other][0].name} are of different runs",
            advice="Move the files of the other run away",
        )


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(
            f"is in {source}",
            where=str(target),
            rule="an input is never written to",
            nearest=f"Possible: {source.parent / 'merged_strategy' / target.name}",
            advice="Give another file",
        )
    if os.path.isdir(target):
        raise UserError(
            "is a folder",
            where=str(target),
            rule="all strategies go into one file",
            nearest=f"Possible: {target / 'dst_strategy.ckpt'}",
            advice="Give a file",
        )
    if os.path.exists(target) and not overwrite:
        raise UserError(
            "exists",
            where=str(target),
            rule="existing files are not replaced by default",
            advice="Give another file, or --overwrite (`overwrite=True`)",
        )


def _write(target: Path, data: bytes) -> None:
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be written: {error.strerror}",
            where=str(target),
            rule="the folder must exist or be made, and be writable",
            nearest=f"Its folder is {target.parent.absolute()}",
            advice="Give another file",
        ) from None
