"""Shards: the files of a streamed source, in a reproducible order.

Owns what a shard is and which there are. Invariants: credentials and queries of a URL are never
part of a name; `version` differs when the content does, as far as the server or the file system
reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from launcher.config.schema import DataLoaderSection
from launcher.data.files import find_files
from launcher.data.loaders import loader_type
from launcher.data.record_files import RECORD_SUFFIXES, SUFFIXES, format_of, with_split
from launcher.data.streaming.ranges import LocalRanges, Ranges
from launcher.data.streaming.remote import RemoteRanges, find_remote, is_url
from launcher.errors import UserError, shown_url

_STREAMED = ("json", "parquet")
_ADVICE = "JSON lines and Parquet can be streamed"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a source."""

    location: str
    """The path or URL to open."""
    size: int
    """Bytes."""
    version: str
    """Modification time in ns, or the version that a server reports."""
    below: str = ""
    """The path relative to the folder it was found in; empty for a file that the user named."""
    form: str = "json"
    """Its format, a key of `SUFFIXES`."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return shown_url(self.location) if is_url(self.location) else self.location

    @property
    def path(self) -> PurePosixPath:
        """Its name as a path."""
        return PurePosixPath(self.name)

    @property
    def is_parquet(self) -> bool:
        return self.form == "parquet"

    @property
    def is_gzip(self) -> bool:
        return self.name.lower().endswith(".gz")

    def ranges(self) -> Ranges:
        """The shard, opened for reading."""
        if is_url(self.location):
            return RemoteRanges(self.location, self.size, self.version)
        return LocalRanges(self.location, self.size, int(self.version))


def find_shards(section: DataLoaderSection) -> list[Shard]:
    """The shards that a section names, of its split: the files that are read without streaming.

    Raises UserError, also for a file of a format that is not streamed.
    """
    found: dict[str, Shard] = {}
    given = section.record_format
    suffixes = SUFFIXES[given] if given else RECORD_SUFFIXES
    for place in section.paths:
        shards = _remote(place, suffixes) if is_url(place) else _local(place, suffixes)
        for shard in shards:
            found.setdefault(shard.location, shard)
    chosen = with_split(list(found.values()), section.split, is_one=True) if found else []
    shards = [shard for shard in chosen if shard.size]
    if not shards:
        raise UserError(
            "data_loader: all files are empty" if found else "data_loader: there is no file",
            rule=f"{loader_type(section)} streams JSON lines and Parquet",
            advice="Give other files",
        )
    return [_with_format(shard, given) for shard in shards]


def _with_format(shard: Shard, given: str) -> Shard:
    form = format_of(shard.name, given)
    if form not in _STREAMED:
        raise UserError(
            f"is a file of the format {form!r}",
            where=shard.name,
            rule=_ADVICE,
            advice="Set data_loader.path to json or parquet to read such files of a folder alone, "
            "convert this one, or set streaming: False",
        )
    return replace(shard, form=form)


def _local(place: str, suffixes: Sequence[str]) -> Sequence[Shard]:
    return [
        Shard(location=str(file.path), size=file.size, version=str(file.mtime_ns), below=file.below)
        for file in find_files([place], suffixes, suffix_advice=_ADVICE)
    ]


def _remote(place: str, suffixes: Sequence[str]) -> Sequence[Shard]:
    return [
        Shard(location=file.url, size=file.size, version=file.version, below=file.below)
        for file in find_remote(place, suffixes)
    ]
