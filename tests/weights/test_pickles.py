"""Pickles are read as data: plain values come back, and nothing in them is run or trusted."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from launcher.weights.formats.pickles import BrokenPickleError, RefusedCallError, read_pickle


def plain(data: bytes) -> Any:
    """What a pickle without calls and persistent ids is."""
    return read_pickle(data, {}, lambda identity: identity)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol(protocol: int) -> None:
    shared = [1, 2]
    value = {"a": shared, "b": shared, "c": (1, (2.5, None), True), "d": -(1 << 80),
             "e": "\u00e4\n", "f": {}, "g": [[], ()], "h": list(range(2000))}  # fmt: skip
    read = plain(pickle.dumps(value, protocol))
    assert read == value
    assert read["a"] is read["b"]


def test_a_cycle_stays_a_cycle() -> None:
    value: list[Any] = []
    value.append(value)
    read = plain(pickle.dumps(value, 2))
    assert read[0] is read


def test_a_list_of_names_takes_no_memory_on_the_word_of_a_pickle() -> None:
    assert plain(b"\x80\x02]r\xff\xff\xff\x7f0j\xff\xff\xff\x7f.") == []


def test_what_grows_without_end_when_looked_into_is_not_looked_into() -> None:
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 2000
    assert isinstance(plain(doubled + b"."), tuple)
    assert plain(b"\x80\x02}" + doubled[2:] + b"K\x01s.") == {}
    with pytest.raises(RefusedCallError, match="a value"):
        plain(doubled + b")R.")


def test_nested_deeper_than_the_stack_of_python() -> None:
    deep = plain(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    assert len(deep) == 1


@pytest.mark.parametrize("data", [b".", b"a.", b"\x86.", b"R.", b"u.", b"h\x05.", b"t.", b"0.",
                                  b"Q.", b"}K\x01s.", b"(K\x01d.", b"\x93.", b"]b."])  # fmt: skip
def test_pickles_that_are_no_programs(data: bytes) -> None:
    with pytest.raises(BrokenPickleError):
        plain(b"\x80\x04" + data)
