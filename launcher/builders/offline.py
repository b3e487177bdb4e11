"""The layout that a configuration asks for, for weights that lie on disk. Torch-free.

Owns the way from a YAML file and the names in a checkpoint to the box of each rank, without a model
in memory: shapes come from the files, experts are stacked as the model stacks them, and what a rank
holds of a stack is told for the tensors of the files again.
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
from launcher.layout.layout import Layout
from launcher.weights.source import OPTIMIZER_PREFIXES, Source
from models.families import model_spec
from models.names import mappings
from models.spec import ModelSpec

_SECTIONS = ("parallel", "model")
"""Sections of a configuration that decide a layout; others may name what is on other machines."""
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ConfiguredLayout:
    """What each rank of a configured run holds of the tensors of a checkpoint."""

    layout: Layout

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.mesh.world_size

    @property
    def mesh(self) -> Mapping[str, int]:
        """Axis to size."""
        return self.layout.mesh.sizes()

    def boxes(self, rank: int) -> dict[str, Box]:
        """Name in files to the box that `rank` holds of it."""
        return {
            name: box
            for stacked, placement in self.layout.of(rank).items()
            for name, box in _in_files(stacked, placement.shape, placement.boxes[0])
        }


def _in_files(name: str, shape: Shape, box: Box) -> Iterator[tuple[str, Box]]:
    """(name in files, box of that tensor) of what a box of the model's tensor `name` is."""
    found = mappings(name, shape)
    if found is None:
        yield name, box
        return
    for mapping in found:
        common = box.intersect(mapping.box)
        if common is not None:
            place = common.inside(mapping.box)
            yield mapping.name, Box(mapping.kept(place.offset), mapping.kept(place.size))


def configured_layout(config_file: str, source: Source) -> ConfiguredLayout:
    """The layout that the YAML file asks for, of the model whose weights are `source`.

    config.json beside the weights describes the model, else the one in pretrained_model_dir. Raises
    `UserError` with all that is wrong about it.
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
    mesh = mesh_of(config)
    shapes = _shapes(source, spec)
    layout = layout_of(
        shapes, set(shapes), spec, mesh, split=split_of(config, spec),
        vocab_emb_dp=config.parallel_config.vocab_emb_dp,
    )  # fmt: skip
    return ConfiguredLayout(layout)


def _section(problem: Any) -> str:
    key: str = getattr(problem, "key", "")
    return key.partition(".")[0].partition("_")[0]


def _shapes(source: Source, spec: ModelSpec) -> dict[str, Shape]:
    """Name and shape of the tensors of the model that the files hold, experts stacked."""
    shapes: dict[str, Shape] = {}
    parts: set[str] = set()
    for stacked, experts in _stacks(spec):
        found = [mapping.name for mapping in mappings(stacked, (experts,)) or ()]
        if found and all(name in source.tensors for name in found):
            shapes[stacked] = (experts, *source.shape(found[0]))
            parts.update(found)
    return shapes | {
        name: source.shape(name)
        for name in source.tensors
        if name not in parts and not name.startswith(OPTIMIZER_PREFIXES)
    }


def _stacks(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """(name of a stack of experts, number of experts) of every layer that has some."""
    experts = None if spec.decoder is None else spec.decoder.experts
    if experts is None:
        return
    for layer, has_experts in enumerate(experts.layers):
        if has_experts:
            for projection in _PROJECTIONS:
                block = f"model.layers.{layer}.{experts.block_name}.experts"
                yield f"{block}.{projection}", experts.num_experts
