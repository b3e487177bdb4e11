"""Slicing by strategy files: the boxes that a layout of MindSpore gives each rank. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.mindspore.strategy import Strategy
from launcher.mindspore.strategy_files import read_strategy
from launcher.mindspore.tensor_layout import TensorLayout, boxes
from launcher.weights.joined import apart
from launcher.weights.log import Log, no_log
from launcher.weights.offline.slicing import Sliced, slice_weights
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.source import Source, check_all_ranks


@dataclass(frozen=True)
class StrategyLayout:
    """The layout in strategy files, for the tensors of a source."""

    strategy: Strategy
    source: Source
    mesh: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def _stages(self) -> list[dict[str, TensorLayout]]:
        return list(self.strategy.by_stage().values())

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return sum(map(_ranks, self._stages))

    @cached_property
    def has_optimizer(self) -> bool:
        """Whether the strategy lists optimizer state; a strategy for inference does not."""
        return any(is_optimizer_state(name) for stage in self._stages for name in stage)

    def boxes(self, rank: int) -> dict[str, Box]:
        """Name to the box that `rank` holds. Raises `UserError` where a layout does not fit."""
        for stage in self._stages:
            if rank < _ranks(stage):
                return {
                    name: self._box(name, layout, rank)
                    for name, layout in stage.items()
                    if name in self.source.tensors
                }
            rank -= _ranks(stage)
        return {}

    def _box(self, name: str, layout: TensorLayout, rank: int) -> Box:
        try:
            return boxes(layout, self.source.shape(name), rank)[0]
        except ValueError as error:
            raise UserError(
                f"`{name}` of shape {list(self.source.shape(name))} does not fit the "
                f"strategy: {error}",
                where=str(self.source.path),
                rule="the strategy and the weights must be of one model",
                advice="Give the strategy files of a run of this model",
            ) from error


def _ranks(stage: Mapping[str, TensorLayout]) -> int:
    return next(iter(stage.values())).ranks


def strategy_layout(path: Path, source: Source, log: Log = no_log) -> StrategyLayout:
    """The layout of the strategy file, or the folder of strategy files, at `path`."""
    strategy = read_strategy(path, log)
    names = {name for stage in strategy.by_stage().values() for name in stage}
    return StrategyLayout(strategy, apart(source, None, wanted=names))


def load_distributed_checkpoint(
    network: Any = None,
    predict_strategy: str | os.PathLike[str] | None = None,
    unified_safetensors_dir: str | os.PathLike[str] | None = None,
    dst_safetensors_dir: str | os.PathLike[str] | None = None,
    format: Literal["safetensors"] = "safetensors",
    max_process_num: int = 64,
    *,
    overwrite: bool = False,
) -> Sliced:
    """Slice the complete weights in `unified_safetensors_dir` by `predict_strategy`, a strategy
    file or a folder of them, into rank files in `dst_safetensors_dir`.

    Name and arguments are MindSpore's; `max_process_num`: number of threads. Raises `UserError`,
    also for a `network`, which cannot be loaded here.
    """
    if network is not None or format != "safetensors":
        raise UserError(
            "load_distributed_checkpoint cannot load a network" if network is not None else
            f"format = {format!r}",
            rule="it writes rank files of safetensors",
            advice="To load weights into a model, set load_checkpoint in the YAML: they are sliced "
            "while they are read",
        )  # fmt: skip
    given = {"predict_strategy": predict_strategy, "dst_safetensors_dir": dst_safetensors_dir,
             "unified_safetensors_dir": unified_safetensors_dir}  # fmt: skip
    for name, value in given.items():
        if not isinstance(value, (str, os.PathLike)):
            raise UserError(f"{name} = {value!r}", rule="a path is needed")
    check_all_ranks(Path(str(unified_safetensors_dir)))
    source = open_any_format(Path(str(unified_safetensors_dir)))
    layout = strategy_layout(Path(str(predict_strategy)), source)
    target = Path(str(dst_safetensors_dir))
    return slice_weights(source, layout, target, workers=max_process_num, overwrite=overwrite)
