"""Links: whatever a shard holds of a tensor of the model, it holds that of the files' tensors."""

import random

import pytest
import torch

from launcher.layout.box import Box, full_box
from launcher.layout.shard import Shard
from launcher.weights.tensor_mapping import TensorMapping, mapped, shapes_in_files, stacked

SHAPE = (6, 8, 5)


def stack(name: str, shape: tuple[int, ...]) -> list[TensorMapping]:
    return stacked([f"{name}.{index}" for index in range(shape[0])], shape)


def partial_saves(name: str, shape: tuple[int, ...]) -> list[TensorMapping]:
    """Each index of the first dim is two tensors: gate above up."""
    experts, rows, columns = shape
    return [
        TensorMapping(
            f"{name}.{e}.{part}", Box((e, part * rows // 2, 0), (1, rows // 2, columns)), (0,)
        )
        for e in range(experts)
        for part in range(2)
    ]


def thirds(name: str, shape: tuple[int, ...]) -> list[TensorMapping]:
    """No dim is dropped: a fused projection."""
    step = shape[0] // 3
    return [
        TensorMapping(f"{name}.{part}", Box((part * step, 0, 0), (step, *shape[1:])))
        for part in range(3)
    ]


def any_box(chance: random.Random) -> Box:
    offset = tuple(chance.randrange(n) for n in SHAPE)
    size = tuple(chance.randint(0, n - o) for o, n in zip(offset, SHAPE, strict=True))
    return Box(offset, size)


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))]


@pytest.mark.parametrize("mappings_of", [stack, partial_saves, thirds])
@pytest.mark.parametrize("seed", range(30))
def test_a_shard_of_the_model_is_shards_of_the_files(mappings_of, seed: int) -> None:
    chance = random.Random(seed)
    model = torch.randn(SHAPE)
    box = full_box(SHAPE) if seed == 0 else any_box(chance)
    memory = part_of(model, box).clone()
    found = mapped({"w": Shard(SHAPE, box, memory)}, mappings_of)
    shapes = shapes_in_files({"w": SHAPE}, mappings_of)
    held = 0
    for mapping in mappings_of("w", SHAPE):
        in_files = part_of(model, mapping.box).reshape(mapping.shape)
        if mapping.name not in found:
            assert not box.intersect(mapping.box)
            continue
        shard = found[mapping.name]
        assert shard.shape == shapes[mapping.name] == tuple(in_files.shape)
        assert torch.equal(shard.tensor, part_of(in_files, shard.box))
        assert shard.tensor.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()
        held += shard.box.numel
    assert held == box.numel


def test_a_tensor_without_links_is_what_it_was() -> None:
    shard = Shard((4,), full_box((4,)), torch.zeros(4))
    assert mapped({"w": shard}, lambda name, shape: None)["w"] is shard
