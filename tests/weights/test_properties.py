"""Properties of the plan: any layout from any layout, to the bit, each byte once.

First runs between any two strided memories, then the plan on files in memory, for meshes of up to
64 ranks.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.layout.box import Box
from launcher.layout.shard import Shard
from launcher.weights.formats.safetensors import Entry
from launcher.weights.pieces import Piece, Pieces
from launcher.weights.ranks.distributed import check_complete
from launcher.weights.reading.plan import plan_box, strided_copy_of
from launcher.weights.reading.strided_copy import strided_copy
from launcher.weights.reading.tensor_bytes import memory_of
from launcher.weights.source import Source
from launcher.weights.tensor_mapping import mapped
from tests.weights.worlds import World, bits, random_tensor, shards, spoil, worlds

NAMES = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}


# --- runs -------------------------------------------------------------------------------------

MARGINS = list(itertools.product((0, 1), repeat=3))


@pytest.mark.parametrize("turned", [False, True], ids=["C-ordered", "turned in the file"])
def test_runs_copy_a_box_between_any_two_surroundings(turned: bool) -> None:
    """Whichever dims the box fills in the file and in memory: all 64 ways, to the element."""
    size = (2, 3, 2)
    for in_file, in_memory in itertools.product(MARGINS, MARGINS):
        file = np.arange(np.prod(np.add(size, in_file)), dtype=np.int16).reshape(
            np.add(size, in_file)[:: -1 if turned else 1]
        )
        memory = np.full(np.add(size, in_memory), -1, np.int16)
        source, goal = view_at(file.T if turned else file, in_file), view_at(memory, in_memory)
        expected = memory.copy()
        view_at(expected, in_memory)[:] = source
        found = strided_copy(size, 2, address(source, file), address(goal, memory))
        assert found.nbytes == goal.nbytes
        content, flat = file.tobytes(), memory.reshape(-1).view(np.uint8)
        for position, start, length in found:
            flat[start : start + length] = np.frombuffer(content[position:][:length], np.uint8)
        assert np.array_equal(memory, expected), (in_file, in_memory)


def view_at(array: np.ndarray, margins: tuple[int, ...]) -> np.ndarray:
    """The box behind the margins, a view."""
    return array[tuple(slice(margin, None) for margin in margins)]


def address(view: np.ndarray, owner: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """(offset in the memory of the owner, strides), in bytes."""
    return view.ctypes.data - owner.ctypes.data, view.strides


# --- the plan ---------------------------------------------------------------------------------


def check_plan(world: World, seed: int) -> None:
    """Every rank of the second layout is filled from what the ranks of the first one hold."""
    generator = np.random.default_rng(seed)
    dtypes = list(NAMES)
    values = {
        name: random_tensor(generator, shape, dtypes[generator.integers(len(dtypes))])
        for name, shape in world.shapes.items()
    }
    files = [file_in_memory(world, rank, values, generator)
             for rank in range(world.before.mesh.world_size)]  # fmt: skip
    pieces: dict[str, list[Piece]] = {}
    for _, found in files:
        for name, piece in found.items():
            pieces.setdefault(name, []).append(piece)
    tensors = {name: Pieces(found) for name, found in pieces.items()}
    check_complete(Source("distributed", Path(), tensors, {}))
    done = set[tuple[str, Box]]()
    for rank in range(world.after.mesh.world_size):
        for name, shard in shards(world.after, rank, values).items():
            if (name, shard.box) not in done:  # ranks that hold the same are filled alike
                done.add((name, shard.box))
                check_filled(world, rank, name, shard, tensors, [content for content, _ in files])


def file_in_memory(
    world: World, rank: int, values: dict[str, torch.Tensor], generator: np.random.Generator
) -> tuple[np.ndarray, dict[str, Piece]]:
    """The bytes of a rank's file, with some that belong to nobody in between, and its pieces."""
    content, pieces = bytearray(), {}
    for name, shard in world.saved(rank, values).items():
        content += generator.bytes(int(generator.integers(4)))
        start = len(content)
        content += bits(shard.tensor).numpy().tobytes()
        entry = Entry(NAMES[shard.tensor.dtype], shard.box.size, start, len(content))
        pieces[name] = Piece(Path(f"{rank}"), entry, shard.shape, shard.box, rank)
    return np.frombuffer(content, np.uint8), pieces


def check_filled(
    world: World, rank: int, name: str, shard: Shard, tensors: dict[str, Pieces],
    files: list[np.ndarray],
) -> None:  # fmt: skip
    """The reads of a shard write every byte once: as many as it has, and none stays wrong."""
    expected, written = bits(shard.tensor), 0
    spoil(shard.tensor)
    for file_name, part in mapped({name: shard}, world.mappings_of).items():
        memory, strides = memory_of(part.tensor)
        for planned in plan_box(file_name, part.box, tensors[file_name], prefer_rank=rank):
            found = strided_copy_of(planned, part.box, (0, strides))
            assert found.nbytes == planned.nbytes
            content = files[planned.piece.rank]
            for position, start, length in found:
                assert planned.piece.entry.start <= position
                assert position + length <= planned.piece.entry.stop
                memory[start : start + length] = content[position : position + length]
                written += length
    assert written == len(expected)
    assert torch.equal(bits(shard.tensor), expected)


@settings(max_examples=70)
@given(world=worlds(64), seed=st.integers(0, 2**32))
def test_any_layout_from_any_layout(world: World, seed: int) -> None:
    check_plan(world, seed)


@pytest.mark.long
@settings(max_examples=2000)
@given(world=worlds(64), seed=st.integers(0, 2**32))
def test_any_layout_from_any_layout_at_length(world: World, seed: int) -> None:
    check_plan(world, seed)


@given(world=worlds(64))
@settings(max_examples=30)
def test_a_rank_whose_own_file_has_its_box_reads_no_other(world: World) -> None:
    """Direct loading: the layout did not change and nothing was left to others."""
    values = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in world.shapes.items()}
    pieces: dict[str, list[Piece]] = {}
    ranks = range(world.before.mesh.world_size)
    for rank in ranks:
        for name, shard in shards(world.before, rank, values).items():
            entry = Entry("U8", shard.box.size, 0, shard.box.numel)
            piece = Piece(Path(f"{rank}"), entry, shard.shape, shard.box, rank)
            pieces.setdefault(name, []).append(piece)
    tensors = {name: Pieces(found) for name, found in pieces.items()}
    for rank in ranks:
        for name, shard in shards(world.before, rank, values).items():
            reads = plan_box(name, shard.box, tensors[name], prefer_rank=rank)
            assert [read.piece.rank for read in reads] == [rank] * bool(shard.box.numel)
