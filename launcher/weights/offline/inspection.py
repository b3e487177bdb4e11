"""Inspection: is everything at a path valid, and does it belong together?

Owns the list of faults of checkpoints: checksums, entries of manifests and indexes, coverage,
shapes. `checksums` has the faults of one file. Torch-free. Every fault names its file, its rank,
and its tensor where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.weights.formats import header_of
from launcher.weights.formats.rank_metadata import read_rank_metadata
from launcher.weights.forms import INDEX_NAMES, read_index
from launcher.weights.ranks.manifests import (
    MANIFEST_FOLDER,
    STATE_FOLDER,
    ranks_elsewhere,
    read_manifest,
    state_fault,
    text_of_elsewhere,
)
from launcher.weights.ranks.rank_folders import (
    RANK_SUFFIXES,
    Save,
    save_of,
    saves,
    weight_files,
)
from launcher.weights.ranks.saves import check_exists, manifest_of, open_save, optimizer_files
from launcher.weights.reading.checksums import file_faults
from launcher.weights.source import (
    Source,
    check_one_kind,
    detect,
    is_rank_folder,
    no_weights,
    open_complete,
    rank_of,
)

_UNFINISHED = (".", ".json.tmp")
"""Prefix and suffix of the in-progress marker, beside the manifests."""


@dataclass(frozen=True)
class Verdict:
    """What was found at a path."""

    faults: tuple[str, ...]
    files: int
    total_bytes: int
    unchecked: int
    """Files without checksums, of which only the header was checked."""
    remarks: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether there is no fault."""
        return not self.faults


@dataclass
class _Findings:
    """A verdict under construction."""

    faults: list[str]
    files: dict[Path, int]
    unchecked: int
    remarks: list[str]

    def verdict(self) -> Verdict:
        total = sum(self.files.values())
        faults = tuple(dict.fromkeys(self.faults))
        return Verdict(faults, len(self.files), total, self.unchecked, tuple(self.remarks))

    def file(self, path: Path, record: Mapping[str, Any] | None = None, of: str = "") -> bool:
        """Check one file, also against its record in a manifest. Returns whether it is valid."""
        record = record or {}
        found = _size_faults(path, record) or file_faults(
            path, header_digest=record.get("header_xxh3_64")
        )
        self.faults += [f"{of}{fault}" for fault in found]
        if found:
            return False
        header = header_of(path)
        self.files[path] = header.file_bytes
        rank_metadata = read_rank_metadata(path, header)
        self.unchecked += not header.crc and (
            rank_metadata is None or not (rank_metadata.checksums.values or not header.entries)
        )
        return True


def _size_faults(path: Path, record: Mapping[str, Any]) -> list[str]:
    if not os.path.isfile(path):
        return [f"{path} is missing"]
    size, expected = path.stat().st_size, record.get("bytes")
    return [] if expected in (None, size) else [f"{path} has {size} bytes instead of {expected}"]


def verify(
    path: str | os.PathLike[str], src_strategy_dirs: str | os.PathLike[str] | None = None
) -> Verdict:
    """All that is wrong with the weights at `path`: a file, complete weights, a folder of rank
    folders with all its saves, or the folder of one rank. `src_strategy_dirs`: the strategy files
    that some rank files need. Raises `UserError` where there are no weights.
    """
    root = Path(path)
    strategy = None if src_strategy_dirs is None else Path(src_strategy_dirs)
    kind = detect(root)
    findings = _Findings([], {}, 0, [])
    if kind == "nothing":
        raise no_weights(root)
    check_exists(strategy)
    check_one_kind(root)
    if root.is_file():
        _lone_file(root, kind, findings)
    elif is_rank_folder(root):
        for file in weight_files(root):
            _lone_file(file, "distributed", findings)
    elif kind == "distributed":
        _rank_folders(root, findings, strategy)
    else:
        _complete(root, findings)
    if not findings.files and not findings.faults:
        findings.faults.append(f"{root} holds no file of weights that could be checked")
    return findings.verdict()


def _lone_file(file: Path, kind: str, findings: _Findings) -> None:
    """A single file; a rank file also against its manifest."""
    record, of = None, ""
    if kind == "distributed":
        label, rank = save_of(file).label, rank_of(file.parent)
        records = manifest_of(file.parent.parent, label) or {}
        record, of = records.get(f"{file.parent.name}/{file.name}"), f"rank {rank}: "
    findings.file(file, record, of)


