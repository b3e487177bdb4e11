"""Low-rank adapters under tensor parallelism and FSDP.

Owns what a shard of a layer must know: which of its inputs are local (for dropout), and the sums
over those of the other ranks (for the lengths of rows, with DoRA).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from launcher.layout.layout import ShardSpec
from launcher.parallel.local import local
from models.layers import Linear
from models.lora import adapters_of, base_weight
from models.lora_config import MAGNITUDE


def shard_adapters(
    model: nn.Module, specs: Mapping[str, ShardSpec], group: dist.ProcessGroup
) -> None:
    """Set what each adapter of a decoder, whose parameters are sharded already, must know of its
    shards."""
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or module.adapter is None:
            continue
        if specs[f"{name}.weight"].tp_dim == 1:
            module.adapter.column_shard = dist.get_rank(group)
            module.adapter.sum_of_shards = partial(_sum, group)


def repeat_rows(projection: Linear, rows: slice) -> None:
    """Use only `rows` of the outputs of a projection that every rank holds in full."""
    views = {"weight": projection, "bias": projection, MAGNITUDE: projection}
    for name, module in views.items():
        module.views[name] = partial(_rows, rows)
    if projection.lora_B is not None:
        projection.lora_B.views["weight"] = partial(_rows, rows)


@torch.no_grad()
def initialize_magnitudes(model: nn.Module, names: Collection[str]) -> None:
    """Set the magnitudes `names` of DoRA to the lengths of the rows of the present weights.

    Called by all ranks together. B must be zeros: the adapter then changes nothing.
    """
    for prefix, module in model.named_modules():
        if f"{prefix}.{MAGNITUDE}" not in names or not (adapters := adapters_of(module)):
            continue
        weight, magnitude = base_weight(module), getattr(module, MAGNITUDE)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        norms = adapters[0].sum_of_shards(weight.float().square().sum(1)).sqrt()
        if isinstance(magnitude, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                magnitude.shape, magnitude.device_mesh, magnitude.placements
            )
            norms = norms[offset[0] : offset[0] + shape[0]]
        local(magnitude).copy_(norms)


def _rows(rows: slice, parameter: Tensor) -> Tensor:
    return parameter[rows]


def _sum(group: dist.ProcessGroup, sums: Tensor) -> Tensor:
    sums = sums.contiguous()
    dist.all_reduce(sums, group=group)
    return sums
