"""Layouts of a model of 671 billion parameters on 16 thousand ranks: correct, in little memory."""

from __future__ import annotations

import resource

from benchmarks.layouts import DEGREES, deepseek_layout
from launcher.layout.mesh import Mesh
from tests.layout.tiling import assert_covered

SMALL = {
    "pipeline_stages": 2, "tensor_parallel": 4, "data_parallel": 8, "expert_parallel": 4,
}  # fmt: skip


def test_a_small_world_holds_every_tensor() -> None:
    layout = deepseek_layout(SMALL)
    assert_covered(layout, layout.shapes)


def test_all_layouts_of_the_big_world() -> None:
    layout = deepseek_layout(DEGREES)
    assert layout.mesh == Mesh(pp=16, dp_shard=128, tp=8, ep=64)
    before = _peak_bytes()
    held = [layout.of(rank) for rank in range(layout.mesh.world_size)]
    assert _peak_bytes() - before < 1e9
    elements = sum(p.boxes[0].numel for rank in held for n, p in rank.items() if ".experts." in n)
    assert elements == 58 * 256 * 3 * 7168 * 2048
    names = list(layout.shapes)
    assert_covered(layout, [names[0], *names[3::150], names[-1]])


def _peak_bytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