def _rank_folders(root: Path, findings: _Findings, strategy: Path | None) -> None:
    found = {save.label: save for save in saves(root)}
    published = {path.stem for path in (root / MANIFEST_FOLDER).glob("[!.]*.json")}
    for label in sorted({*found, *published}):
        save = found.get(label, Save(label, 0, {}))
        if label not in published and _is_unfinished(root, label):
            findings.remarks.append(f"{root}: the save {label} was never finished: not checked")
            continue
        records = manifest_of(root, label)
        if label in published and records is None:
            findings.faults.append(
                f"{root / MANIFEST_FOLDER / label}.json cannot be read or was changed"
            )
        findings.faults += _state_faults(root, label)
        manifest = read_manifest(root / MANIFEST_FOLDER / f"{label}.json") if records else None
        away = ranks_elsewhere(root, manifest) if manifest else []
        if away:
            findings.remarks.append(f"{root}: {label}: {text_of_elsewhere(away)}: not checked")
        here = {file: record for file, record in (records or {}).items()
                if record["rank"] not in away}  # fmt: skip
        _save(root, save, here, findings, strategy, is_all=not away)


def _state_faults(root: Path, label: str) -> list[str]:
    """Faults of the state file. Saves of older versions have no digest of it, or no state file."""
    manifest = read_manifest(root / MANIFEST_FOLDER / f"{label}.json") or {}
    path = root / STATE_FOLDER / f"{label}.json"
    has_digest = "state_xxh3_64" in manifest
    fault = state_fault(path, manifest) if has_digest or path.is_file() else ""
    return [fault] if fault else []


def _is_unfinished(root: Path, label: str) -> bool:
    start, end = _UNFINISHED
    return (root / MANIFEST_FOLDER / f"{start}{label}{end}").is_file()


def _save(
    root: Path, save: Save, records: Mapping[str, Mapping[str, Any]], findings: _Findings,
    strategy: Path | None, *, is_all: bool,
) -> None:  # fmt: skip
    """One save: every file by itself, then, if all are here, all together."""
    expected = {record["rank"]: (root / file, record) for file, record in records.items()}
    valid: list[Path] = []
    for rank in sorted({*expected, *save.files}):
        file, record = expected.get(rank, (save.files.get(rank), None))
        assert file is not None
        if rank in save.files and save.files[rank] != file:
            findings.faults.append(f"rank {rank}: {save.files[rank]} is in no manifest")
        if findings.file(file, record, f"rank {rank}: "):
            valid.append(file)
    if not valid or not is_all:
        return
    before = len(findings.faults)
    try:
        open_save(root, valid, strategy, log=findings.remarks.append)
    except UserError as error:
        # Damaged files also cause missing tensors: those faults are reported already.
        if before == 0 or len(valid) == len({*expected, *save.files}):
            findings.faults += [f"save {save.label}: {problem}" for problem in error.problems]


def _complete(root: Path, findings: _Findings) -> None:
    """Complete weights: every file, and the index."""
    index = next((root / name for name in INDEX_NAMES if (root / name).is_file()), None)
    try:
        source = open_complete(root)
    except UserError as error:
        findings.faults.append(str(error))
        files = _files_of(root, index)
    else:
        files = list(source.headers)
        index = source.index
        _remark(source, findings)
    files += [file for file in optimizer_files(root) if file not in files]
    valid = [file for file in files if findings.file(file)]
    if index is not None:
        findings.faults += _strays(index, valid)


def _remark(source: Source, findings: _Findings) -> None:
    """Files that were skipped, and tensors that only the model can show to be missing."""
    findings.remarks += source.remarks
    findings.remarks += [
        f"{file} lacks `{name}`, which the index lists: a model that ties or derives it does "
        "without" for name, file in sorted(source.promised.items())
    ]  # fmt: skip


def _files_of(root: Path, index: Path | None) -> list[Path]:
    """The files to check where they are not valid together."""
    if index is None:
        return sorted(file for end in RANK_SUFFIXES for file in root.glob(f"[!.]*{end}"))
    try:
        names = sorted({*read_index(index).values()})
    except UserError:
        return []
    return [root / name for name in names if (root / name).is_file()]


def _strays(index: Path, files: Collection[Path]) -> list[str]:
    """Tensors of the files that the index does not list."""
    try:
        known = read_index(index)
    except UserError:
        return []
    places = {name: index.parent / file for name, file in known.items()}
    listed = set(places.values())
    return [
        f"{file}: `{name}` is not in {index.name}"
        for file in files
        if file in listed
        for name in header_of(file).entries
        if places.get(name) != file
    ]
