"""The layout of a job: from degrees and a model to where every tensor lies.

Owns the few steps between the configuration and `launcher.layout`. No process group and no device:
the same layout comes out of one process for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from launcher.config.derived import stage_counts, stages_per_rank
from launcher.config.schema import Config
from launcher.layout.layout import SHARDED, WHOLE, Cut, Layout
from launcher.layout.mesh import Mesh, training_mesh
from models.plan import parameter_cuts
from models.spec import ModelSpec
from models.stage import StageSplit, stage_split, with_stages


def mesh_of(config: Config) -> Mesh:
    """The axes the configuration asks for."""
    degrees, parallel = config.parallel_config, config.parallel
    return training_mesh(
        data_parallel=degrees.data_parallel,
        tensor_parallel=degrees.model_parallel,
        pipeline_stages=degrees.pipeline_stage,
        context_parallel=degrees.context_parallel,
        expert_parallel=degrees.expert_parallel,
        shard_optimizer=parallel.enable_parallel_optimizer,
        shard_size=parallel.parallel_optimizer_config.optimizer_weight_shard_size,
    )


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


def model_layout(
    model: nn.Module, spec: ModelSpec, mesh: Mesh, *, split: StageSplit | None, vocab_emb_dp: bool
) -> Layout:
    """Where every tensor of `model`, whole and on the meta device, lies on `mesh`."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
    shapes = {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
        if name in parameters or not isinstance(tensor, nn.Parameter)
    }  # fmt: skip
    cuts: Mapping[str, Cut]
    if spec.decoder is None:
        cuts = {name: SHARDED if name in parameters else WHOLE for name in shapes}
        return Layout(shapes, mesh, cuts)
    cuts = parameter_cuts(shapes, spec.decoder, tp=mesh.tp, vocab_emb_dp=vocab_emb_dp)
    if split is not None:
        cuts = with_stages(dict(cuts), split, tied=spec.decoder.tie_word_embeddings)
    return Layout(shapes, mesh, cuts)
