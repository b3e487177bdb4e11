"""Keeping less, on a GPU: really moved, on streams of their own, for the same losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda.test_cuda import train
from tests.workshop import Workshop, merged

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECOMPUTE = {"recompute_config": {"recompute": True}}
SWAP = {"swap_config": {"swap": True}}
SIZES: dict[str, Any] = {
    "model": {"model_config": {"compute_dtype": "bfloat16", "hidden_size": 256,
                               "intermediate_size": 512, "num_hidden_layers": 4}},
    "runner_config": {"epochs": 40},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (RECOMPUTE, 0.0),
        ({"recompute_config": {"select_recompute": True}}, 0.0),
        (SWAP, 0.0),
        ({"swap_config": {"swap": True, "op_swap": [{"op_name": "mlp"}]}}, 0.0),
        ({**RECOMPUTE, **SWAP}, 0.0),
        ({"swap_config": {"optimizer": True}}, 1e-3),  # another kernel updates the parameters
        ({"micro_batch_interleave_num": 2, "runner_config": {"batch_size": 4}}, 1e-2),
        ({"micro_batch_interleave_num": 2, "runner_config": {"batch_size": 4}, **SWAP}, 1e-2),
        ({"compile": True}, 1e-2),
        ({"compile": True, **RECOMPUTE}, 1e-2),
    ],
)
def test_losses_are_those_of_keeping_everything(
    workshop: Workshop, changes: dict[str, Any], tolerance: float
) -> None:
    plain = train(workshop, "plain", **SIZES)
    assert train(workshop, "less", **merged(SIZES, changes)) == pytest.approx(plain, rel=tolerance)
