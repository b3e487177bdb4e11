"""Any layout to any layout: what is loaded is what was saved, or an error lists all differences."""

from __future__ import annotations

import json
import os
import resource

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.layout.layout import Layout
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.formats.safetensors import Entry
from launcher.weights.offline.export import write_complete
from launcher.weights.pieces import Piece, Pieces
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.load import load
from launcher.weights.reading.plan import Read, plan_box, strided_copy_of
from launcher.weights.source import detect, open_complete


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (13, 4), "norm": (5,), "proj": (3, 2, 4), "scalar": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cut(tensors: dict[str, torch.Tensor], mesh: Mesh, rank: int) -> dict[str, Shard]:
    placed = Layout({name: tuple(t.shape) for name, t in tensors.items()}, mesh).of(rank)
    shards = {}
    for name, tensor in tensors.items():
        box = placed[name].boxes[0]
        part = tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))]
        shards[name] = Shard(tuple(tensor.shape), box, part.contiguous())
    return shards


def save(folder, tensors: dict[str, torch.Tensor], mesh: Mesh):
    files = []
    for rank in range(mesh.world_size):
        path = folder / f"rank_{rank}" / f"m_rank_{rank}-1_1.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rank_file(path, cut(tensors, mesh, rank), mesh=mesh, rank=rank)
        files.append(path)
    return files


def empty_like(shards: dict[str, Shard], dtype: torch.dtype = torch.float32) -> dict[str, Shard]:
    return {
        name: Shard(s.shape, s.box, torch.full(s.tensor.shape, float("nan"), dtype=dtype))
        for name, s in shards.items()
    }


MESHES = st.builds(Mesh, dp_replicate=st.integers(1, 3), dp_shard=st.integers(1, 8))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(before=MESHES, after=MESHES)
def test_save_in_one_layout_load_in_another(tmp_path_factory, before: Mesh, after: Mesh) -> None:
    folder = tmp_path_factory.mktemp("save")
    tensors = model()
    source = open_rank_files(folder, save(folder, tensors, before))
    assert source.mesh == before.sizes()
    for rank in range(after.world_size):
        expected = cut(tensors, after, rank)
        targets = empty_like(expected)
        load(targets, source, rank=rank)
        for name, shard in expected.items():
            assert torch.equal(targets[name].tensor, shard.tensor)


def test_bytes_are_read_once(tmp_path) -> None:
    mesh = Mesh(dp_shard=2)
    tensors = {"w": torch.randn(8, 4)}
    source = open_rank_files(tmp_path, save(tmp_path, tensors, mesh))
    targets = empty_like(cut(tensors, mesh, 1))
    assert load(targets, source, rank=1).bytes_read == 4 * 4 * 4


def test_dtypes_are_cast_on_the_way(tmp_path) -> None:
    tensors = model()
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "m.safetensors"
    )
    targets = empty_like(cut(tensors, Mesh(dp_shard=3), 1))
    load(targets, open_complete(tmp_path), rank=1)
    for name, shard in cut(tensors, Mesh(dp_shard=3), 1).items():
        assert torch.equal(targets[name].tensor, shard.tensor.bfloat16().float())


@given(data=st.data())
def test_byte_runs_copy_exactly_the_overlap(data) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))

    def box(label: str) -> Box:
        offset = [data.draw(st.integers(0, n - 1), label=label) for n in shape]
        size = [data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)]
        return Box(tuple(offset), tuple(size))

    held, wanted = box("held"), box("wanted")
    overlap = held.intersect(wanted)
    if overlap is None:
        return
    values = torch.arange(full_box(shape).numel, dtype=torch.uint8).reshape(shape)
    region = lambda t, b: t[tuple(slice(o, o + n) for o, n in zip(b.offset, b.size, strict=True))]  # noqa: E731
    file = region(values, held).contiguous().numpy().tobytes()
    entry = Entry("U8", held.size, 0, len(file))
    read = Read(Piece(None, entry, shape, held, 0), overlap)  # type: ignore[arg-type]
    memory = bytearray(wanted.numel)
    for position, start, length in strided_copy_of(read, wanted):
        memory[start : start + length] = file[position : position + length]
    result = torch.frombuffer(memory, dtype=torch.uint8).reshape(wanted.size)
    inside = overlap.inside(wanted)
    assert torch.equal(region(result, inside), region(values, overlap))


def test_a_missing_part_is_refused_before_anything_is_read(tmp_path) -> None:
    files = save(tmp_path, {"w": torch.ones(4, 2)}, Mesh(dp_shard=2))
    source = open_rank_files(tmp_path, files)
    with pytest.raises(UserError, match="hold 4 of the 8 elements of `w`"):
        plan_box("w", full_box((4, 2)), Pieces(source.tensors["w"][:1]))


def test_the_table_names_every_difference_and_nothing_is_written(tmp_path) -> None:
    tensors = model()
    on_disk = {**tensors, "extra": torch.ones(2)}
    del on_disk["norm"]
    on_disk["embed"] = torch.ones(13, 5)
    save_file(on_disk, tmp_path / "m.safetensors")
    targets = empty_like(cut(tensors, Mesh(), 0))
    with pytest.raises(UserError) as caught:
        load(targets, open_complete(tmp_path))
    text = str(caught.value)
    assert "1 missing, 1 extra, 1 of another shape" in text
    assert [line.split()[0] for line in text.splitlines()[1:]] == [
        "tensor",
        "norm",
        "extra",
        "embed",
    ]
    assert "[13, 5]" in text
    assert "[13, 4]" in text
    assert all(target.tensor.isnan().all() for target in targets.values())


