"""Complete weights in a folder: which files to read where there are several sets.

Owns that choice for the checks of a configuration, the ranks of a run and the tools. It is the
choice of `from_pretrained` of transformers:

    model.safetensors  >  model.safetensors.index.json  >  pytorch_model.bin  >  its index

Sets that are skipped are reported. Where two are left and neither transformers nor an index
decides, or where they are of two models, it is an error. A set whose files are all missing does not
count. Invariant: the files of a choice are one set, and each of them exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from launcher.errors import UserError
from launcher.weights.formats import header_of
from launcher.weights.formats.placeholders import unfinished_download
from launcher.weights.forms import (
    EXTRAS_NAME,
    INDEX_NAME,
    INDEX_NAMES,
    TORCH_INDEX_NAME,
    read_index,
)
from launcher.weights.obsolete import has_obsolete_name
from launcher.weights.threads import in_parallel

SINGLE_NAME = "model.safetensors"
TORCH_SINGLE_NAME = "pytorch_model.bin"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Extensions of weight files, the preferred format first."""
_NO_WEIGHTS = re.compile(
    r"training_args\.bin|(optimizer|scheduler|sampler|scaler)(_\d+)?\.(pt|bin)|"
    r"rng_state(_\d+)?\.pth"
)
"""Files of torch beside weights that hold none."""
_NO_SETS = re.compile(rf"(adapter_model|consolidated|optimizer-\d|{re.escape(EXTRAS_NAME)}$)")
"""Files that are not a set where there are others: an adapter, weights under the names of Meta or
Mistral, optimizer state, and numbers of the run."""
_MODEL = r"(?:pytorch_)?model"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<end>.*)")
_VARIANT = re.compile(rf"{_MODEL}\.(\w+)(-\d{{5}}-of-\d{{5}})?\.\w+|"
                      rf"{_MODEL}-\d{{5}}-of-\d{{5}}\.(\w+)\.\w+")  # fmt: skip
"""`model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`: the `variant` of
transformers."""
_HEAD = re.compile(
    r"(.+\.)?(lm_head|lm_head\.decoder|embed_out|output_projection|cls\.predictions\.decoder|"
    r"generator_lm_head|lm_loss|proj_out|pred_layer\.proj)\.(weight|bias)|"
    r"(output|head|decoder)\.weight"
)
"""Names of the output projection in the transformers models that may tie it."""
_META_FOLDER = "original"
"""Subfolder of repositories of Meta with the weights under its own names."""
HEADER_THREADS = 8
MOST_SHARDS = 10_000
SHOWN = 5
"""Names in a message."""
Form = Literal["single", "index", "foreign", "loose"]


@dataclass(frozen=True)
class WeightSet:
    """Files that together are complete weights, or were."""

    label: str
    """Its name in messages."""
    form: Form
    folder: Path
    files: Mapping[Path, set[str] | None]
    """File to the tensors it should hold; None: unknown."""
    index: Path | None = None

    @cached_property
    def missing(self) -> list[str]:
        """Names of its files that do not exist, or are broken links. Only an index, or the numbers
        in the names of shards, show that a file is missing."""
        all_count = self.index is not None or self.is_shards
        gone = (file for file in self.files if not os.path.exists(file))
        return sorted(file.name for file in gone if all_count or os.path.islink(file))

    @property
    def is_gone(self) -> bool:
        """Whether none of its files exists."""
        return bool(self.files) and len(self.missing) == len(self.files)

    @property
    def is_shards(self) -> bool:
        """Whether it is shards by the names of its files."""
        return all(_SHARD.fullmatch(file.name) for file in self.files)

    @property
    def is_safetensors(self) -> bool:
        """Whether its files are safetensors, by their names."""
        return all(file.suffix == ".safetensors" for file in self.files)

    def __str__(self) -> str:
        if self.missing:
            return f"{self.label} ({len(self.missing)} of its {len(self.files)} files are gone)"
        return f"{self.label} ({len(self.files)} files)" if len(self.files) > 1 else self.label


@dataclass(frozen=True)
class Choice:
    """The set that is read, and what was passed over."""

    taken: WeightSet
    passed_over: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """One line about what is read and what is skipped; none where there was no choice."""
        if not self.passed_over:
            return ()
        others = ", ".join(self.passed_over[:SHOWN])
        more = len(self.passed_over) - SHOWN
        return (
            f"{self.taken.folder}: {self.taken} is read, as transformers does; passed over: "
            f"{others}{f' and {more} more' if more > 0 else ''}",
        )


