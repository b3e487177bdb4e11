"""Tensors under other names than in the files, as boxes of those that the files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from launcher.weights.pieces import Pieces

KEPT_PIECES = 256
"""Pieces of a tensor up to which they are kept once they are made."""


class Translated(Mapping[str, Pieces]):
    """Tensors by name; the pieces of each are made when it is looked up."""

    def __init__(
        self, make: Callable[[str], Pieces], names: Iterable[str], known: Mapping[str, Pieces]
    ) -> None:
        self._make, self._known = make, dict(known)
        self._names = dict.fromkeys([*names, *known])

    def __getitem__(self, name: str) -> Pieces:
        if name in self._known:
            return self._known[name]
        if name not in self._names:
            raise KeyError(name)
        pieces = self._make(name)
        if len(pieces) <= KEPT_PIECES:
            self._known[name] = pieces
        return pieces

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
