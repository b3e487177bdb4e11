"""A layout applied to a module: from a model on the meta device to this rank's shard of it.

Owns the order in which the forms of parallelism are applied to a decoder, and FSDP2. Invariant,
asserted whenever shards are requested: the shards that torch made are the boxes of
`launcher.layout`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from launcher.layout.layout import Layout, ShardSpec
from launcher.layout.shard import Shard as HeldShard
from launcher.parallel.context import ContextParallel, apply_context_parallel
from launcher.parallel.expert import apply_expert_parallel
from launcher.parallel.local import local
from launcher.parallel.meshes import DATA_AXES, Meshes
from launcher.parallel.tensor import TensorParallel, apply_tensor_parallel
from models.decoder import Decoder
from models.moe import Experts, Router


@dataclass(frozen=True)
class Precisions:
    """Dtypes of a training step."""

    compute: torch.dtype
    parameters: torch.dtype

    @property
    def policy(self) -> MixedPrecisionPolicy:
        """Parameters are cast for forward and backward; gradients are reduced and kept in the dtype
        of the parameters."""
        return MixedPrecisionPolicy(
            param_dtype=None if self.compute == self.parameters else self.compute,
            reduce_dtype=self.parameters,
            cast_forward_inputs=False,
        )

    @property
    def policy_of_routers(self) -> MixedPrecisionPolicy:
        """Routers compute in the dtype of the parameters: a rounded score may choose another
        expert."""
        return MixedPrecisionPolicy(reduce_dtype=self.parameters, cast_forward_inputs=False)


def parallelize(
    model: Decoder, specs: Mapping[str, ShardSpec], meshes: Meshes, *, sequence: bool,
    context: ContextParallel | None,
) -> None:  # fmt: skip
    """Apply tensor, sequence, context and expert parallelism to `model`, in place; its parameters
    (on the meta device) become this rank's shards."""
    mesh = meshes.layout
    if mesh.tp > 1 or mesh.ep > 1:
        shard_parameters(model, specs, meshes)
    tensor_group, expert_group = meshes.group("tp"), meshes.group("ep")
    if tensor_group is not None:
        apply_tensor_parallel(model, specs, TensorParallel(tensor_group, sequence))
    if expert_group is not None:
        apply_expert_parallel(model, expert_group)
    if context is not None:
        apply_context_parallel(model, context)


def shard_parameters(model: nn.Module, specs: Mapping[str, ShardSpec], meshes: Meshes) -> None:
    """Replace every parameter by this rank's shard of it on the model axes: `tp`, for experts `ep`
    and `tp`."""
    for prefix, module in model.named_modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            shard = _local_shard(parameter.detach(), specs[f"{prefix}.{leaf}"], meshes)
            setattr(module, leaf, nn.Parameter(shard, requires_grad=parameter.requires_grad))


def _local_shard(tensor: torch.Tensor, spec: ShardSpec, meshes: Meshes) -> torch.Tensor:
    mesh = meshes.experts if spec.expert else meshes.dense
    for axis, dim in {"ep": 0 if spec.expert else None, "tp": spec.tp_dim}.items():
        if dim is not None and getattr(meshes.layout, axis) > 1:
            tensor = tensor.chunk(mesh[axis].size(), dim)[mesh.get_local_rank(axis)]
    return tensor.contiguous()


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    meshes: Meshes,
    *,
    precisions: Precisions,
    blocks_together: int = 1,
    offload: OffloadPolicy | None = None,
    reshard_after_forward: bool | None = None,
) -> list[FSDPModule]:
    """Apply FSDP2 to the experts, to `blocks` and then to `model`, in place.

    With a `dp_shard` axis of 1 each rank keeps a full replica, and gradients are all-reduced,
    `blocks_together` blocks at a time. Gradients are summed, not averaged: the loss is already
    divided by the tokens of the global batch.

    With `reshard_after_forward` the gathered weights of a block are freed after its forward pass
    and gathered again for its backward pass; without, they are kept until the last backward pass of
    a step. None: freed where the axis of the shards has several ranks; on one, "gathering" is a
    cast and costs no communication. Returns the modules whose weights are kept.
    """
    shared: dict[str, Any] = {"offload_policy": offload or OffloadPolicy()}
    kept: list[FSDPModule] = []

    def apply(unit: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        reshards = reshard_after_forward
        if reshards is None:
            reshards = mesh["dp_shard"].size() > 1
        modules = unit if isinstance(unit, list) else [unit]
        # The root has the embedding and the head, used at both ends of a forward pass and after it.
        fully_shard(
            unit, mesh=_data_mesh(mesh), mp_policy=policy,
            reshard_after_forward=reshards and unit is not model, **shared,
        )  # fmt: skip
        kept.extend(module for module in modules if not reshards)

    for module in model.modules():
        if isinstance(module, Router) and precisions.compute != precisions.parameters:
            apply(module, meshes.dense, precisions.policy_of_routers)
        elif isinstance(module, Experts):
            apply(module, meshes.experts, precisions.policy)
    together = blocks_together if meshes.layout.dp_shard == 1 else 1
    for unit in _units(list(blocks), together):
        apply(unit, meshes.dense, precisions.policy)
    apply(model, meshes.dense, precisions.policy)
    if meshes.layout.data_parallel * meshes.layout.cp == 1:
        return kept  # on one rank, torch would copy the gradients to divide them by 1
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return kept


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes of FSDP: without `dp_replicate` where its size is 1, to avoid an all-reduce."""
    return mesh[DATA_AXES] if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]


def _units(blocks: list[nn.Module], together: int) -> list[nn.Module | list[nn.Module]]:
    if together == 1:
        return list(blocks)
    return [blocks[i : i + together] for i in range(0, len(blocks), together)]


def shards(tensors: Mapping[str, torch.Tensor], layout: Layout, rank: int) -> dict[str, HeldShard]:
    """Global shape, box and local tensor of each tensor. Asserts that torch and layout agree."""
    placements = layout.of(rank)
    result = {}
    for name, tensor in tensors.items():
        placement, shard = placements[name], local(tensor).detach()
        box = placement.boxes[0]
        if tuple(shard.shape) != box.size:
            raise AssertionError(
                f"{name}: the shard of torch is {tuple(shard.shape)}, that of the layout {box.size}"
            )
        result[name] = HeldShard(placement.shape, box, shard)
    return result


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Set whether the next backward pass reduces gradients over the ranks or only accumulates."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


def free_gathered(model: nn.Module) -> None:
    """Free weights that a forward pass without a backward pass has left gathered: they would be
    stale after the next update."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