def test_strict_load_false_loads_what_fits_and_reports_the_rest(tmp_path) -> None:
    save_file({"a": torch.ones(2), "z": torch.ones(1)}, tmp_path / "m.safetensors")
    targets = empty_like(cut({"a": torch.ones(2), "b": torch.ones(3)}, Mesh(), 0))
    report = load(targets, open_complete(tmp_path), strict=False)
    assert (report.loaded, report.not_loaded, report.left_in_files) == (1, ("b",), ("z",))
    assert targets["b"].tensor.isnan().all()


@pytest.mark.parametrize("held", [("embed",), ("head",), ("embed", "head")])
def test_a_tied_tensor_may_be_filed_under_either_name(tmp_path, held) -> None:
    save_file({name: torch.ones(4, 2) for name in held}, tmp_path / "m.safetensors")
    targets = empty_like(cut({"embed": torch.ones(4, 2)}, Mesh(), 0))
    load(targets, open_complete(tmp_path), tied={"head": "embed"})
    assert torch.equal(targets["embed"].tensor, torch.ones(4, 2))


def test_optimizer_state_is_left_alone_when_weights_are_asked_for(tmp_path) -> None:
    save_file({"w": torch.ones(2), "adam_m.w": torch.ones(2)}, tmp_path / "m.safetensors")
    targets = empty_like(cut({"w": torch.ones(2)}, Mesh(), 0))
    assert load(targets, open_complete(tmp_path)).loaded == 1


def index(folder, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_is_followed_and_checked(tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"stray": torch.ones(3)}, tmp_path / "optimizer.safetensors")
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index(tmp_path, {"a": files[0], "b": files[1]})
    assert set(open_complete(tmp_path).tensors) == {"a", "b"}

    index(tmp_path, {"a": files[0], "b": "gone.safetensors"})
    with pytest.raises(UserError, match=r"names 1 file that cannot be found: gone\.safetensors"):
        open_complete(tmp_path)
    index(tmp_path, {"a": files[0], "c": files[1]})
    with pytest.raises(UserError, match="lacks `c`"):
        open_complete(tmp_path)
    index(tmp_path, ["a"])
    with pytest.raises(UserError, match="is not an index of weights"):
        open_complete(tmp_path)


def test_detection_reads_names_only(tmp_path) -> None:
    assert detect(tmp_path) == "nothing"
    assert detect(tmp_path / "absent") == "nothing"
    (tmp_path / "x.safetensors").write_bytes(b"not opened")
    assert detect(tmp_path) == "complete"
    assert detect(tmp_path / "x.safetensors") == "single"
    (tmp_path / "rank_0").mkdir()  # as of logs
    assert detect(tmp_path) == "complete"
    (tmp_path / "rank_0" / "y.safetensors").write_bytes(b"not opened")
    assert detect(tmp_path) == "distributed"
    assert detect_in_rank_folder(tmp_path) == "distributed"


def detect_in_rank_folder(folder) -> str:
    file = folder / "rank_0" / "x.safetensors"
    file.write_bytes(b"")
    return detect(file)


def test_rank_files_of_other_programs_and_mixed_runs_are_refused(tmp_path) -> None:
    files = save(tmp_path / "a", model(), Mesh(dp_shard=2))
    with pytest.raises(
        UserError, match=r"rank 1 has no valid file in .*, and no other rank holds its parts"
    ):
        open_rank_files(tmp_path, files[:1])
    others = save(tmp_path / "b", model(), Mesh(dp_replicate=2))
    with pytest.raises(UserError, match="mixes two saves"):
        open_rank_files(tmp_path, [files[0], others[1]])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(2)}, foreign)
    with pytest.raises(UserError, match="does not describe its layout"):
        open_rank_files(tmp_path, [foreign])


def test_a_save_may_have_more_files_than_a_process_opens_unasked(tmp_path) -> None:
    tensors = {"w": torch.randn(40, 2)}
    source = open_rank_files(tmp_path, save(tmp_path, tensors, Mesh(dp_shard=40)))
    targets = empty_like(cut(tensors, Mesh(), 0))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
    try:
        load(targets, source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert torch.equal(targets["w"].tensor, tensors["w"])


def test_a_merge_gives_back_every_byte_and_opens_by_index(tmp_path) -> None:
    tensors = {**model(), "adam_m.embed": torch.randn(13, 4)}
    source = open_rank_files(tmp_path, save(tmp_path / "ranks", tensors, Mesh(dp_shard=3)))
    out = tmp_path / "out"
    out.mkdir()
    seen: list[tuple[int, int]] = []
    exported = write_complete(source, out, max_shard_bytes=220, progress=lambda *a: seen.append(a))
    assert exported.files == (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer-00001-of-00001.safetensors",
    )
    assert seen[-1] == (exported.total_bytes, exported.total_bytes)
    merged = {}
    for file in exported.files:
        merged.update(load_file(out / file))
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "adam_m.embed" not in weight_map
    assert set(weight_map) == set(model())


def test_a_tied_tensor_that_files_hold_twice_must_be_one(tmp_path) -> None:
    embedding, head = torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 1
    tied = {"lm_head.weight": "embed.weight"}
    for name, second in (("same", embedding), ("other", head)):
        file = tmp_path / f"{name}.safetensors"
        save_file({"embed.weight": embedding, "lm_head.weight": second.clone()}, file)
        target = Shard((3, 2), full_box((3, 2)), torch.zeros(3, 2))
        if name == "same":
            load({"embed.weight": target}, open_complete(file), tied=tied)
            assert torch.equal(target.tensor, embedding)
            continue
        with pytest.raises(UserError, match=r"lm_head.weight. and .embed.weight. differ"):
            load({"embed.weight": target}, open_complete(file), tied=tied)
        load({"embed.weight": target}, open_complete(file), tied=tied, strict=False)
