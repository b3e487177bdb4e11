"""Pickles as data: what a pickle would build, without running it.

Owns the reading of an untrusted pickle. Torch-free. A pickle is a program for a stack machine; this
machine knows constants, lists, dicts, tuples, and the calls for which the caller gives functions.
Invariants: nothing that a pickle names is imported, called or given an attribute; memory is in
proportion to the length of the pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Call = Callable[..., Any]


class BrokenPickleError(ValueError):
    """The pickle is not a valid program."""


class RefusedCallError(ValueError):
    """The pickle calls something that is not allowed; the message is its name."""


@dataclass(frozen=True, slots=True)
class Named:
    """A global that a pickle names, `module.name`; not imported."""

    name: str


def read_pickle(data: bytes, calls: Mapping[str, Call], persistent: Call) -> Any:
    """The value that the pickle `data` describes.

    `calls`: name of each allowed callable to the function that is called in its place.
    `persistent`: gives the value of a persistent id. Sets become lists, dicts keep only string
    keys, globals become `Named`, and attributes are left out. Raises BrokenPickleError, and
    RefusedCallError for a call that is not in `calls`.
    """
    machine = _Machine(calls, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return machine.stack.pop()
            instruction = _INSTRUCTIONS.get(opcode.name)
            if instruction is None:
                raise BrokenPickleError(
                    f"files of weights do not have the instruction {opcode.name}"
                )
            instruction(machine, argument)
    except (RefusedCallError, BrokenPickleError):
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BrokenPickleError(str(error) or type(error).__name__) from error
    raise BrokenPickleError("it does not end")


class _Machine:
    """The stack of a pickle, the stacks below its marks, and its memo."""

    def __init__(self, calls: Mapping[str, Call], persistent: Call) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._calls, self._persistent = calls, persistent

    def _push(self, constant: Any) -> None:
        if isinstance(constant, str):
            constant.encode()  # raises for surrogates, which no name has
        self.stack.append(constant)

    def _put(self, key: Any) -> None:
        self._memo[key] = self.stack[-1]

    def _get(self, key: Any) -> None:
        self.stack.append(self._memo[key])

    def _last_as_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise BrokenPickleError("its stack is empty")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _mark(self, _: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def _tuple(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _list(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(items)

    def _append(self, _: Any) -> None:
        item = self.stack.pop()
        self._add([item])

    def _appends(self, _: Any) -> None:
        self._add(self._since_mark())

    def _add(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise BrokenPickleError("it appends to a value that is not a list")
        self.stack[-1].extend(items)

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append({})
        self._set(items)

    def _set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise BrokenPickleError("it sets an item of a value that is not a dict")
        pairs = zip(items[::2], items[1::2], strict=True)
        self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, str))

    def _global(self, argument: str) -> None:
        self.stack.append(Named(argument.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Named(f"{module:s}.{name:s}"))

    def _call(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not isinstance(called, Named) or called.name not in self._calls:
            raise RefusedCallError(called.name if isinstance(called, Named) else "a value")
        self.stack.append(self._calls[called.name](*arguments))

    def _build(self, _: Any) -> None:
        """Attributes of an object: left out."""
        self.stack.pop()

    def _persistent_id(self, _: Any) -> None:
        self.stack.append(self._persistent(self.stack.pop()))

    def _refuse_instance(self, argument: str) -> None:
        raise RefusedCallError(argument.replace(" ", ".", 1))


def _nothing(_: _Machine, __: Any) -> None:
    """An instruction about the encoding of the pickle."""


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
         "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
         "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        _Machine._push,
    ),
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_SET": lambda machine, _: machine._push([]),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "TUPLE1": lambda machine, _: machine._last_as_tuple(1),
    "TUPLE2": lambda machine, _: machine._last_as_tuple(2),
    "TUPLE3": lambda machine, _: machine._last_as_tuple(3),
    "MARK": _Machine._mark, "POP": _Machine._pop, "POP_MARK": _Machine._pop_mark,
    "MEMOIZE": _Machine._memoize, "TUPLE": _Machine._tuple, "LIST": _Machine._list,
    "FROZENSET": _Machine._list, "APPEND": _Machine._append, "APPENDS": _Machine._appends,
    "ADDITEMS": _Machine._appends, "DICT": _Machine._dict, "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items, "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global, "REDUCE": _Machine._call, "NEWOBJ": _Machine._call,
    "BUILD": _Machine._build, "BINPERSID": _Machine._persistent_id,
    "INST": _Machine._refuse_instance,
}  # fmt: skip
"""Instruction to its handler. Others are refused."""
