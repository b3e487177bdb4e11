"""Which kernels operations on CUDA may use: determinism and attention, one rule for a process.

Owns the settings of torch that decide it. They are set once, before the first operation, and hold
in the forward pass, the backward pass, recomputation, the optimizer and evaluation alike: a forward
pass under another rule than its backward pass takes kernels whose gradients are not deterministic,
and a recomputed one saves tensors of other shapes. On the CPU nothing is set.

    rule      operation without a deterministic kernel    scaled dot product attention
    strict    error                                       flash, memory-efficient, math
    warn      warning; gradients of attention may vary    flash, memory-efficient, math
    fast      runs                                        the same, and cuDNN when training

cuDNN's attention has no deterministic backward pass, and raises no error for it unless the rule is
strict. In generation it builds a plan for each length of the keys, which is every step.
Flash and memory-efficient attention have a deterministic backward pass, which torch (2.11 to 2.13)
takes under the strict rule only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from launcher.errors import UserError

Rule = Literal["strict", "warn", "fast"]

ATTENTION = ("flash", "efficient", "math")
"""Kernels of scaled dot product attention that every rule allows, as torch prefers them."""
CUDNN = "cudnn"

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Values with which cuBLAS is deterministic (CUDA's documentation, "results reproducibility")."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables with settings of the CUDA allocator: the name since torch 2.9, and the one before,
which it still reads."""
NCCL_ALGORITHMS = ("NCCL_ALGO", "NCCL_PROTO")
"""Variables that fix what NCCL otherwise chooses by the layout and the size of a message alone."""
_EXPANDABLE = "expandable_segments:True"

_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")


@dataclass(frozen=True)
class Kernels:
    """The rule of a process, and the kernels of attention it allows."""

    rule: Rule
    attention: tuple[str, ...] = ATTENTION

    @property
    def is_deterministic(self) -> bool:
        """Whether two runs give the same bits, unless torch warns."""
        return self.rule != "fast"

    def apply(self) -> None:
        """Set torch accordingly, in all threads. Called once, before the first CUDA operation."""
        torch.use_deterministic_algorithms(self.rule != "fast", warn_only=self.rule == "warn")
        # Filling costs a pass over memory that is written anyway.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cuda.enable_flash_sdp("flash" in self.attention)
        torch.backends.cuda.enable_mem_efficient_sdp("efficient" in self.attention)
        torch.backends.cuda.enable_math_sdp("math" in self.attention)
        torch.backends.cuda.enable_cudnn_sdp(CUDNN in self.attention)
        if self.is_deterministic:
            # Images set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE; float32 is to mean float32 everywhere.
            torch.set_float32_matmul_precision("highest")


def choose_kernels(deterministic: bool | str, *, own_decoder: bool, trains: bool) -> Kernels:
    """The kernels for the key `deterministic` ("auto", True or False).

    `own_decoder`: the model is a decoder of `models/`, whose operations all have deterministic
    kernels; those of transformers are not known. `trains`: whether there are backward passes.
    """
    if deterministic is False:
        return Kernels("fast", (*ATTENTION, CUDNN) if trains else ATTENTION)
    return Kernels("strict" if deterministic is True or own_decoder else "warn")


def current_kernels() -> Kernels:
    """What torch is set to now, by whomever."""
    backends = torch.backends.cuda
    found = {
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
        CUDNN: backends.cudnn_sdp_enabled(),
    }
    rule: Rule = "fast"
    if torch.are_deterministic_algorithms_enabled():
        rule = "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "strict"
    return Kernels(rule, tuple(name for name, enabled in found.items() if enabled))


@contextmanager
def usual_writes() -> Iterator[None]:
    """In this context, of operations that write every element once and compute no gradients, torch
    takes its usual kernels. Under a deterministic rule `index_copy_` sorts its indices in case some
    are equal, and copies the entire tensor twice to do so.
    """
    rule = current_kernels().rule
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(rule != "fast", warn_only=rule == "warn")


def set_variables(
    environment: MutableMapping[str, str], *, deterministic: bool | str, expandable_segments: bool
) -> None:
    """Set the environment variables that CUDA's libraries read at their first use. Those that the
    user has set stay.

    Raises `UserError` for a setting of cuBLAS that contradicts `deterministic`.
    """
    if deterministic is not False:
        written = environment.setdefault(CUBLAS_WORKSPACE, CUBLAS_WORKSPACES[0])
        if written not in CUBLAS_WORKSPACES:
            raise UserError(
                f"{CUBLAS_WORKSPACE} = {written}", where="environment variable",
                rule="deterministic kernels of cuBLAS need one of "
                f"{' and '.join(CUBLAS_WORKSPACES)}",
                nearest=f"Nearest: {CUBLAS_WORKSPACES[0]}",
                advice="Remove the variable, or set deterministic: False",
            )  # fmt: skip
    if expandable_segments and not any(name in environment for name in ALLOCATOR):
        environment[ALLOCATOR[0]] = _EXPANDABLE


def allocator_setting() -> str:
    """The settings of the CUDA allocator that count, as `expandable_segments:True`; empty for
    those of torch."""
    return next((os.environ[name] for name in ALLOCATOR if os.environ.get(name)), "")


@contextmanager
def naming_operations(key: str, where: str) -> Iterator[None]:
    """An operation that torch refuses under the strict rule is an error of the user that names it.

    `key`: what is set, `where`: its place. Raises `UserError`.
    """
    try:
        yield
    except RuntimeError as error:
        operation = refused_operation(error)
        if operation is None:
            raise
        raise UserError(
            f"{key}: {operation} was called", where=where,
            rule="torch has no deterministic kernel for this operation on CUDA",
            nearest="`deterministic: auto` warns of it where the model is of transformers",
            advice="Set deterministic: auto, or False for runs that need not repeat",
        ) from error  # fmt: skip


def refused_operation(error: BaseException | None) -> str | None:
    """The operation that torch refused as not deterministic; None for other errors."""
    while error is not None:
        if found := _NOT_DETERMINISTIC.search(str(error)):
            return found[1]
        error = error.__cause__
    return None


def versions(device: torch.device) -> dict[str, Any]:
    """What must be equal on all ranks for kernels and collectives of equal results: versions, the
    kind of device, and the variables that choose algorithms of NCCL."""
    found: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        found["CUDA"] = torch.version.cuda
        found["cuDNN"] = torch.backends.cudnn.version()
        found["GPU"] = torch.cuda.get_device_name(device)
        for name in (*NCCL_ALGORITHMS, CUBLAS_WORKSPACE):
            found[name] = os.environ.get(name)
    return found
