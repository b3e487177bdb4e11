"""Streams of URLs: the rows of the same local files, retries, and messages without credentials."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.data.streaming import remote
from launcher.data.streaming.build import MachineRanks, build_stream
from launcher.data.streaming.rows import StreamingRows
from launcher.data.streaming.shards import find_shards
from launcher.data.streaming.worker import ThreadProducer
from launcher.errors import UserError

from .streams import TOKENIZER, equal, rows_of, section_of, stream, write_lines, write_shards

SECRET = "s3cr3t"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write_shards(tmp_path / "shards")


@pytest.fixture
def memory(shards: list[Path]) -> Iterator[str]:
    """The shards in a folder of `memory://`, which exists in this process alone."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for shard in shards:
        system.pipe_file(f"/corpus/{shard.name}", shard.read_bytes())
    system.pipe_file("/corpus/README.md", b"not data")
    yield "memory://corpus"
    system.rm("/corpus", recursive=True)


@pytest.mark.parametrize("place", ["", "/*.*", "/c.parquet"])
def test_rows_of_memory_are_those_of_files(
    shards: list[Path], memory: str, tmp_path: Path, place: str
) -> None:
    files = shards[2:] if place.endswith("parquet") else shards
    with stream([memory + place], tmp_path / "cache") as dataset:
        found = rows_of(dataset, 0, 150)
    with stream(files, tmp_path / "other") as local:
        assert equal(found, rows_of(local, 0, 150))
        assert local.fingerprint == dataset.fingerprint


def test_memory_is_read_by_this_process(memory: str, tmp_path: Path) -> None:
    dataset = build_stream(
        section_of([memory]), tokenizer=TOKENIZER, seq_length=16, cache_dir=tmp_path / "cache",
        seed=5, once=lambda prepare: prepare(), log=print,
        machine=MachineRanks(once=lambda prepare: prepare()),
    )  # fmt: skip
    rows = dataset.rows
    assert isinstance(rows, StreamingRows)
    rows.row(0)
    assert isinstance(rows._producer, ThreadProducer)
    rows.close()


def test_a_remote_shard_that_changes_is_found(
    memory: str, tmp_path: Path, shards: list[Path]
) -> None:
    import fsspec

    content = write_lines(tmp_path / "long.jsonl", 0, 2000).read_bytes()
    fsspec.filesystem("memory").pipe_file("/corpus/long.jsonl", content)
    with stream([f"{memory}/long.jsonl"], tmp_path / "cache") as dataset:
        rows_of(dataset, 0, 5)
        fsspec.filesystem("memory").pipe_file("/corpus/long.jsonl", content.replace(b"s", b"z"))
        with pytest.raises(UserError, match=r"long\.jsonl.*has changed"):
            rows_of(dataset, 5, 100_000)


class Server(ThreadingHTTPServer):
    """Serves a folder with ranges; `faults`: statuses of the next answers."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.has_ranges = folder, [], True
        self.ranges: list[tuple[int, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        if self.server.faults:
            self._send(self.server.faults.pop(0), b"", body)
            return
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self._send(404, b"", body)
            return
        content = path.read_bytes()
        asked = self.headers.get("Range", "")
        if asked and self.server.has_ranges:
            first, last = asked.removeprefix("bytes=").split("-")
            start, stop = int(first), int(last or len(content) - 1) + 1
            self.server.ranges.append((start, stop))
            self._send(206, content[start:stop], body, f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self._send(200, content, body)

    def _send(self, status: int, content: bytes, body: bool, part: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"1"')
        if self.server.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def server(shards: list[Path]) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    made = Server(shards[0].parent)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def test_rows_of_a_server_are_those_of_files(
    shards: list[Path], server: Server, tmp_path: Path
) -> None:
    urls = [f"{server.url}/{shard.name}" for shard in shards]
    with stream(urls, tmp_path / "cache") as dataset:
        server.faults[:] = [500, 503, 429]
        found = rows_of(dataset, 0, 150)
        cursor = streaming_rows(dataset.rows).cursor(149)
    with stream(shards, tmp_path / "other") as local:
        assert equal(found, rows_of(local, 0, 150))
        assert local.fingerprint == dataset.fingerprint
    assert not server.faults
    with stream(urls, tmp_path / "cache") as dataset:  # indexed already
        streaming_rows(dataset.rows).seek(cursor)
        server.ranges.clear()
        assert equal(rows_of(dataset, 149, 150), found[149:])
    assert server.ranges


def streaming_rows(rows: Any) -> StreamingRows:
    assert isinstance(rows, StreamingRows)
    return rows


@pytest.mark.parametrize(
    ("faults", "path", "message"),
    [
        ([], "absent.jsonl", "cannot be read"),
        ([403] * 9, "a.jsonl", "403"),
        ([503] * 99, "a.jsonl", "after 5 attempts"),
    ],
)
def test_the_last_error_names_the_url_without_its_query(
    server: Server, tmp_path: Path, faults: list[int], path: str, message: str
) -> None:
    server.faults[:] = faults
    with (
        pytest.raises(UserError) as caught,
        stream([f"{server.url}/{path}?token={SECRET}"], tmp_path / "cache"),
    ):
        pass
    text = str(caught.value)
    assert message in text
    assert f"{server.url}/{path}" in text
    assert SECRET not in text


def test_a_server_without_ranges_is_refused(server: Server, tmp_path: Path) -> None:
    write_lines(server.folder / "long.jsonl", 0, 100)
    server.has_ranges = False
    with (
        pytest.raises(UserError, match="rang"),
        stream([f"{server.url}/long.jsonl"], tmp_path / "cache") as dataset,
    ):
        rows_of(dataset, 0, 100)


@pytest.mark.parametrize(
    ("place", "hidden", "package"),
    [("memory://x", "fsspec", "slipway[remote]"), ("s3://bucket/a.jsonl", "s3fs", "s3fs")],
)
def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, place: str, hidden: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, hidden, None)
    remote._opened.cache_clear()
    with pytest.raises(UserError) as caught:
        find_shards(section_of([place]).loaders["data_loader"])
    assert f"pip install {package}" in str(caught.value).replace("'", "")


def test_an_unknown_protocol_is_an_error() -> None:
    with pytest.raises(UserError, match="protocol"):
        find_shards(section_of(["nowhere://x/a.jsonl"]).loaders["data_loader"])


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://[::1]:80/a.jsonl", False), ("http://[::1]:80/[ab].jsonl", True),
     ("http://host/*.jsonl", True), ("bucket/*.jsonl", True), ("bucket/a.jsonl", False)],
)  # fmt: skip
def test_brackets_of_an_address_are_no_glob(url: str, expected: bool) -> None:
    assert remote.has_glob(url) is expected


def test_a_place_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """File systems of fsspec may read a place when they are made."""
    with pytest.raises(UserError, match=r"absent\.zip"):
        find_shards(
            section_of([f"zip://a.jsonl::file://{tmp_path}/absent.zip"]).loaders["data_loader"]
        )
