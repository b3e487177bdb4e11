"""Remote shards, by `fsspec`, which is imported only when a URL is read.

Owns every call of fsspec. Invariants: a range that fails is tried again a few times, and the last
error names the URL; nothing of a URL that may be a credential (user, password, query) is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from launcher.data.streaming.ranges import changed
from launcher.errors import UserError, shown_url
from launcher.json_text import printable

ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 0.5
"""Before the second attempt; each later pause is twice as long."""
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified",
                 "updated", "created", "Last-Modified", "blob_id")  # fmt: skip
"""What file systems call the version of a file."""
_TRY_AGAIN = (408, 425, 429)
"""HTTP status codes of requests that may succeed later, beside 5xx."""
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file that a URL names."""

    url: str
    size: int
    version: str
    below: str = ""


def is_url(place: str) -> bool:
    """Whether a place is opened by fsspec."""
    return "://" in place


def has_glob(url: str) -> bool:
    """Whether a URL names several files; brackets of an IPv6 address do not."""
    _, mark, rest = url.rpartition("://")
    below = rest.partition("/")[2] if mark else rest
    return any(mark in below for mark in "*[")


def find_remote(place: str, suffixes: Sequence[str]) -> list[RemoteFile]:
    """The files of a URL: a file, a folder or a glob, sorted by path. Raises UserError."""
    system, path = _opened(place)
    wanted = tuple(suffixes)

    def listed() -> list[tuple[str, str]]:
        if has_glob(path):
            return [(found, "") for found in sorted(system.glob(path))]
        if shown_url(place).lower().endswith(wanted) or not system.isdir(path):
            return [(path, "")]
        root = path.rstrip("/")
        names = (str(name) for name in system.find(path))
        return [(name, _below(name, root)) for name in sorted(names)]

    files = [
        (name, below)
        for name, below in with_retries(place, listed)
        if name == path or name.lower().endswith(wanted)
    ]
    if not files:
        raise UserError(
            f"data_loader: {shown_url(place)} has no file ending in {', '.join(suffixes)}",
            rule="a dataset needs at least one file",
            advice="Give the URL of a file, a folder or a glob",
        )
    query = place.partition("?")[2]
    return [
        _described(place if name == path else system.unstrip_protocol(name), below, query)
        for name, below in files
    ]


def _below(name: str, root: str) -> str:
    return name.rpartition(root + "/")[2]


def _described(url: str, below: str, query: str) -> RemoteFile:
    if query and "?" not in url:
        url = f"{url}?{query}"
    size, version = _size_and_version(url)
    return RemoteFile(url=url, size=size, version=version, below=below)


def _size_and_version(url: str) -> tuple[int, str]:
    system, path = _opened(url)

    def described() -> dict[str, Any]:
        system.invalidate_cache()
        found: dict[str, Any] = system.info(path)
        return found

    info = with_retries(url, described)
    if info.get("size") is None:
        raise UserError(
            "the server reports no size",
            where=shown_url(url),
            rule="remote files are read in ranges of bytes",
            advice="Use a server that supports range requests, or copy the files",
        )
    version = [f"{key}={info[key]}" for key in _VERSION_KEYS if info.get(key) is not None]
    return int(info["size"]), " ".join(version)


class RemoteRanges:
    """A remote file whose ranges are requested."""

    def __init__(self, url: str, size: int, version: str) -> None:
        self.name, self.size = shown_url(url), size
        self._url, self._version = url, version
        self._system, self._path = _opened(url)

    def read(self, start: int, stop: int) -> bytes:
        def requested() -> bytes:
            content = self._system.cat_file(self._path, start=start, end=stop)
            if len(content) < stop - start:
                raise OSError(f"{len(content)} of {stop - start} bytes arrived")
            return bytes(content)

        content = with_retries(self._url, requested)
        if len(content) > stop - start:
            raise UserError(
                f"the server sent {len(content)} bytes instead of a range of {stop - start}",
                where=self.name,
                rule="remote files are read in ranges of bytes",
                advice="Use a server that supports range requests, or copy the files",
            )
        return content

    def check_unchanged(self) -> None:
        if _size_and_version(self._url) != (self.size, self._version):
            raise changed(self.name)


def with_retries(url: str, request: Callable[[], T]) -> T:
    """The result of a request, tried ATTEMPTS times. Raises UserError, which names the URL."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except UserError:
            raise
        except Exception as raised:
            error = _origin(raised)
            if attempt == ATTEMPTS or _is_permanent(error):
                raise _failed(url, error, attempt) from None  # its text may hold credentials
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _origin(error: BaseException) -> BaseException:
    """The first cause of an error: file systems raise FileNotFoundError for failed requests."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_permanent(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRY_AGAIN
    return isinstance(error, _PERMANENT)


def _failed(url: str, error: BaseException, attempts: int) -> UserError:
    name, status = shown_url(url), getattr(error, "status", None)
    reason = f"HTTP status {status}" if status else type(error).__name__
    text = " ".join(str(error).split())
    for secret in (url, *_secrets(url)):
        text = text.replace(secret, name if secret == url else "...")
    if text and not status:
        reason += f": {printable(text[:200])}"
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    return UserError(
        f"cannot be read ({reason}){tried}",
        where=name,
        rule="every file of a dataset must be readable",
        advice="Check the address, the server and the credentials in the environment",
    )


def _secrets(url: str) -> list[str]:
    server = url.partition("://")[2].partition("/")[0]
    return [text for text in (server.rpartition("@")[0], url.partition("?")[2]) if text]


@cache
def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path there. Raises UserError for what is not installed."""
    protocol = url.partition("://")[0]
    try:
        import fsspec
    except ImportError as error:
        raise UserError(
            f"data_loader: {shown_url(url)} is read with `fsspec`, which is not installed",
            rule="remote files need the package of their protocol",
            advice="Install it: pip install 'slipway[remote]'",
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"data_loader: {shown_url(url)} needs a package ({error})",
            rule=f"fsspec reads {protocol}:// with a package of its own",
            advice=f"Install it: pip install {_PACKAGES.get(protocol, f'fsspec[{protocol}]')}",
        ) from error
    except ValueError as error:
        raise UserError(
            f"data_loader: {shown_url(url)}: {printable(str(error)[:200])}",
            rule="a URL needs a protocol that fsspec knows",
            nearest="Known: http, https, s3, gs, abfs, hf, memory, ...",
        ) from error
    except Exception as error:  # what a package needs to open a place: an account, a configuration
        raise _failed(url, _origin(error), 1) from None
    return system, str(path)


_PACKAGES = {
    "http": "'slipway[remote]'",
    "https": "'slipway[remote]'",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
}
