"""Compiled layers: the same gradients, in as few graphs as possible."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.builders import layer_memory
from launcher.builders.compile_mode import compiler_of
from launcher.config.schema import Config
from launcher.config.schema.parallel import (
    ParallelConfigSection,
    ParallelSection,
    PipelineConfigSection,
    RecomputeSection,
)
from launcher.errors import UserError
from launcher.parallel.compiling import (
    Compiler,
    compile_layers,
    exclude_from_compile,
    why_unusable,
)
from launcher.parallel.layer_modules import layer_modules
from launcher.parallel.recompute import (
    apply_recompute,
    is_cheap,
    recompute_plan,
    recomputed_modules,
)
from tests.models.tiny import tokens
from tests.parallel.keeping import (
    ALONE,
    CPU,
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
from tests.parallel.parity import Case, Outcome, run_on_rank
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


def run_compiled(folder: str, cases: Sequence[Case]) -> list[Outcome]:
    """`run_on_rank` for cases that share a process; compiled code is dropped between them."""
    compile_layers = layer_memory.compile_layers

    def fresh(*arguments: Any) -> None:
        torch._dynamo.reset()
        compile_layers(*arguments)

    layer_memory.compile_layers = fresh
    return run_on_rank(folder, cases)


def test_a_compiled_layout(workshop: Workshop) -> None:
    check(workshop, COMPILED_LAYOUTS[1:2], tolerance=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_compiled_layouts(workshop: Workshop, ranks: int) -> None:
    cases = [case for case in COMPILED_LAYOUTS if case.ranks == ranks]
    assert cases
    check(workshop, cases, tolerance=1e-4, main=run_compiled)


@pytest.mark.long
def test_layouts_compiled_by_inductor(workshop: Workshop) -> None:
    check(workshop, INDUCTOR_LAYOUTS, tolerance=1e-4, main=run_compiled)


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


def counting(graphs: list[Any]) -> Any:
    """A backend that runs graphs as they are, and puts them in a list."""

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def test_equal_layers_share_a_graph() -> None:
    """With dropout too, which depends on the number of a layer; one graph more for evaluation."""
    model_name = "dense"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs: list[Any] = []
    model = decoder(model_name)
    layers = numbered(model)
    names = dict.fromkeys(layers, ())
    compile_layers(layers, Compiler(counting(graphs)), names)
    exclude_from_compile(layers, names)
    gradients, _ = step(model)
    for name, expected in plain(model_name)[0].items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 1
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            model(tokens(2, 24))
        model.train()
        step(model)
    assert len(graphs) == 2, "one for each mode"
    assert not torch._dynamo.utils.counters["graph_break"]


def failing(_: Any, __: Any) -> Any:
    raise RuntimeError("no kernel for this\nand more")


def test_a_layer_that_does_not_compile_runs_eagerly_or_ends_the_run() -> None:
    torch._dynamo.reset()
    lines: list[str] = []
    model = decoder("dense")
    layers, names = numbered(model), dict.fromkeys(range(3), ())
    compiler = Compiler(failing, falls_back=True, log=lines.append)
    compile_layers(layers, compiler, names)
    gradients, _ = step(model)
    for name, expected in plain("dense")[0].items():
        assert torch.equal(gradients[name], expected), name
    (line,) = lines
    assert "no kernel for this" in line
    assert "and more" not in line
    assert len(compiler.failures) == len(layers)
    strict = decoder("dense")
    compile_layers(numbered(strict), Compiler(failing, where="run.yaml:5"), names)
    with pytest.raises(UserError, match=r"run\.yaml:5: compile") as error:
        step(strict)
    assert error.value.problems[0].nearest == "Nearest: False"


def test_errors_of_the_computation_are_not_those_of_the_compiler() -> None:
    def out_of_memory(graph: Any, _: Any) -> Any:
        def run(*arguments: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    run = Compiler(out_of_memory, falls_back=True).compiled(lambda x: x + 1)
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.ones(2))


def test_a_backend_that_does_not_work_is_found_before_the_first_step() -> None:
    assert why_unusable("aot_eager", CPU) == ""
    assert "nonesuch" in why_unusable("nonesuch", CPU)


class FakeJob:
    """What `compiler_of` reads of a job."""

    def __init__(self, value: Any, device: str, scheduler: str = "1f1b") -> None:
        pipeline = PipelineConfigSection(pipeline_scheduler=scheduler)
        self.config = Config(
            compile=value, parallel=ParallelSection(pipeline_config=pipeline),
            parallel_config=ParallelConfigSection(pipeline_stage=2),
        )  # fmt: skip
        self.world = SimpleNamespace(device=torch.device(device), gather=lambda value: [value, ""])
        self.provenance = SimpleNamespace(where=lambda key: f"run.yaml: {key}")
        self.spec = SimpleNamespace(family="qwen3")
        self.lines: list[str] = []
        self.log = self.lines.append


@pytest.mark.parametrize(
    ("value", "device", "usable", "more", "backend", "word"),
    [
        ("auto", "cpu", True, {}, None, None),
        ("auto", "cuda", True, {}, "inductor", "inductor"),
        ("auto", "cuda", False, {}, None, "no triton"),
        ("auto", "cuda", True, {"scheduler": "zero_bubble_v"}, None, "splits the backward"),
        (False, "cuda", True, {}, None, None),
        (True, "cuda", True, {}, "inductor", "inductor"),
        ("aot_eager", "cpu", False, {}, "aot_eager", "aot_eager"),
        (True, "cpu", False, {}, UserError, None),
    ],
)
def test_what_auto_chooses(
    value: Any, device: str, usable: bool, more: dict[str, Any], backend: Any, word: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    why = "" if usable else "no triton"
    monkeypatch.setattr("launcher.builders.compile_mode.why_unusable", lambda *_: why)
    job: Any = FakeJob(value, device, **more)
    if backend is UserError:
        with pytest.raises(UserError, match="no triton"):
            compiler_of(job, is_decoder=True)
        return
    compiler = compiler_of(job, is_decoder=True)
    assert (compiler and compiler.backend) == backend
    assert compiler is None or compiler.falls_back == (value == "auto")
    assert len(job.lines) == (word is not None)
    assert word is None or word in job.lines[0]


def test_auto_leaves_modules_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.builders.compile_mode.why_unusable", lambda *_: "")
    job: Any = FakeJob("auto", "cuda")
    assert compiler_of(job, is_decoder=False) is None
    assert "transformers" in job.lines[0]


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
