"""The shards of torch are the boxes of the layout, element by element, for every family.

This one process plays each rank of a layout in turn, with a process group whose collectives do
nothing: sharding needs none. The values of every parameter encode their indices.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from launcher.builders import model as assembly
from launcher.builders.job import Job
from launcher.config.command_line import parse
from launcher.config.resolve import Resolved, resolve_command_line
from launcher.config.rules import check
from launcher.layout.layout import Layout
from launcher.parallel.local import local
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.world import World
from launcher.report.console import Console
from models.build import build_model
from tests.layout.tiling import assert_covered
from tests.parallel.parity import FAMILIES, Case
from tests.parallel.test_parity import REPLICATED
from tests.workshop import Workshop

V_SHAPED = {"pipeline_scheduler": "zero_bubble_v"}
LOOP = {"pipeline_scheduler": "1f1b", "pipeline_interleave": True}
ODD = {"vocab_size": 514}
"""A number of rows that four ranks cannot split evenly."""
SHARDED_VOCABULARY = {"vocab_emb_dp": False}
NOT_OF_GPT2 = {
    "model": {"model_config": {"intermediate_size": None, "num_key_value_heads": None}},
    "train_dataset": {"packing": False},
}  # fmt: skip
"""A transformers module: keys of llama that it does not have."""

EVERY_FAMILY = [
    replace(case, family=family)
    for family in FAMILIES
    for case in (
        Case(dp=4, sharded=True, model=ODD),
        Case(dp=2, tp=2, pp=2, sharded=True, pipeline=V_SHAPED),
        Case(dp=2, tp=2, cp=2, sharded=True, parallel=SHARDED_VOCABULARY),
    )
]
EXPERTS = [
    replace(case, family=family)
    for family in ("qwen3 moe", "deepseek")
    for case in (
        Case(dp=3, sharded=True),
        Case(dp=4, ep=2),
        Case(dp=4, tp=2, ep=2, sharded=True),
        Case(dp=8, ep=4, sharded=True, shard_size=2),
        Case(dp=6, ep=2, sharded=True),
        Case(dp=2, tp=2, pp=2, ep=2, sharded=True),
        Case(dp=4, cp=2, ep=2, sharded=True),
    )
]
MESHES = [
    Case(),
    Case(dp=2),
    Case(dp=5, sharded=True),
    Case(dp=4, sharded=True, shard_size=2),
    Case("qwen2", tp=8),
    Case(tp=2, dp=4, sharded=True, model=ODD, parallel=SHARDED_VOCABULARY),
    Case("qwen3 tied", tp=4, parallel=SHARDED_VOCABULARY),
    Case(pp=2, model={"num_hidden_layers": 5}),
    Case(pp=3, pipeline={"stage_layers": [1, 2, 1]}),
    Case("qwen3 tied", pp=2, dp=2, sharded=True, pipeline=LOOP),
    Case("qwen3 tied", pp=2, tp=2, pipeline=V_SHAPED),
    Case(cp=4),
    Case(cp=2, dp=2, sharded=True),
    Case(cp=2, dp=4, sharded=True, shard_size=2),
    Case("llama", dp=3, sharded=True, model={"type": "GPT2Config"}, more=NOT_OF_GPT2),
]
QUICK = [*EVERY_FAMILY, *EXPERTS, *MESHES]


@pytest.fixture(autouse=True)
def in_the_workshop(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setattr(assembly, "build_model", _filled_model)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_shards_of_torch_are_the_boxes_of_the_layout(case: Case) -> None:
    compare(case)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_matrix(family: str) -> None:
    for case in REPLICATED:
        if case.family == family:
            compare(case)


def compare(case: Case) -> None:
    """Every rank of the case against the layout, and the layout against the full tensors."""
    resolved = _resolved(case)
    layout = None
    for rank in range(case.ranks):
        with _playing(rank, case.ranks) as world:
            job = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
            built = assembly.build_parallel(job, training=True)
            assert built.layout.shapes == (layout or built.layout).shapes
            layout = built.layout
            _compare_rank(rank, built.parts, layout)
    assert layout is not None
    assert_covered(layout, layout.shapes)


def _compare_rank(rank: int, parts: ModelParts, layout: Layout) -> None:
    tensors, placements = parts.named_tensors(), layout.of(rank)
    assert set(tensors) == set(placements)
    copies = [(name, p) for name, p in parts.all_named()]
    for name, tensor in [*tensors.items(), *copies]:
        placement = placements[name]
        (box,) = placement.boxes
        place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
        expected = _numbers(name, placement.shape)[place]
        held = local(tensor).detach()
        assert held.shape == expected.shape, (rank, name)
        assert torch.equal(held.float(), expected), (rank, name)


def _filled_model(spec, *, dtype: torch.dtype) -> nn.Module:
    model = build_model(spec, dtype=dtype, device="cpu")
    with torch.no_grad():
        for name, tensor in ModelParts([model]).named_tensors().items():
            tensor.copy_(_numbers(name, tuple(tensor.shape)))
    return model


def _numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that identify an element of any tensor; exact in float32."""
    numel = torch.Size(shape).numel()
    return (
        torch.arange(numel, dtype=torch.float32).add_(zlib.crc32(name.encode()) % 997).view(shape)
    )


def _resolved(case: Case) -> Resolved:
    with open("case.yaml", "w") as file:
        yaml.safe_dump(case.yaml(), file)
    resolved = resolve_command_line(parse(["--config", "case.yaml", "--run_mode", "train"]))
    assert not resolved.problems, resolved.problems
    found = check(resolved.config, resolved.provenance, world=case.ranks)
    assert not found, found
    return resolved


@contextmanager
def _playing(rank: int, size: int) -> Iterator[World]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(rank, size, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
