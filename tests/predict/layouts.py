"""Generation on real ranks: a tiny decoder spread over a layout, without files of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from launcher.builders.layout import model_layout
from launcher.builders.model import distribute
from launcher.generation.forward import Forward
from launcher.generation.loop import continue_tokens
from launcher.generation.settings import GenerationSettings, token_limits
from launcher.layout.mesh import Mesh
from launcher.parallel.apply import shards
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.world import World, start, stop
from models.build import build_model
from models.decoder import Decoder
from models.stage import stage_split
from tests.models.tiny import dense_spec

PROMPTS = [[5, 9, 33, 40], [7], [50, 51, 52, 53, 54, 55, 56], [80, 3, 11], [21, 22]]
BATCH = 2

Case = tuple[dict[str, Any], str, dict[str, int]]
"""Keys of the model, the file of its weights, sizes of the axes of `Mesh`."""


def continued(
    forward: Forward, settings: GenerationSettings, mesh: Mesh, rank: int,
    prompts: Sequence[Sequence[int]] = PROMPTS,
) -> dict[int, list[int]]:  # fmt: skip
    """The new tokens of this replica's share of the prompts, by index of the prompt."""
    limits = token_limits([len(prompt) for prompt in prompts], settings, None)
    mine = range(mesh.data_rank(rank), len(prompts), mesh.data_parallel)
    found: dict[int, list[int]] = {}
    for start_ in range(0, len(mine), BATCH):
        batch = mine[start_ : start_ + BATCH]
        news = continue_tokens(
            forward, [prompts[i] for i in batch], settings, limits=[limits[i] for i in batch],
            indices=batch, seed=3, device="cpu",
        )  # fmt: skip
        found |= dict(zip(batch, news, strict=True))
    forward.finish()
    return found


def distributed(world: World, keys: dict[str, Any], weights: Mapping[str, Tensor], mesh: Mesh) -> (
    Forward
):  # fmt: skip
    """The forward of this rank, with its shards of `weights`."""
    spec = dense_spec(**keys)
    assert spec.decoder is not None
    model = build_model(spec, dtype=torch.float32)
    assert isinstance(model, Decoder)
    split = stage_split(spec.decoder, mesh.pp) if mesh.pp > 1 else None
    layout = model_layout(model, spec, mesh, split=split, vocab_emb_dp=False)
    forward = distribute(model, layout, split, world)
    held = shards(ModelParts([model]).named_tensors(), layout, world.rank)
    for name, shard in held.items():
        box = shard.box
        part = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
        shard.tensor.copy_(weights[name][part])
    return forward


def run_cases(cases: Sequence[Case], settings: Sequence[GenerationSettings]) -> list[Any]:
    """In a rank: for every case and setting, the new tokens of all prompts in order, and the
    number of this rank's parameters."""
    world = start(force_cpu=True)
    results = []
    for keys, file, axes in cases:
        forward = distributed(world, keys, load_file(file), Mesh(**axes))
        held = sum(parameter.numel() for parameter in forward.model.parameters())
        texts = []
        for setting in settings:
            shares: list[Any] = [None] * world.size
            own = continued(forward, setting, Mesh(**axes), world.rank)
            dist.all_gather_object(shares, own)
            every = {index: new for share in shares for index, new in share.items()}
            assert all(every[i] == new for share in shares for i, new in share.items())
            texts.append([every[index] for index in range(len(PROMPTS))])
        results.append((texts, held))
    stop(world)
    return results
