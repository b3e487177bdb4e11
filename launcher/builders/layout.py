"""The layout of a job: from parallel degrees and a model to the shards of every tensor.

Owns the steps between the configuration and `launcher.layout`. Needs no process group and no
device: one process computes the layout of any number of ranks. Torch-free, except for a model that
is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from launcher.config.derived import stage_counts, stages_per_rank
from launcher.config.schema import Config
from launcher.layout.box import Shape
from launcher.layout.layout import REPLICATED, SHARDED, Layout, ShardSpec
from launcher.layout.mesh import Mesh
from models.plan import shard_specs
from models.spec import ModelSpec
from models.stage import StageSplit, stage_split, with_stages

if TYPE_CHECKING:
    from torch import nn


def split_of(config: Config, spec: ModelSpec) -> StageSplit | None:
    """The stages of the pipeline; None without one."""
    ranks = config.parallel_config.pipeline_stage
    if ranks == 1 or spec.decoder is None:
        return None
    return stage_split(
        spec.decoder,
        ranks,
        per_rank=stages_per_rank(config),
        v_shaped=config.parallel.pipeline_config.pipeline_scheduler == "zero_bubble_v",
        counts=stage_counts(config, spec.decoder.num_hidden_layers),
    )


def predict_split(config: Config, spec: ModelSpec) -> StageSplit | None:
    """The stages of prediction: one a pipeline rank, of as many layers as the rank has in training;
    None without a pipeline."""
    split = split_of(config, spec)
    if split is None or spec.decoder is None:
        return None
    ranks = config.parallel_config.pipeline_stage
    counts = [
        sum(len(split.layers[stage]) for stage in split.stages_of(rank)) for rank in range(ranks)
    ]
    return stage_split(spec.decoder, ranks, counts=counts)


def model_layout(
    model: nn.Module, spec: ModelSpec, mesh: Mesh, *, split: StageSplit | None, vocab_emb_dp: bool
) -> Layout:
    """The layout on `mesh` of every tensor of `model`, complete and on the meta device."""
    from torch import nn

    parameters = dict(model.named_parameters())
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name in parameters or not isinstance(tensor, nn.Parameter)
    }
    return layout_of(shapes, parameters, spec, mesh, split=split, vocab_emb_dp=vocab_emb_dp)


def layout_of(
    shapes: Mapping[str, Shape], parameters: Collection[str], spec: ModelSpec, mesh: Mesh, *,
    split: StageSplit | None, vocab_emb_dp: bool, otherwise: ShardSpec | None = None,
) -> Layout:  # fmt: skip
    """Where tensors of these names and shapes lie on `mesh`; those that are no `parameters` are
    buffers. `otherwise`: how tensors are cut that the model does not have, where there may be some.
    """
    if spec.decoder is None:
        specs = {name: SHARDED if name in parameters else REPLICATED for name in shapes}
        return Layout(shapes, mesh, specs)
    by_name: Mapping[str, ShardSpec] = shard_specs(
        shapes, spec.decoder, tp=mesh.tp, vocab_emb_dp=vocab_emb_dp, otherwise=otherwise
    )
    if split is not None:
        by_name = with_stages(dict(by_name), split, tied=spec.decoder.tie_word_embeddings)
    return Layout(shapes, mesh, by_name)
