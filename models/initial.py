"""Random initialization of parameters, as a function of (seed, name, index) and nothing else.

Invariant: any box of a parameter equals the same slice of the full parameter, on any number of
ranks: rows are drawn in blocks of 256, each from a generator seeded by (seed, name, block). Names
are those on disk: an expert's matrix is the same on every rank. Blocks are independent of each
other: `models.initialize` draws them on several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
import xxhash
from torch import Tensor

from launcher.layout.box import Box
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


@dataclass(frozen=True)
class Block:
    """The initial values of a part of the box that a rank holds of a parameter."""

    region: Box
    """That part, inside of the box: all of it but for the rows."""

    def draw(self, values: Tensor) -> None:
        """Fill `values`: contiguous, float32 [region.size], on the CPU."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Block):
    """The same number everywhere: 0 or 1, exact in every dtype."""

    value: float

    def draw(self, values: Tensor) -> None:
        values.fill_(self.value)


@dataclass(frozen=True)
class Drawn(Block):
    """Some rows and columns of a block of random rows."""

    seed: int
    bound: float
    is_uniform: bool
    """Uniform in +-`bound`; otherwise normal, with this standard deviation."""
    shape: tuple[int, ...]
    """Of all rows of the block, which are always drawn together."""
    part: tuple[slice, ...] | None
    """What of them `region` holds; None: all."""

    def draw(self, values: Tensor) -> None:
        if self.part is None:
            self._draw(values.view(-1))
            return
        drawn = torch.empty(prod(self.shape))
        self._draw(drawn)
        values.view(self._size()).copy_(drawn.view(self.shape)[self.part])

    def _draw(self, values: Tensor) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        if self.is_uniform:
            values.uniform_(-self.bound, self.bound, generator=generator)
        else:
            values.normal_(0.0, self.bound, generator=generator)

    def _size(self) -> tuple[int, ...]:
        """Of `region` without the dim of the experts."""
        return self.region.size[-len(self.shape) :]


def initialize_shard(
    name: str,
    global_shape: Sequence[int],
    box_offset: Sequence[int],
    box_size: Sequence[int],
    spec: ModelSpec,
    seed: int,
) -> Tensor:
    """Values [box_size] in float32 of one box of one parameter, on the CPU."""
    box, values = Box(tuple(box_offset), tuple(box_size)), torch.empty(tuple(box_size))
    for block in initial_blocks(name, global_shape, box, spec, seed):
        block.draw(narrowed(values, block.region))
    return values


def initial_blocks(
    name: str, global_shape: Sequence[int], box: Box, spec: ModelSpec, seed: int
) -> Iterator[Block]:
    """The initial values of `box` of one parameter, in blocks that cover it once.

    Biases are zeros and norm weights ones (zeros where the family multiplies by 1 + weight); B of
    an adapter is zeros, A uniform in +-1 / sqrt(inputs), which is kaiming_uniform_(a=sqrt(5)), as
    in PEFT; everything else, and parameters with `Rule.drawn`, normal(0, initializer_range). A
    stacked expert parameter is the stack of its experts, each of which may also be requested by its
    name on disk.
    """
    parameters = spec.decoder.parameters if spec.decoder is not None else {}
    rule = parameters.get(kind_of(name))
    experts = unstacked(name, global_shape, parameters)
    if experts is None and rule is not None and rule.expert:
        module, _, leaf = name.rpartition(".")
        experts = [f"{module}.{expert}.{leaf}" for expert in range(global_shape[0])]
    if experts is not None:
        yield from _stacked(experts, global_shape, box, spec, seed)
        return
    if box.numel == 0:
        return
    constant = _constant(name, len(global_shape), spec.family)
    if constant is not None and not (rule is not None and rule.drawn):
        yield Constant(Box((0,) * len(box.size), box.size), constant)
        return
    is_uniform = name.endswith(".lora_A.weight")
    bound = global_shape[1] ** -0.5 if is_uniform else initial_std(spec, name)
    columns = tuple(slice(o, o + n) for o, n in zip(box.offset[1:], box.size[1:], strict=True))
    for block, first, last in _blocks(box.offset[0], box.size[0]):
        begin = block * BLOCK_ROWS
        shape = (min(BLOCK_ROWS, global_shape[0] - begin), *global_shape[1:])
        region = Box((first - box.offset[0], *[0] * len(columns)), (last - first, *box.size[1:]))
        part = None if region.size == shape else (slice(first - begin, last - begin), *columns)
        yield Drawn(region, _block_seed(seed, name, block), bound, is_uniform, shape, part)


def _stacked(
    experts: Sequence[str], global_shape: Sequence[int], box: Box, spec: ModelSpec, seed: int
) -> Iterator[Block]:
    """The blocks of a stack of `experts`, of which `box` has some."""
    inner = Box(box.offset[1:], box.size[1:])
    for index in range(box.size[0]):
        name = experts[box.offset[0] + index]
        for block in initial_blocks(name, global_shape[1:], inner, spec, seed):
            region = Box((index, *block.region.offset), (1, *block.region.size))
            yield replace(block, region=region)


def narrowed(tensor: Tensor, region: Box) -> Tensor:
    """The part `region` of a tensor, as a view."""
    for dim, (start, size) in enumerate(zip(region.offset, region.size, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


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
