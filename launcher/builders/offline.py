"""The layout of a configuration, for weights on disk. Torch-free.

Owns the way from a YAML file and the names in a checkpoint to the box of each rank, without a model
in memory: shapes come from the files, experts are stacked as the model stacks them, and the shards
of a stack are mapped back to the tensors of the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.builders.layout import layout_of, split_of
from launcher.config import rules
from launcher.config.derived import mesh_of, read_config_json
from launcher.config.resolve import resolve
from launcher.errors import UserError
from launcher.layout.box import Box, Shape
from launcher.layout.layout import SHARDED, Layout
from launcher.weights.foreign_names import KEYS, under_hugging_face_names
from launcher.weights.joined import apart
from launcher.weights.log import Log, no_log
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.source import Source
from launcher.weights.tensor_mapping import MappingsOf
from models.families import model_spec
from models.names import in_decoder, mappings_of, unstacked
from models.spec import ModelSpec, Rule

_SECTIONS = ("parallel", "model")
"""Sections that determine a layout; others may name paths on other machines."""


@dataclass(frozen=True)
class ConfiguredLayout:
    """What each rank of a configured run holds of the tensors of a checkpoint."""

    layout: Layout
    mappings_of: MappingsOf

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.mesh.world_size

    @property
    def mesh(self) -> Mapping[str, int]:
        """Axis to size."""
        return self.layout.mesh.sizes()

    @property
    def has_optimizer(self) -> bool:
        """Whether ranks hold optimizer state: those of a training do."""
        return True

    def boxes(self, rank: int) -> dict[str, Box]:
        """Name in files to the box of it that `rank` holds."""
        return {
            name: box
            for stacked, placement in self.layout.of(rank).items()
            for name, box in self._in_files(
                stacked, placement.shape, placement.boxes[0])
        }  # fmt: skip

    def _in_files(self, name: str, shape: Shape, box: Box) -> Iterator[tuple[str, Box]]:
        """(name in files, box of that tensor) of each part of a box of the model's `name`."""
        found = self.mappings_of(name, shape)
        if found is None:
            yield name, box
            return
        for mapping in found:
            common = box.intersect(mapping.box)
            if common is not None:
                place = common.inside(mapping.box)
                yield mapping.name, Box(mapping.kept(place.offset), mapping.kept(place.size))


def configured_layout(
    config_file: str, source: Source, log: Log = no_log
) -> tuple[ConfiguredLayout, Source]:
    """The layout of the YAML file, for the model whose weights are `source`, and the source under
    the names that rank files have.

    config.json beside the weights describes the model, or else the one in pretrained_model_dir.
    Raises `UserError` with all problems.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    beside = {"pretrained_model_dir": str(folder)} if (folder / "config.json").is_file() else {}
    resolved = resolve(config_file, flags=beside)
    found = rules.check(
        resolved.config, resolved.provenance, world=None, bad_keys=resolved.bad_keys
    )
    wrong = [problem for problem in found if _section(problem) in _SECTIONS]
    if problems := (*resolved.problems, *wrong):
        raise UserError(problems)
    config = resolved.config
    spec = model_spec(config.model.model_config, read_config_json(config))
    keys = {key: getattr(config, key) for key in KEYS}
    source = under_hugging_face_names(source, spec.hf_config, keys, log)
    source = apart(source, spec.hf_config)
    mesh = mesh_of(config)
    shapes = _shapes(source, spec)
    layout = layout_of(
        shapes, set(shapes), spec, mesh, split=split_of(config, spec),
        vocab_emb_dp=config.parallel_config.vocab_emb_dp, otherwise=SHARDED,
    )  # fmt: skip
    return ConfiguredLayout(layout, mappings_of(_parameters(spec))), source


def _section(problem: Any) -> str:
    key: str = getattr(problem, "key", "")
    return key.partition(".")[0].partition("_")[0]


def _shapes(source: Source, spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of the model's tensors in the files, experts stacked."""
    shapes: dict[str, Shape] = {}
    parts: set[str] = set()
    for stacked, experts in _stacks(spec):
        found = unstacked(stacked, (experts,), _parameters(spec)) or []
        if all(name in source.tensors for name in found):
            shapes[stacked] = (experts, *source.shape(found[0]))
            parts.update(found)
    renamed = in_decoder(source.tensors, spec)
    return shapes | {
        renamed.get(name, name): source.shape(name)
        for name in source.tensors
        if name not in parts and not is_optimizer_state(name)
    }


def _parameters(spec: ModelSpec) -> Mapping[str, Rule]:
    return {} if spec.decoder is None else spec.decoder.parameters


def _stacks(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """(name of a stack of experts, number of experts) of every layer that has some, where the files
    have a tensor for each expert."""
    experts = None if spec.decoder is None else spec.decoder.experts
    if experts is None:
        return
    kinds = [kind for kind, rule in _parameters(spec).items() if rule.is_stacked]
    for layer, has_experts in enumerate(experts.layers):
        for kind in kinds if has_experts else ():
            yield f"model.layers.{layer}.{kind}", experts.num_experts
