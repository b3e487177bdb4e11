"""Round trips through real files, to the bit.

What is saved in one layout is loaded in another and exported, optimizer state too; what a stream
cuts out of files is what slices cut out of tensors.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from launcher.layout.box import Box, full_box
from launcher.layout.shard import Shard
from launcher.weights.content import content_of
from launcher.weights.formats import rank_metadata
from launcher.weights.formats.rank_metadata import RankFileMetadata
from launcher.weights.offline.export import write_complete
from launcher.weights.ranks.distributed import check_copies, open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading import read, transfer
from launcher.weights.reading.checksums import file_faults
from launcher.weights.reading.load import load
from launcher.weights.source import Source, open_complete
from launcher.weights.streaming import stream, write
from launcher.weights.streaming.stream import Output
from launcher.weights.tensor_mapping import mapped, shapes_in_files
from tests.weights.worlds import MOMENTS, World, bits, random_tensor, region, shards, spoil, worlds

# --- rank files -------------------------------------------------------------------------------


@contextmanager
def small_steps(short_run: int, portion: int):
    """Portions, blocks and runs so small that small tensors have many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "SHORT_RUN", short_run)
        for module in (read, stream):
            patch.setattr(module, "PORTION_BYTES", portion)
        for module in (rank_metadata, stream, write):
            patch.setattr(module, "BLOCK_BYTES", 2 * portion)
        yield


def model_of(world: World, generator: np.random.Generator) -> dict[str, torch.Tensor]:
    """Weights in bfloat16 or float16, and moments in float32."""
    values = {}
    for number, (name, shape) in enumerate(world.shapes.items()):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        values[name] = random_tensor(generator, shape, dtype)
        for prefix in MOMENTS:
            values[prefix + name] = random_tensor(generator, shape, torch.float32)
    return values


def save_ranks(folder: Path, world: World, values: dict[str, torch.Tensor], alias: str) -> Source:
    """Every rank of the first layout writes its file; `t0` is filed as `alias`."""
    files = []
    for rank in range(world.before.mesh.world_size):
        path = folder / f"rank_{rank}" / f"m_rank_{rank}-1_1.safetensors"
        path.parent.mkdir(parents=True)
        saved = {alias if n == "t0" else n: s for n, s in world.saved(rank, values).items()}
        write_rank_file(path, saved, mesh=world.before.mesh, rank=rank,
                        remove_redundancy=world.leaves_copies)  # fmt: skip
        assert file_faults(path) == []
        files.append(path)
    source = open_rank_files(folder, files)
    check_copies(source)
    assert source.is_deduplicated == world.leaves_copies
    return source


def check_loaded(world: World, values: dict[str, torch.Tensor], source: Source) -> None:
    """Every rank of the second layout loads what it held, to the bit, and reads no byte twice."""
    expected = shapes_in_files({n: tuple(t.shape) for n, t in values.items()}, world.mappings_of)
    for rank in range(world.after.mesh.world_size):
        held = shards(world.after, rank, values)
        wanted = {name: bits(shard.tensor) for name, shard in held.items()}
        for shard in held.values():
            spoil(shard.tensor)
        report = load(
            mapped(held, world.mappings_of), source, expected=expected, rank=rank,
            tied={"head": "t0"}, ignore_prefixes=(),
        )  # fmt: skip
        assert report.bytes_read == sum(map(len, wanted.values()))
        for name, shard in held.items():
            assert torch.equal(bits(shard.tensor), wanted[name]), name


def check_exported(
    world: World, values: dict[str, torch.Tensor], source: Source, folder: Path, alias: str
) -> None:
    """The complete weights of any save are the tensors that were saved, to the bit."""
    folder.mkdir()
    exported = write_complete(source, folder, max_shard_bytes=100)
    found = {}
    for file in exported.files:
        found |= load_file(folder / file)
    wanted = mapped(
        {n: Shard(tuple(t.shape), full_box(t.shape), t) for n, t in values.items()},
        world.mappings_of,
    )
    assert found.keys() == {alias if name == "t0" else name for name in wanted}
    for name, shard in wanted.items():
        assert torch.equal(bits(found[alias if name == "t0" else name]), bits(shard.tensor)), name
    model = {name for name in found if not name.startswith(MOMENTS)}
    complete = open_complete(folder)
    assert set(complete.tensors) == model
    assert content_of(complete) == content_of(source)


def check_round_trip(folder: Path, world: World, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = model_of(world, generator)
    alias = "head" if "t0" not in world.experts and seed % 2 else "t0"
    with small_steps((1, 8, 1 << 14)[seed % 3], 64):
        source = save_ranks(folder / "ranks", world, values, alias)
        check_loaded(world, values, source)
        check_exported(world, values, source, folder / "complete", alias)


@settings(max_examples=40)
@given(world=worlds(8), seed=st.integers(0, 2**32))
def test_save_load_and_export_give_back_every_bit(tmp_path_factory, world, seed) -> None:
    check_round_trip(tmp_path_factory.mktemp("round"), world, seed)


@pytest.mark.long
@settings(max_examples=400)
@given(world=worlds(8), seed=st.integers(0, 2**32))
def test_save_load_and_export_at_length(tmp_path_factory, world, seed) -> None:
    check_round_trip(tmp_path_factory.mktemp("round"), world, seed)


# --- streams ----------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.uint8,
                          torch.float8_e4m3fn])  # fmt: skip


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A box inside `shape`, empty ones too."""
    offset = [draw(st.integers(0, n)) for n in shape]
    size = [draw(st.integers(0, n - start)) for n, start in zip(shape, offset, strict=True)]
    return Box(tuple(offset), tuple(size))


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_streams_cut_like_slices(tmp_path_factory, data: st.DataObject, seed: int) -> None:
    folder, generator = tmp_path_factory.mktemp("stream"), np.random.default_rng(seed)
    kinds = data.draw(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=4))
    tensors = {f"t{n}": bits_as(generator, *kind) for n, kind in enumerate(kinds)}
    for part in range(2):
        names = list(tensors)[part::2]
        if names:
            save_file({n: tensors[n] for n in names}, folder / f"model-{part}.safetensors")
    source = open_complete(folder)
    outputs = []
    for number in range(data.draw(st.integers(1, 3))):
        chosen = data.draw(st.lists(st.sampled_from(list(tensors)), unique=True, min_size=1))
        cut = {f"new.{n}": (n, data.draw(boxes(tuple(tensors[n].shape)))) for n in chosen}
        places = {new: (tuple(tensors[n].shape), box) for new, (n, box) in cut.items()}
        own = (
            RankFileMetadata(3, number, {"dp_shard": 3}, places)
            if data.draw(st.booleans())
            else None
        )
        outputs.append(Output(folder / f"new-{number}", cut, rank_metadata=own))
    with small_steps(8, 48):
        done = stream.stream(source, outputs)
    assert done == sum(check_output(output, tensors) for output in outputs)


def bits_as(generator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = random_tensor(generator, shape, torch.uint8 if dtype == torch.bool else dtype)
    return values % 2 == 1 if dtype == torch.bool else values


def check_output(output: Output, tensors: dict[str, torch.Tensor]) -> int:
    """The bytes of tensors in a new file, all of which are right."""
    found = load_file(output.path)
    assert found.keys() == output.boxes.keys()
    for new, (name, box) in output.boxes.items():
        wanted = region(tensors[name], box)
        assert (found[new].shape, found[new].dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(bits(found[new]), bits(wanted))
    assert file_faults(output.path) == []
    return sum(tensor.nbytes for tensor in found.values())
