"""Results of operations that a checkpointed function keeps from its first run.

Owns the mechanism, as `torch.utils.checkpoint` takes it: a mode for the first run, and one for
those of the backward pass, in which a kept result takes the place of its operation. torch has the
same (`create_selective_checkpoint_contexts`), but for one backward pass alone, where the schedules
that split it (zero bubble) run twice, and for functions whose runs have the same operations, where
what is `remembered` has them in the first run alone.

Invariant: operations are numbered as they are called, each operator by itself, and runs agree on
the numbers. Operations that are `unselected` have none, and are never kept.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Key = tuple[Any, int]
"""An operator, and how many calls of it came before in the run."""


class _Unselected(threading.local):
    depth = 0


_unselected = _Unselected()


@contextmanager
def unselected() -> Iterator[None]:
    """In this context operations are not kept by themselves: those of a larger one, which are
    repeated together, and those that not every run has."""
    _unselected.depth += 1
    try:
        yield
    finally:
        _unselected.depth -= 1


class Numbering:
    """Numbers the operations of one run."""

    def __init__(self) -> None:
        self._calls: Counter[Any] = Counter()

    def next(self, operator: Any) -> Key | None:
        """The key of a call of `operator`; None: it is unselected."""
        if _unselected.depth:
            return None
        key = operator, self._calls[operator]
        self._calls[operator] += 1
        return key


class _Kept(NamedTuple):
    tensor: Tensor
    version: int

    def again(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError("a result that is kept for the backward pass was written into")
        return _detached(self.tensor)


def _detached(tensor: Tensor) -> Tensor:
    """The same values without their graph, which would keep itself alive. What is written into one
    of both counts as written into the other, also from inside a mode."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _FirstRun(TorchDispatchMode):
    def __init__(self, chosen: Collection[Key], results: dict[Key, Any]) -> None:
        super().__init__()
        self._chosen, self._results, self._numbering = chosen, results, Numbering()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        key = self._numbering.next(operator)
        if key is not None and key in self._chosen:
            self._results[key] = tree_map_only(
                Tensor, lambda t: _Kept(_detached(t), t._version), result
            )
        return result


class _LaterRun(TorchDispatchMode):
    def __init__(self, results: dict[Key, Any]) -> None:
        super().__init__()
        self._results, self._numbering = results, Numbering()

    def __enter__(self) -> Any:
        self._numbering = Numbering()
        return super().__enter__()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        key = self._numbering.next(operator)
        if key is not None and key in self._results:
            return tree_map_only(
                _Kept, _Kept.again, self._results[key], is_leaf=lambda x: isinstance(x, _Kept)
            )
        return operator(*args, **(kwargs or {}))


def keeping(chosen: Collection[Key]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of the first and of later runs of one call of a function, the results of
    `chosen` operations kept: a `context_fn` of `torch.utils.checkpoint`."""
    results: dict[Key, Any] = {}
    return _FirstRun(chosen, results), _LaterRun(results)
