"""Conversion of files: of torch and MindSpore (`.ckpt`, `.pt`, `.pth`, `.bin`) to safetensors, and
of safetensors to the `.ckpt` of MindSpore.

Owns which file becomes which, and that outputs appear complete. Memory: blocks in flight; files of
torch are mapped. `converted_file` owns the content of a new file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError, did_you_mean
from launcher.weights.complete import WEIGHT_SUFFIXES
from launcher.weights.forms import INDEX_NAME, TORCH_INDEX_NAME, read_index
from launcher.weights.log import Log, no_log
from launcher.weights.offline.converted_file import NAMED, Task, content_of, write_content
from launcher.weights.offline.slicing import copy_side_files
from launcher.weights.reading.transfer import Files
from launcher.weights.streaming.new_folder import folder_aside
from launcher.weights.streaming.stream import Progress
from launcher.weights.threads import in_parallel

SUFFIXES = tuple(suffix for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors")
"""Extensions of files that become safetensors."""


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    files: tuple[Path, ...]
    tensors: int
    total_bytes: int


@dataclass(frozen=True)
class _Conversion:
    """One file to convert, and the path of the new one below the output folder."""

    origin: Path
    target: Path


def ckpt_to_safetensors(
    file_path: str | os.PathLike[str],
    save_path: str | os.PathLike[str] | None = None,
    name_map: Mapping[str, str] | None = None,
    file_name_regex: str | None = None,
    processes_num: int = 1,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    log: Log = no_log,
) -> Converted:
    """Convert a file of torch or MindSpore, or all in a folder, to safetensors in the folder
    `save_path`.

    Rank folders in a folder are each converted into a folder of their own. Of any other folder the
    files in it, the index, configuration and tokenizer are converted or copied. Without `save_path`
    a single file is converted beside the old one. `name_map`: name of a tensor to its new name.
    `file_name_regex`: converts the files whose name matches. `processes_num`: files at a time.
    Texts among the tensors, which safetensors cannot hold, are left out and logged.
    Name and arguments are MindSpore's. Raises `UserError`.
    """
    task = Task("safetensors", SUFFIXES, dict(name_map or {}))
    return _run(task, Path(file_path), save_path, file_name_regex, processes_num, overwrite,
                progress, log)  # fmt: skip


def safetensors_to_ckpt(
    file_path: str | os.PathLike[str],
    save_path: str | os.PathLike[str] | None = None,
    name_map: Mapping[str, str] | None = None,
    file_name_regex: str | None = None,
    processes_num: int = 1,
    *,
    crc_check: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    log: Log = no_log,
) -> Converted:
    """Convert a file of safetensors, or all in a folder, to `.ckpt` files that MindSpore reads.

    The mirror image of `ckpt_to_safetensors`, whose arguments it has. Tensors are in the order of
    their names. Tensors without elements, which the format cannot hold, are left out and logged.
    `crc_check`: end each file in a checksum, which `mindspore.load_checkpoint(...,
    crc_check=True)` verifies. Raises `UserError`, also for a dtype that the format does not have.
    """
    task = Task("ckpt", (".safetensors",), dict(name_map or {}), crc_check)
    return _run(task, Path(file_path), save_path, file_name_regex, processes_num, overwrite,
                progress, log)  # fmt: skip


def _run(
    task: Task, origin: Path, save_path: str | os.PathLike[str] | None, regex: str | None,
    workers: int, overwrite: bool, progress: Progress | None, log: Log,
) -> Converted:  # fmt: skip
    if not origin.is_dir():
        jobs = [_Conversion(origin, Path(f"{origin.stem}{task.container.extension}"))]
        folder = origin.parent if save_path is None else Path(save_path)
        with _file_aside(folder, jobs[0].target, overwrite) as scratch:
            return _convert(task, jobs, scratch, folder, 1, progress, log)[0]
    if save_path is None:
        raise UserError(
            f"{origin} is a folder", rule="its files are converted into another folder",
            advice="Give save_path (--save_path)",
        )  # fmt: skip
    jobs = _jobs(task, origin, regex)
    target = Path(save_path)
    with folder_aside(target, origin, overwrite=overwrite, option="--save_path") as scratch:
        converted, weight_map = _convert(task, jobs, scratch, target, workers, progress, log)
        if (origin / TORCH_INDEX_NAME).is_file() and task.format == "safetensors":
            total = {"total_size": converted.total_bytes}
            content = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
            (scratch / INDEX_NAME).write_text(json.dumps(content, indent=2) + "\n")
        if all(job.target.parent == Path() for job in jobs):
            copy_side_files(origin, scratch)
    return converted


@contextmanager
def _file_aside(folder: Path, name: Path, overwrite: bool) -> Iterator[Path]:
    """A folder for one new file, which is moved into `folder` when it is complete."""
    target = folder / name
    if target.exists() and not overwrite:
        raise UserError(
            f"{target} exists",
            rule="existing files are not replaced by default",
            advice="Give another --save_path, or --overwrite",
        )
    scratch, is_new = folder / f".{name}.tmp", not folder.exists()
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        os.replace(scratch / name, target)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written: {error.strerror}",
            rule="its folder must be writable and have room",
            advice="Give another --save_path",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new and not target.exists():
            with suppress(OSError):
                folder.rmdir()


def _jobs(task: Task, folder: Path, regex: str | None) -> list[_Conversion]:
    """The files of a folder to convert. Raises `UserError` without any, or for equal targets."""
    ranks = sorted(path for path in folder.glob("rank*") if path.is_dir())
    try:
        wanted = re.compile(regex or "").search
    except re.error as error:
        raise UserError(
            f"file_name_regex = {regex!r}", rule=f"it is not a regular expression: {error}"
        ) from None
    index = folder / (TORCH_INDEX_NAME if ".bin" in task.suffixes else INDEX_NAME)
    listed = {*read_index(index).values()} if index.is_file() else None
    found = [
        _Conversion(file, file.relative_to(folder).with_name(_new_name(task, file)))
        for place in ranks or [folder]
        for file in sorted(place.iterdir())
        if file.suffix in task.suffixes and not file.name.startswith(".") and file.is_file()
        and wanted(file.name) and (listed is None or ranks or file.name in listed)
    ]  # fmt: skip
    if not found:
        names = sorted(path.name for path in (ranks or [folder])[0].iterdir())
        raise UserError(
            f"{folder} holds no file to convert",
            rule=f"such files end in {', '.join(task.suffixes)}"
            + (f", and {regex!r} is to be found in the name" if regex else ""),
            nearest=f"There are: {', '.join(names[:NAMED])}" if names else "",
            advice="Give a file, a folder of files, or a folder of rank folders",
        )
    by_target: dict[Path, _Conversion] = {}
    for job in found:
        other = by_target.setdefault(job.target, job)
        if other is not job:
            raise UserError(
                f"{other.origin} and {job.origin} would both become {job.target}",
                rule="every file needs a target of its own",
                advice="Choose with --file_name_regex",
            )
    return found


def _new_name(task: Task, file: Path) -> str:
    """`pytorch_model-00001-of-00002.bin` becomes `model-00001-of-00002.safetensors`."""
    stem = file.stem.removeprefix("pytorch_") if file.suffix == ".bin" else file.stem
    return f"{stem}{task.container.extension}"


def _convert(
    task: Task, jobs: list[_Conversion], scratch: Path, folder: Path, workers: int,
    progress: Progress | None, log: Log,
) -> tuple[Converted, dict[str, str]]:  # fmt: skip
    """Convert into `scratch`. Returns the result, with paths in `folder`, and the map from tensor
    to file name."""
    used, total, tensors, weight_map = set[str](), 0, 0, dict[str, str]()
    sizes = [job.origin.stat().st_size if job.origin.is_file() else 0 for job in jobs]

    def one(job: _Conversion) -> dict[str, int]:
        target = scratch / job.target
        target.parent.mkdir(parents=True, exist_ok=True)
        with Files() as files:
            content = content_of(task, job.origin, files, log)
            used.update(content.names)
            write_content(task, target, content)
        return {part.name: part.nbytes for part in content.parts}

    for start in range(0, len(jobs), workers):
        for job, written in zip(jobs[start:], in_parallel(one, jobs[start : start + workers],
                                                          workers), strict=False):  # fmt: skip
            tensors, total = tensors + len(written), total + sum(written.values())
            weight_map |= dict.fromkeys(written, job.target.name)
        if progress is not None:
            progress(sum(sizes[: start + workers]), sum(sizes))
    _check_used(task.names, used)
    files = tuple(folder / job.target for job in jobs)
    return Converted(files, tensors, total), weight_map


def _check_used(name_map: Mapping[str, str], names: set[str]) -> None:
    for name in name_map:
        if name not in names:
            raise UserError(
                f"name_map renames `{name}`, which is in no file",
                rule="the names of a map are those of tensors",
                nearest=did_you_mean(name, names),
            )


def read_name_map(path: Path) -> dict[str, str]:
    """A JSON map from name to new name. Raises `UserError`."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON", rule=str(error)) from error
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise UserError(f"{path} is not a map of names", rule='{"old name": "new name"} is needed')
    return content
