"""The argument of every rule, and how a rule reports a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launcher.config.derived import read_config_json
from launcher.config.provenance import KeyProblem, Provenance
from launcher.config.schema import Config
from launcher.errors import UserError
from models.families import DecoderConfig, ModelSpec, model_spec


@dataclass(frozen=True, kw_only=True)
class Check:
    """One configuration that is checked."""

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

    @property
    def lays_out(self) -> bool:
        """Whether the model is spread over the processes along all axes; see `predicts`."""
        return self.trains or self.mode == "eval"

    @property
    def predicts(self) -> bool:
        """Whether the run continues prompts: with tensor, pipeline and expert parallelism as
        configured, and a replica of the weights for each share of the prompts."""
        return self.mode == "predict"

    @cached_property
    def spec(self) -> ModelSpec | None:
        """The model; None when its description is wrong, which another rule reports."""
        try:
            return model_spec(self.config.model.model_config, read_config_json(self.config))
        except UserError:
            return None

    @property
    def decoder(self) -> DecoderConfig | None:
        """The sizes of a native decoder that is spread over the processes along all axes, else
        None."""
        return self.spec.decoder if self.spec is not None and self.lays_out else None

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
        """The problem of the value of one key; `also` names keys whose problems take precedence."""
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
