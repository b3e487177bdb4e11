"""Bucketed all-reduce of the gradients of replicas, overlapped with the backward pass (as in DDP).

Owns the buckets: flat tensors for the gradients of a few layers each. A gradient is copied into its
bucket as soon as the backward pass has computed it, and a full bucket is all-reduced while the next
one fills: last layers first, in the same order on every rank. For unsharded parameters that are
neither cast nor offloaded; for all others FSDP does this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from launcher.parallel.meshes import Meshes
from models.moe import Experts


class GradAllReduce:
    """The gradients of this rank that are all-reduced.

    A parameter that took no part in the backward pass counts as one with a gradient of zeros, since
    it may have a gradient on another rank.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        """`buckets` in the order in which the backward pass fills them, the same on every rank."""
        self._buckets = buckets
        self._sent = 0
        self.sync = False
        """Whether the backward pass is the last of a step: full buckets are then sent immediately;
        otherwise `finish` sends them."""
        for bucket in buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(
                    partial(self._on_gradient, bucket, index)
                )

    def finish(self) -> None:
        """Send the remaining buckets, and wait: gradients are then the sums over the ranks."""
        for bucket in self._buckets[self._sent :]:
            bucket.fill()
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()
        self._sent, self.sync = 0, False

    def _on_gradient(self, bucket: Bucket, index: int, parameter: nn.Parameter) -> None:
        bucket.store(index)
        if not self.sync:
            return
        bucket.missing -= 1
        while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
            self._buckets[self._sent].send()
            self._sent += 1


class Bucket:
    """A flat tensor with the gradients of some parameters, of one dtype, on one device."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self.missing = len(parameters)
        """Parameters whose gradient the last backward pass of the step has not computed yet."""
        sizes = [parameter.numel() for parameter in parameters]
        self._flat = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        chunks = self._flat.split(sizes)
        self._gradients = [v.view(p.shape) for v, p in zip(chunks, parameters, strict=True)]
        self._work: dist.Work | None = None
        # As long as these are referenced, gradients are accumulated on the stream that is current
        # here, whatever stream a parameter is used on.
        self._nodes: list[Any] = [_accumulation_node(p) for p in parameters]

    def store(self, index: int) -> None:
        """Copy a gradient into the bucket, unless it is there already."""
        parameter, gradient = self.parameters[index], self._gradients[index]
        if parameter.grad is None:
            parameter.grad = gradient.zero_()
        elif parameter.grad is not gradient:
            gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def fill(self) -> None:
        """Copy all gradients into the bucket: some are set without calling a hook."""
        for index in range(len(self.parameters)):
            self.store(index)

    def send(self) -> None:
        """Start the all-reduce."""
        self._work = dist.all_reduce(self._flat, group=self.group, async_op=True)

    def receive(self) -> None:
        """Wait for the sums, and reset for the next step."""
        if self._work is not None:
            self._work.wait()
        self._work, self.missing = None, len(self.parameters)


def make_grad_all_reduce(
    modules: Sequence[nn.Module], blocks: Iterable[nn.Module], meshes: Meshes, *, together: int
) -> GradAllReduce:
    """The all-reduce of the trained parameters of `modules`, which must not be on the meta device;
    `together` neighbouring `blocks` share a bucket."""
    unit = {p: index // together for index, block in enumerate(blocks) for p in block.parameters()}
    stacks = [m for module in modules for m in module.modules() if isinstance(m, Experts)]
    experts = {parameter for stack in stacks for parameter in stack.parameters()}
    dense, expert = (mesh.get_group("dp_replicate") for mesh in (meshes.dense, meshes.experts))
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    buckets = []
    # Parameters before and after the blocks have buckets of their own.
    for _, run in groupby(reversed(trained), key=unit.get):
        members: dict[Any, list[nn.Parameter]] = {}
        for parameter in run:
            members.setdefault((parameter in experts, parameter.dtype), []).append(parameter)
        for (is_expert, _), parameters in members.items():
            group = expert if is_expert else dense
            if group.size() > 1:
                buckets.append(Bucket(parameters, group))
    return GradAllReduce(buckets)


def _accumulation_node(parameter: torch.Tensor) -> Any:
    """The autograd node that accumulates the gradient of a parameter."""
    node = parameter.view_as(parameter).grad_fn
    assert node is not None
    return node.next_functions[0][0]