def choose(folder: Path) -> Choice:
    """The complete weights in `folder`. Raises `UserError` where there are none, where some of
    their files are missing, and where two sets are ambiguous.

    Indexes are read; headers only where two sets are compared.
    """
    names = [child.name for child in listed(folder)]
    weights = [name for name in names if is_weight_file(name)]
    sets = _sets(folder, weights)
    if not sets:
        raise _nothing(folder, names)
    named = [known for known in sets if known.form != "loose"] or sets
    taken = next((known for known in named if not known.is_gone), named[0])
    _check_there(taken)
    others = [known for known in sets if known is not taken]
    for other in others:
        _check_decided(taken, other)
    held = {file.name for known in sets for file in known.files} | {EXTRAS_NAME}
    rest = [name for name in weights if name not in held and not name.startswith("optimizer-")]
    if taken.form == "single" and _is_broken(folder / INDEX_NAME):
        rest.append(f"{INDEX_NAME} (which is not an index of weights)")
    if any((folder / _META_FOLDER).glob("consolidated*")):
        rest.append(f"{_META_FOLDER}/")
    return Choice(taken, (*map(str, others), *rest))


def listed(folder: Path) -> list[Path]:
    """The entries of `folder`, sorted by name. Raises `UserError` when it cannot be listed."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed: {error.strerror}", advice="Check the rights of the folder"
        ) from error


def is_weight_file(name: str) -> bool:
    """Whether a file holds weights, by its name. Hidden files are unfinished, or not weights."""
    is_other = name.startswith(".") or _NO_WEIGHTS.fullmatch(name) is not None
    return name.endswith(WEIGHT_SUFFIXES) and not is_other


def may_be_left_out(name: str) -> bool:
    """Whether a tensor may be missing in files, by its name: an obsolete buffer, or a head that may
    be tied to the embedding. The class of the model decides, once it is built."""
    return has_obsolete_name(name) or _HEAD.fullmatch(name) is not None


def _sets(folder: Path, names: Sequence[str]) -> list[WeightSet]:
    """All sets, in order of preference: those with a well-known name or an index, as transformers
    finds them, then groups of other files."""
    single = list(_single(folder, SINGLE_NAME))
    known = _distinct([
        *single,
        *_indexed(folder, INDEX_NAME, "index", is_needed=not single),
        *(found for name in INDEX_NAMES if name not in (INDEX_NAME, TORCH_INDEX_NAME)
          for found in _indexed(folder, name, "foreign")),
    ])  # fmt: skip
    if all(one.is_gone for one in known):
        torch = [*_single(folder, TORCH_SINGLE_NAME), *_indexed(folder, TORCH_INDEX_NAME, "index")]
        known += _distinct(torch)
    held = {file.name for one in known for file in one.files}
    others = [name for name in names
              if name not in held and not (known and _VARIANT.fullmatch(name))]  # fmt: skip
    loose = [_loose(folder, [name for name in others if name.endswith(suffix)])
             for suffix in WEIGHT_SUFFIXES]  # fmt: skip
    if not known:
        return next(filter(None, loose), [])
    return known + [one for group in loose for one in group if one.is_shards]


def _single(folder: Path, name: str) -> Iterator[WeightSet]:
    if os.path.exists(folder / name):
        yield WeightSet(name, "single", folder, {folder / name: None})


def _indexed(folder: Path, name: str, form: Form, *, is_needed: bool = True) -> Iterator[WeightSet]:
    """The set that an index lists. Raises `UserError` for an index that cannot be read, unless
    another set comes before it."""
    index = folder / name
    if os.path.isfile(index) and (is_needed or not _is_broken(index)):
        names: dict[str, set[str]] = {}
        for tensor, file in read_index(index).items():
            names.setdefault(file, set()).add(tensor)
        yield WeightSet(name, form, folder, {folder / file: names[file] for file in names}, index)


def _is_broken(index: Path) -> bool:
    """Whether an index exists and cannot be read."""
    try:
        return os.path.isfile(index) and not read_index(index)
    except UserError:
        return True


def _loose(folder: Path, names: Sequence[str]) -> list[WeightSet]:
    """Sets by file names alone: shards with one total are a set, and so are all other files
    together. Variants count only where there is nothing else."""
    found = [name for name in names if not _NO_SETS.match(name)] or list(names)
    found = [name for name in found if re.match(_MODEL, name)] or found
    found = [name for name in found if not _VARIANT.fullmatch(name)] or found
    groups: dict[str, list[str]] = {}
    for name in found:
        match = _SHARD.fullmatch(name)
        single = name if _VARIANT.fullmatch(name) else ""
        label = f"{match['stem']}-*-of-{match['total']}{match['end']}" if match else single
        groups.setdefault(label, []).append(name)
    return [
        WeightSet(label or group[0], "loose", folder,
                  dict.fromkeys(folder / name for name in _with_missing(group)))
        for label, group in groups.items()
    ]  # fmt: skip


def _with_missing(group: Sequence[str]) -> list[str]:
    """The names of all shards, including those that are missing."""
    match = _SHARD.fullmatch(group[0])
    total = int(match["total"]) if match else 0
    if match is None or total > MOST_SHARDS:
        return list(group)
    every = [f"{match['stem']}-{number:05d}-of-{match['total']}{match['end']}"
             for number in range(1, total + 1)]  # fmt: skip
    return [*every, *(name for name in group if name not in every)]


def _distinct(sets: Sequence[WeightSet]) -> list[WeightSet]:
    """`sets` without those contained in another: a single file that an index lists, or a second
    index of the same files."""
    kept: list[WeightSet] = []
    for one in sorted(sets, key=lambda one: one.index is None):
        if not any(one.files.keys() <= other.files.keys() for other in kept):
            kept.append(one)
    return [one for one in sets if one in kept]


def _check_there(taken: WeightSet) -> None:
    """Check that all files of a set exist. Raises `UserError`."""
    missing = taken.missing
    if not missing:
        return
    _check_link(taken.folder / missing[0], taken)
    what = f"{len(missing)} file" + "s" * (len(missing) > 1)
    shown = ", ".join(missing[:SHOWN])
    raise UserError(
        f"{taken.index} names {what} that cannot be found: {shown}" if taken.index else
        f"{taken.folder} lacks {what} of {taken.label}: {shown}",
        rule="all files of an index lie beside it" if taken.index else
        f"by the names of the others there are {len(taken.files)}",
        nearest=unfinished_download(taken.folder, missing),
        advice="Copy the missing files beside the index" if taken.index else
        "Copy the missing files beside the others",
    )  # fmt: skip


def _check_link(file: Path, taken: WeightSet) -> None:
    """Check that a missing file of a set is not a broken link. Raises `UserError`."""
    if not os.path.islink(file):
        return
    try:
        os.stat(file)
    except OSError as error:
        raise UserError(
            f"{file} is a link to {os.readlink(file)} that cannot be followed: {error.strerror}",
            rule="the cache of the Hub has links, to files of a folder beside it (blobs/)",
            nearest=unfinished_download(taken.folder, taken.missing),
            advice="Download it again, or copy the files that the links lead to",
        ) from error


def _check_decided(taken: WeightSet, other: WeightSet) -> None:
    """Check that `taken` is preferred to `other` for a reason. Raises `UserError`."""
    if other.missing or taken.is_safetensors != other.is_safetensors:
        return
    difference = ""
    if other.form == "loose" and taken.index is not None:
        return  # the index lists the files of the model
    if taken.form == "single" and taken.is_safetensors and other.form != "foreign":
        difference = _difference(taken, other)
        if not difference:
            return
    raise UserError(
        f"{taken.folder} holds two sets of weights: {taken} and {other}",
        rule="a folder holds the weights of one model once, and it is ambiguous which to load"
        + (f": {difference}" if difference else ""),
        advice="Move the files of one of them into another folder",
    )


def _difference(taken: WeightSet, other: WeightSet) -> str:
    """The first tensor that differs between two sets; empty where they may be of one model, and
    where `other` cannot be read. Raises `UserError` when `taken` cannot be read."""
    try:
        passed_over = _shapes(other)
    except UserError:
        return ""
    shapes = _shapes(taken)
    for name in sorted(shapes.keys() & passed_over.keys()):
        if shapes[name] != passed_over[name]:
            return f"`{name}` is {list(shapes[name])} in one, {list(passed_over[name])} in another"
    alone = (name for name in sorted(shapes.keys() ^ passed_over.keys())
             if not may_be_left_out(name))  # fmt: skip
    name = next(alone, "")
    return f"`{name}` is in one of them alone" if name else ""


def _shapes(known: WeightSet) -> dict[str, tuple[int, ...]]:
    headers = in_parallel(header_of, list(known.files), HEADER_THREADS)
    return {name: entry.shape for header in headers for name, entry in header.entries.items()}


def _nothing(folder: Path, names: Sequence[str]) -> UserError:
    more = " ..." * (len(names) > 8)
    return UserError(
        f"{folder} holds no weights",
        rule="complete weights are *.safetensors, or files of torch (*.bin, *.pt, *.ckpt)",
        nearest=unfinished_download(folder),
        advice=f"It holds: {', '.join(names[:8]) + more or 'nothing'}",
    )
