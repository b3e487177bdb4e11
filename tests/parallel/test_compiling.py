"""Compiled layers: the same gradients, in as few graphs as possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.config.schema.parallel import RecomputeSection
from launcher.parallel.compiling import Compiler, compile_layers, exclude_from_compile
from launcher.parallel.layer_modules import layer_modules
from launcher.parallel.recompute import (
    apply_recompute,
    is_cheap,
    recompute_plan,
    recomputed_modules,
)
from tests.parallel.keeping import (
    ALONE,
    INTERLEAVED,
    SEQUENCE,
    SWAP,
    check,
    decoder,
    numbered,
    plain,
    recompute,
    step,
)
from tests.parallel.parity import Case
from tests.workshop import Workshop

COMPILED = {"compile": "aot_eager"}
COMPILED_LAYOUTS = [
    Case(dp=2, sharded=True, more=COMPILED),
    Case(tp=2, parallel=SEQUENCE, more={**COMPILED, **recompute(select_recompute=True)}),
    Case("qwen3 moe", tp=2, more=COMPILED),
    Case(cp=2, more={**COMPILED, **recompute(recompute=True)}),
    Case(cp=2, parallel={"context_parallel_algo": "ulysses_cp"}, more=COMPILED),
    Case("qwen3 moe", dp=2, ep=2,
         more={**COMPILED, **recompute(select_recompute=["mlp", "input_layernorm"])}),
    Case("deepseek", dp=2, ep=2, batch=2, more={**COMPILED, **INTERLEAVED}),
    Case(pp=2, more={**COMPILED, **SWAP}),
    Case(pp=2, model={"hidden_dropout": 0.1}, more=COMPILED),
    Case("qwen3 tied", cp=2, tp=2,
         parallel={**SEQUENCE, "context_parallel_algo": "ulysses_cp"}, more=COMPILED),
]  # fmt: skip
INDUCTOR_LAYOUTS = [
    Case(dp=2, sharded=True, more={"compile": True}),
    Case(tp=2, parallel=SEQUENCE, more={"compile": True, **recompute(recompute=True)}),
    Case(pp=2, more={"compile": True}),
]


def test_a_compiled_layout(workshop: Workshop) -> None:
    check(workshop, COMPILED_LAYOUTS[1:2], tolerance=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("case", COMPILED_LAYOUTS + INDUCTOR_LAYOUTS, ids=str)
def test_compiled_layouts(workshop: Workshop, case: Case) -> None:
    check(workshop, [case], tolerance=1e-4)


@pytest.mark.parametrize(
    ("model_name", "section", "breaks"),
    [
        ("dense", {"select_recompute": True}, False),  # cheap modules stay in the graph
        pytest.param("dense", {}, False, marks=pytest.mark.long),
        pytest.param("experts", {"recompute": True}, True, marks=pytest.mark.long),
        pytest.param("latent", {"select_recompute": ["mlp"]}, True, marks=pytest.mark.long),
    ],
)
def test_compiled_layers_give_the_same_gradients(
    model_name: str, section: dict[str, Any], breaks: bool
) -> None:
    """`breaks`: whether there are graph breaks: at experts, and separately compiled modules."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = decoder(model_name)
    layers = numbered(model)
    names = recomputed_modules(layers, recompute_plan(RecomputeSection(**section), ALONE))
    apart = {n: {name for name in names[n] if not is_cheap(name)} - {""} for n in layers}
    compile_layers(layers, Compiler("aot_eager"), apart)
    apply_recompute(layers, names)
    exclude_from_compile(layers, apart)
    gradients, _ = step(model)
    for name, expected in plain(model_name)[0].items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] > 0
    found = list(counters["graph_break"])
    assert bool(found) == breaks, found
    assert all("function _disabled" in one for one in found), found


def test_experts_in_bfloat16_are_graphs_of_their_own() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, expected = decoder("experts").bfloat16(), decoder("experts").bfloat16()
    layers = numbered(model)
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    stacks = {n: {"mlp.experts"} & layer_modules(layer).keys() for n, layer in layers.items()}
    compile_layers(layers, Compiler(backend), stacks)  # as where experts are recomputed
    exclude_from_compile(layers, stacks)
    (gradients, _), (plain_gradients, _) = step(model), step(expected)
    for name, gradient in plain_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    products = [graph.count("grouped_mm(") for graph in graphs]
    assert sorted(set(products)) == [0, 3], "the three products and the activation are one graph"
    assert all("silu" in graph for graph in graphs if "grouped_mm(" in graph)
    assert all("function _disabled" in found for found in counters["graph_break"])
