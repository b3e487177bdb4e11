"""What every rule gets, and how it says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from launcher.config.provenance import KeyProblem, Provenance
from launcher.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Check:
    """One configuration under examination."""

    config: Config
    provenance: Provenance
    world_size: int | None
    """Processes of the run; None: not started yet, so nothing is compared with it."""

    @property
    def mode(self) -> str:
        """The run mode, or an empty text."""
        return self.config.run_mode or ""

    @property
    def trains(self) -> bool:
        """Whether the run trains."""
        return self.mode in ("train", "finetune")

    def value(self, key: str) -> Any:
        """The value at a dotted key."""
        value: Any = self.config
        for name in key.split("."):
            if isinstance(value, list):
                value = value[int(name)]
            elif isinstance(value, dict):
                value = value.get(name)
            else:
                value = getattr(value, name)
        return value

    def wrong(
        self,
        key: str,
        rule: str,
        *,
        nearest: str = "",
        advice: str = "",
        also: tuple[str, ...] = (),
        what: str = "",
    ) -> KeyProblem:
        """The problem of one key's value; `also` names keys whose own problems come first."""
        return KeyProblem(
            what=what or f"{key} = {self.value(key)!r}",
            where=self.provenance.nearest(key),
            rule=rule,
            nearest=nearest,
            advice=advice,
            key=key,
            also=also,
        )


Rule = Callable[[Check], Iterator[KeyProblem]]
