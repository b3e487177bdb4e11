"""Random initialization of parameters, as a function of (seed, name, index) and nothing else.

Invariant: any box of a parameter equals the same slice of the full parameter, on any number of
ranks: rows are drawn in blocks of 256, each from a generator seeded by (seed, name, block). Names
are those on disk: an expert's matrix is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import torch
import xxhash
from torch import Tensor

from models.config_class import config_class
from models.names import unstacked
from models.plan import kind_of
from models.spec import ModelSpec

BLOCK_ROWS = 256

# Norms of these families multiply by (1 + weight): they are initialized to zeros.
_ZERO_CENTRED_NORMS = frozenset({"gemma", "gemma2", "gemma3_text", "vaultgemma"})
# Projections into the residual stream whose std is scaled by 1 / sqrt(2 * layers).
_RESIDUAL_PROJECTIONS = {
    "gpt2": "c_proj.weight", "gpt-sw3": "c_proj.weight", "gpt_bigcode": "c_proj.weight",
    "nanochat": "o_proj.weight",
}  # fmt: skip


def initialize_shard(
    name: str,
    global_shape: Sequence[int],
    box_offset: Sequence[int],
    box_size: Sequence[int],
    spec: ModelSpec,
    seed: int,
) -> Tensor:
    """Values [box_size] in float32 of one box of one parameter, on the CPU.

    Biases are zeros and norm weights ones (zeros where the family multiplies by 1 + weight); B of
    an adapter is zeros, A uniform in +-1 / sqrt(inputs); everything else, and parameters with
    `Rule.drawn`, normal(0, initializer_range). A stacked expert parameter is the stack of its
    experts, each of which may also be requested by its name on
    disk.
    """
    parameters = spec.decoder.parameters if spec.decoder is not None else {}
    rule = parameters.get(kind_of(name))
    experts = unstacked(name, global_shape, parameters)
    if experts is None and rule is not None and rule.expert:
        module, _, leaf = name.rpartition(".")
        experts = [f"{module}.{expert}.{leaf}" for expert in range(global_shape[0])]
    if experts is not None:
        local = experts[box_offset[0] : box_offset[0] + box_size[0]]
        inner = (global_shape[1:], box_offset[1:], box_size[1:])
        matrices = [initialize_shard(expert, *inner, spec, seed) for expert in local]
        return torch.stack(matrices) if matrices else torch.empty(tuple(box_size))
    constant = _constant(name, len(global_shape), spec.family)
    if constant is not None and not (rule is not None and rule.drawn):
        return torch.full(tuple(box_size), constant)
    values = torch.empty(tuple(box_size))
    if values.numel() == 0:
        return values
    draw = partial(_normal, initial_std(spec, name))
    if name.endswith(".lora_A.weight"):
        draw = partial(_uniform, global_shape[1] ** -0.5)
    width = prod(global_shape[1:])
    columns = tuple(slice(o, o + n) for o, n in zip(box_offset[1:], box_size[1:], strict=True))
    full_rows = list(box_size[1:]) == list(global_shape[1:])
    for block, first, last in _blocks(box_offset[0], box_size[0]):
        begin = block * BLOCK_ROWS
        rows = min(BLOCK_ROWS, global_shape[0] - begin)
        generator = torch.Generator().manual_seed(_block_seed(seed, name, block))
        target = values[first - box_offset[0] : last - box_offset[0]]
        if full_rows and last - first == rows:
            draw(target.view(rows * width), generator)
        else:
            drawn = draw(torch.empty(rows * width), generator)
            drawn = drawn.view(rows, *global_shape[1:])
            target.copy_(drawn[(slice(first - begin, last - begin), *columns)])
    return values


def _normal(std: float, values: Tensor, generator: torch.Generator) -> Tensor:
    return values.normal_(0.0, std, generator=generator)


def _uniform(bound: float, values: Tensor, generator: torch.Generator) -> Tensor:
    """With bound 1 / sqrt(inputs): kaiming_uniform_(a=sqrt(5)), as in PEFT."""
    return values.uniform_(-bound, bound, generator=generator)


def initial_std(spec: ModelSpec, name: str = "") -> float:
    """The standard deviation of a matrix: `initializer_range` or `init_std`, or its default in the
    family."""
    std, known = 0.02, config_class(spec.family)
    for key in ("initializer_range", "init_std"):
        value = spec.hf_config.get(key, known.default(key) if known is not None else None)
        if isinstance(value, int | float):
            std = float(value)
    if name and name.endswith(_RESIDUAL_PROJECTIONS.get(spec.family, " ")):
        layers = next(
            (spec.hf_config[k] for k in ("num_hidden_layers", "n_layer") if k in spec.hf_config), 12
        )
        std /= (2 * layers) ** 0.5
    return std


def no_weight_decay(name: str, ndim: int) -> bool:
    """Whether a parameter is exempt from weight decay: biases and norms."""
    return ndim <= 1 or name.endswith("bias")


def _constant(name: str, ndim: int, family: str) -> float | None:
    if name.endswith(("bias", ".lora_B.weight")):
        return 0.0
    if ndim <= 1:
        return 0.0 if family in _ZERO_CENTRED_NORMS else 1.0
    return None


def _blocks(offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(block, first row, row after the last) of every block in rows [offset, offset + size)."""
    for block in range(offset // BLOCK_ROWS, -(-(offset + size) // BLOCK_ROWS)):
        begin = block * BLOCK_ROWS
        yield block, max(offset, begin), min(offset + size, begin + BLOCK_ROWS)


def _block_seed(seed: int, name: str, block: int) -> int:
    return xxhash.xxh3_64_intdigest(f"initial/{seed}/{name}/{block}".encode())
