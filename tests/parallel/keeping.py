"""Shared by the tests of recompute, offload and compile: models and saved activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from launcher.config.schema.parallel import RecomputeSection
from launcher.parallel.recompute import apply_recompute, recompute_plan, recomputed_modules
from models.decoder import Decoder
from models.spec import ModelSpec
from models.stage import StageSplit
from tests.models.tiny import dense_spec, experts_spec, tokens
from tests.parallel.parity import Case, assert_equal, run_cases
from tests.workshop import Workshop

LAYERS = 3
ALONE = StageSplit((range(LAYERS),), (0,))
CPU = torch.device("cpu")
SPECS: dict[str, Callable[[], ModelSpec]] = {
    "dense": lambda: dense_spec(
        type="Qwen3Config", head_dim=16, hidden_dropout=0.1, attention_dropout=0.1
    ),
    "experts": lambda: experts_spec("qwen3_moe"),
    "latent": lambda: experts_spec("deepseek_v3"),
}


def decoder(name: str) -> Decoder:
    """A model with the same weights at each call."""
    spec = SPECS[name]()
    assert spec.decoder is not None
    model = Decoder(spec.decoder, spec.precision)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (parameter.ndim == 1))
        for buffer in model.buffers():
            buffer.zero_()
    return model.train()


def numbered(model: Decoder) -> dict[int, nn.Module]:
    return {int(number): layer for number, layer in model.model.layers.items()}


def run_again(model: Decoder, **section: Any) -> dict[int, list[str]]:
    layers = numbered(model)
    names = recomputed_modules(layers, recompute_plan(RecomputeSection(**section), ALONE))
    apply_recompute(layers, names)
    return names


def step(model: Decoder) -> tuple[dict[str, Tensor], dict[int, int]]:
    """Gradients, and the storages saved for backward without parameters: address -> bytes."""
    ids, kept = tokens(2, 24), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, sample_seeds=torch.tensor([5, 6]), balance_scale=torch.tensor(0.01))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1)[:-1], ids.flatten()[1:])
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, kept  # type: ignore[misc]


@cache
def plain(name: str) -> tuple[dict[str, Tensor], int]:
    """Gradients, and bytes saved for backward, of the model that saves all activations."""
    gradients, kept = step(decoder(name))
    return gradients, sum(kept.values())


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(gradients[name], expected[name])]
    assert not wrong, wrong


def recompute(**section: Any) -> dict[str, Any]:
    return {"recompute_config": section}


SWAP = {"swap_config": {"swap": True}}
INTERLEAVED = {"micro_batch_interleave_num": 2}
SEQUENCE = {"use_seq_parallel": True}


def check(workshop: Workshop, cases: list[Case], tolerance: float = 1e-5, main: Any = None) -> None:
    """Each case agrees with one process that saves all activations. `main`: see `run_cases`."""
    alone = [case.alone() for case in cases]
    outcomes = run_cases(workshop, alone + cases, main=main)
    for case, reference, outcome in zip(cases, outcomes, outcomes[len(cases) :], strict=False):
        assert_equal(case, outcome, reference[0], tolerance)
