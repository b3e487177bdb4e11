"""The model parts of one rank: the full model, or its pipeline stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from launcher.parallel.apply import free_gathered, sync_gradients
from launcher.parallel.grad_all_reduce import GradAllReduce


@dataclass(frozen=True)
class ModelParts:
    """The modules of this rank, in the order of the pipeline; one without a pipeline.

    When a rank has both the first stage and the last, a tied embedding is there twice under one
    name: the first one counts, and the second is a replica that is kept equal to it.
    """

    modules: Sequence[nn.Module]
    grad_all_reduce: GradAllReduce | None = None
    """All-reduces gradients over the ranks where FSDP does not."""
    kept: Sequence[FSDPModule] = ()
    """The modules whose gathered weights are kept from the first forward pass of a step to its last
    backward pass."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name."""
        named: dict[str, nn.Parameter] = {}
        for name, parameter in self.all_named():
            named.setdefault(name, parameter)
        return named

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by name, a tied tensor once, under its first name."""
        seen: set[int] = set()
        named: dict[str, torch.Tensor] = {}
        for module in self.modules:
            for name, tensor in module.state_dict(keep_vars=True).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    named.setdefault(name, tensor)
        return named

    def replicas(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of parameters with one name: the one that counts, and its replica."""
        first = self.named_parameters()
        return [(first[name], p) for name, p in self.all_named() if first[name] is not p]

    def all_named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter object with its name, including replicas."""
        for module in self.modules:
            yield from module.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter object, including replicas."""
        for _, parameter in self.all_named():
            yield parameter

    def train(self, mode: bool = True) -> None:
        """Set training or evaluation mode."""
        for module in self.modules:
            module.train(mode)

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        return self.modules[0].training

    def sync_gradients(self, enabled: bool) -> None:
        """Set whether the next backward pass, the last one of a step, reduces gradients over the
        ranks and frees gathered weights."""
        for module in self.modules:
            sync_gradients(module, enabled)
        for module in self.kept:
            module.set_reshard_after_backward(enabled, recurse=False)
        if self.grad_all_reduce is not None:
            self.grad_all_reduce.sync = enabled

    def free_gathered(self) -> None:
        """Free the weights that forward passes without a backward pass have left gathered."""
        for module in self.modules:
            free_gathered(module)
