"""`.ckpt` files for tests: those that MindSpore wrote, what they hold, and values made by hand."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.mindspore.ckpt_writer import value_start
from launcher.mindspore.protobuf_wire import integers, nested
from launcher.weights.source import open_complete
from tests.weights.content import Content, content, extras

GOLDEN = Path(__file__).parent / "fixtures/ckpt/golden"
RANKS = GOLDEN.parent / "mp2"
STRATEGY = GOLDEN.parent / "strategy"
CHUNK = 1024
"""Bytes of a chunk of `chunked*.ckpt`, for which the limit of MindSpore was lowered."""
EXPECTED = {
    "append": "append", "chunked": "chunked", "chunked_async": "chunked", "chunked_crc": "chunked",
    "crc": "small", "dtypes": "dtypes", "converted/safetensors_to_ckpt/dtypes": "dtypes",
}  # fmt: skip
"""File to the file of `expected/` that has its tensors."""


def whole(path: Path) -> Content:
    """Everything that complete weights hold."""
    source = open_complete(path)
    return content(source) | extras(source)


def expected(name: str) -> Content:
    """The tensors that MindSpore put into the golden file `name`."""
    return whole(GOLDEN / "expected" / f"{EXPECTED[name]}.safetensors")


def expected_texts() -> dict[str, str]:
    """The texts in `append.ckpt`."""
    found: dict[str, str] = json.loads((GOLDEN / "expected/append_text.json").read_text())
    return found


def value(name: str, shape: tuple[int, ...], content: bytes, dtype: str = "F32") -> bytes:
    """A value with any content."""
    return value_start(name, dtype, shape, len(content)) + content


def raw_value(tag: bytes, dims: tuple[int, ...], dtype: bytes, content: bytes) -> bytes:
    """A value from fields that need not fit together."""
    tensor = integers(1, dims) + nested(2, dtype) + nested(3, content)
    return nested(1, nested(1, tag) + nested(2, tensor))
