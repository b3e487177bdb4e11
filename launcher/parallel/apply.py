"""Data parallel applied to a module: FSDP2, and what each rank then really holds.

Owns the step from a model on the meta device to one whose parameters are this rank's shards in real
memory. Invariant, asserted: the shards torch made are the boxes `launcher.layout` says.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launcher.layout.layout import layout
from launcher.layout.mesh import Mesh
from launcher.parallel.world import World
from launcher.weights.memory import Shard


def device_mesh(mesh: Mesh, world: World) -> DeviceMesh:
    """The torch mesh of the data-parallel axes of `mesh`."""
    return init_device_mesh(
        world.device.type,
        (mesh.dp_replicate, mesh.dp_shard),
        mesh_dim_names=("dp_replicate", "dp_shard"),
    )


def shard_model(
    model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, compute_dtype: torch.dtype
) -> None:
    """Apply FSDP2 to `blocks` and then to `model`, in place; parameters may be on meta.

    Weights are cast to `compute_dtype` for the forward and backward pass; gradients are reduced and
    kept in the dtype of the weights. An axis `dp_shard` of 1 keeps a whole copy a rank, reduced by
    all-reduce.
    """
    parameter_dtype = next(model.parameters()).dtype
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == parameter_dtype else compute_dtype,
        reduce_dtype=parameter_dtype,
        cast_forward_inputs=False,
    )
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=module is not model)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of `tensor`: the local shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shards(tensors: dict[str, torch.Tensor], mesh: Mesh, rank: int) -> dict[str, Shard]:
    """Global shape, box and local memory of each tensor. Asserts that torch and layout agree."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    replicated = {name for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    placements = layout(shapes, mesh, rank, replicated=replicated)
    result = {}
    for name, tensor in tensors.items():
        placement, part = placements[name], local(tensor).detach()
        box = placement.boxes[0]
        if tuple(part.shape) != box.size:
            raise AssertionError(f"{name}: torch holds {tuple(part.shape)}, layout says {box.size}")
        result[name] = Shard(placement.shape, box, part)
    return result


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass reduces gradients over the ranks (False: only accumulates)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
