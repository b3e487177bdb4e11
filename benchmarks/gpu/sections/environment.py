"""Versions, the device, and the attention kernels that PyTorch chooses on it."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.cuda import nccl
from torch.nn.attention import SDPBackend

from benchmarks.gpu.driver import Bench, Case, Figures
from launcher.parallel.kernels import choose_kernels, current_kernels

PACKAGES = ("torch", "transformers", "triton", "torchao", "torchtitan", "slipway")


def cases(bench: Bench) -> Iterator[Case]:
    """The section."""
    yield Case("versions", lambda: versions(bench))
    yield Case("matrix product", lambda: matrix_product(bench))
    yield Case("attention kernels", lambda: kernels(bench))


def versions(bench: Bench) -> Figures:
    """What runs, and on what."""
    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    found["device"] = str(bench.device)
    if bench.on_cuda:
        properties: Any = torch.cuda.get_device_properties(bench.device)
        found["device"] = properties.name
        found["memory_gib"] = properties.total_memory / 2**30
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cudnn"] = torch.backends.cudnn.version()
        found["nccl"] = ".".join(map(str, nccl.version()))
    return found


def matrix_product(bench: Bench) -> Figures:
    """What the device reaches in one large product: an upper bound for every figure below."""
    size = 8192 if bench.on_cuda else 128
    left, right = (
        torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2)
    )
    for _ in range(3):
        left @ right
    count, started = 20, bench.now()
    for _ in range(count):
        left @ right
    return {"tflops": 2 * size**3 * count / (bench.now() - started) / 1e12}


def kernels(bench: Bench) -> Figures:
    """The backend of scaled dot product attention: causal or with a mask, deterministic or not, for
    a full row and for one query."""
    length = bench.sizes.attention_length
    heads, kv_heads, size = bench.sizes.heads
    before = current_kernels()
    found = {}
    try:
        for masked, strict, queries in product((False, True), (False, True), (length, 1)):
            rule = "auto" if strict else False
            choose_kernels(rule, own_decoder=True, trains=True).apply()
            query, key = (
                torch.empty(1, count, tokens, size, device=bench.device, dtype=torch.bfloat16)
                for count, tokens in ((heads, queries), (kv_heads, length))
            )
            mask = (
                torch.ones(1, 1, queries, length, dtype=torch.bool, device=bench.device)
                if masked
                else None
            )
            name = (f"{'mask' if masked else 'causal'}, {'strict' if strict else 'any'}, "
                    f"{queries} queries")  # fmt: skip
            found[name] = backend(query, key, mask)
    finally:
        before.apply()
    return found


def backend(query: Tensor, key: Tensor, mask: Tensor | None) -> str:
    """The name of the backend that PyTorch chooses for training on these tensors."""
    query = query.requires_grad_()
    is_causal = mask is None and query.shape[2] > 1
    chosen = torch._fused_sdp_choice(
        query, key, key, attn_mask=mask, is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    names = {value.value: name for name, value in SDPBackend.__members__.items()}
    return names.get(int(chosen), str(chosen))
