"""Which kernels CUDA may use: the rule, torch's settings under it, and the environment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from launcher.errors import UserError
from launcher.parallel.kernels import (
    ALLOCATOR,
    ATTENTION,
    CUBLAS_WORKSPACE,
    Kernels,
    choose_kernels,
    current_kernels,
    naming_operations,
    refused_operation,
    set_variables,
)
from tests.models.tiny import tokens
from tests.parallel.keeping import decoder, run_again, step


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Torch as it was."""
    before, precision = current_kernels(), torch.get_float32_matmul_precision()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    before.apply()
    torch.set_float32_matmul_precision(precision)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


WITH_CUDNN = (*ATTENTION, "cudnn")


@pytest.mark.parametrize(
    ("deterministic", "own", "trains", "expected"),
    [
        ("auto", True, True, Kernels("strict", ATTENTION)),
        ("auto", True, False, Kernels("strict", ATTENTION)),
        ("auto", False, True, Kernels("warn", ATTENTION)),
        (True, False, True, Kernels("strict", ATTENTION)),
        (True, True, False, Kernels("strict", ATTENTION)),
        (False, True, True, Kernels("fast", WITH_CUDNN)),
        (False, False, True, Kernels("fast", WITH_CUDNN)),
        # a plan of cuDNN for each length of the keys is a plan a token
        (False, True, False, Kernels("fast", ATTENTION)),
    ],
)
def test_torch_is_set_to_the_rule(
    deterministic: bool | str, own: bool, trains: bool, expected: Kernels
) -> None:
    torch.set_float32_matmul_precision("high")  # an image with TF32 on
    torch.backends.cudnn.benchmark = True
    kernels = choose_kernels(deterministic, own_decoder=own, trains=trains)
    assert kernels == expected
    kernels.apply()
    assert current_kernels() == expected
    assert torch.are_deterministic_algorithms_enabled() == (deterministic is not False)
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    precision = torch.get_float32_matmul_precision()
    assert precision == ("high" if deterministic is False else "highest")


@pytest.mark.parametrize("rule", ["strict", "warn", "fast"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_one_rule_in_forward_backward_and_recomputation(rule: Any, recomputes: bool) -> None:
    model, seen = decoder("dense"), []
    layers = list(model.model.layers.values())

    def note(where: str) -> None:
        seen.append((where, current_kernels()))

    layers[0].register_forward_pre_hook(lambda *_: note("forward"))
    layers[0].self_attn.register_forward_pre_hook(lambda *_: note("attention"))
    layers[0].register_full_backward_hook(lambda *_: note("backward"))
    run_again(model, recompute=recomputes)
    kernels = Kernels(rule)
    kernels.apply()
    step(model)
    model.eval()(tokens(2, 6))
    places = [where for where, _ in seen]
    assert {"forward", "backward"} <= set(places)
    # again when recomputed, in the middle of the backward pass, and in evaluation
    assert places.count("attention") == (3 if recomputes else 2)
    assert {found for _, found in seen} == {kernels}


@pytest.mark.parametrize(
    ("environment", "keys", "expected"),
    [
        ({}, {}, {CUBLAS_WORKSPACE: ":4096:8", ALLOCATOR[0]: "expandable_segments:True"}),
        ({}, {"expandable_segments": False}, {CUBLAS_WORKSPACE: ":4096:8"}),
        ({}, {"deterministic": False, "expandable_segments": False}, {}),
        ({CUBLAS_WORKSPACE: ":16:8"}, {"expandable_segments": False}, {CUBLAS_WORKSPACE: ":16:8"}),
        # settings of the user win
        (
            {ALLOCATOR[0]: "max_split_size_mb:64"}, {"deterministic": False},
            {ALLOCATOR[0]: "max_split_size_mb:64"},
        ),
        (
            {ALLOCATOR[1]: "backend:cudaMallocAsync"}, {"deterministic": False},
            {ALLOCATOR[1]: "backend:cudaMallocAsync"},
        ),
        (
            {CUBLAS_WORKSPACE: ":0:0"},
            {"deterministic": False, "expandable_segments": False}, {CUBLAS_WORKSPACE: ":0:0"},
        ),
    ],
)  # fmt: skip
def test_variables_are_set_where_the_user_set_none(
    environment: dict[str, str], keys: dict[str, Any], expected: dict[str, str]
) -> None:
    set_variables(environment, **{"deterministic": "auto", "expandable_segments": True, **keys})
    assert environment == expected


@pytest.mark.parametrize("deterministic", ["auto", True])
def test_a_workspace_of_cublas_that_is_not_deterministic_is_refused(
    deterministic: bool | str,
) -> None:
    with pytest.raises(UserError) as error:
        set_variables(
            {CUBLAS_WORKSPACE: ":0:0"}, deterministic=deterministic, expandable_segments=True
        )
    [problem] = error.value.problems
    assert problem.what == f"{CUBLAS_WORKSPACE} = :0:0"
    assert ":4096:8" in problem.nearest


def test_an_operation_without_deterministic_kernel_is_named() -> None:
    Kernels("strict").apply()
    with (
        pytest.raises(UserError) as error,
        naming_operations("deterministic = True", "a.yaml:3", "auto"),
    ):
        _refused()
    [problem] = error.value.problems
    assert problem.where == "a.yaml:3"
    assert problem.nearest == "Nearest: auto"
    assert "put_" in problem.what
    assert isinstance(error.value.__cause__, RuntimeError)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape") as error, naming_operations("x", "", "False"):
        raise RuntimeError("wrong shape")
    assert refused_operation(error.value) is None
    wrapped = RuntimeError("in a stage")
    wrapped.__cause__ = RuntimeError("histc does not have a deterministic implementation, but")
    assert refused_operation(wrapped) == "histc"


def _refused() -> None:
    """An operation that torch refuses on the CPU too."""
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))
