"""Models with adapters in memory, and the same in PEFT: same weights, to be compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from launcher.builders.adapter_config import adapter_config
from launcher.layout.box import full_box
from launcher.layout.shard import Shard
from launcher.weights.source import Source, open_complete
from launcher.weights.tensor_mapping import mapped, shapes_in_files
from models.build import build_model, mappings_of, tied_names
from models.lora import has_transposed_adapters
from models.lora_config import LoraConfig, is_adapter, is_saved, with_adapters
from models.spec import ModelSpec
from models.transformers_model import TransformersModel
from tests.models.tiny import oracle, pair, tokens


@dataclass(frozen=True)
class Adapted:
    """A model with a random adapter, and its base in transformers."""

    spec: ModelSpec
    model: nn.Module
    base: nn.Module
    """Of transformers; `base_copy` gives one that may be changed."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.model.named_parameters()}

    @property
    def config(self) -> dict[str, Any]:
        return adapter_config(
            self.spec, self.shapes, mappings_of(self.model),
            transposed=has_transposed_adapters(self.model), tied=self.tied,
        )  # fmt: skip

    @property
    def tied(self) -> dict[str, str]:
        saved = self.saved()
        return {alias: name for alias, name in tied_names(self.model).items() if name in saved}

    def base_copy(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model.eval()(ids)
        return logits

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name in files."""
        kept = {n: p.detach() for n, p in self.model.named_parameters()
                if is_saved(n, self.spec.lora)}  # fmt: skip
        return in_files(self.model, kept)

    def source(self, folder: Path) -> Source:
        """The same as the tensors of a file."""
        file = folder / "rank.safetensors"
        save_file({name: t.contiguous() for name, t in self.saved().items()}, file)
        return open_complete(file)


def in_files(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    full = {n: Shard(tuple(t.shape), full_box(tuple(t.shape)), t) for n, t in tensors.items()}
    return {name: shard.tensor for name, shard in mapped(full, mappings_of(model)).items()}


def adapted(spec: ModelSpec, *, seed: int = 3, **lora: Any) -> Adapted:
    """A model of `spec` with the weights of a random one of transformers, and a random adapter."""
    config = LoraConfig(**{"rank": 2, "alpha": 6, **lora})
    full = with_adapters(spec, config, ())
    model = build_model(full, dtype=torch.float32, device="cpu")
    if spec.decoder is None:
        base = oracle(spec).train()
        assert isinstance(model, TransformersModel)
        model.wrapped.load_state_dict(base.state_dict(), strict=False)
    else:
        own, base = pair(spec)
        model.load_state_dict(own.state_dict(), strict=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
                if parameter.ndim == 1:
                    parameter.add_(2)
            elif is_saved(name, config):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return Adapted(full, model, base.eval())


IDS = tokens(2, 9)
__all__ = ["IDS", "Adapted", "adapted", "in_files", "shapes_in_files"]
