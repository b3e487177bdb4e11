"""gate_up_proj: one tensor in complete weights, two in the model and its rank files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.joined import apart, together
from launcher.weights.offline.compare import compare
from launcher.weights.offline.export import write_complete
from launcher.weights.offline.merge import merge
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.ranks.saves import MODEL_FOLDER
from launcher.weights.reading.load import load
from launcher.weights.source import Source, open_complete

GLM = {"model_type": "glm"}
LAYER = "model.layers.0.mlp"
ROWS, WIDTH = 6, 5
GATE = torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH)
UP = GATE + 100
NAMES = (f"{LAYER}.gate_proj.weight", f"{LAYER}.up_proj.weight")
FUSED = f"{LAYER}.gate_up_proj.weight"
OTHER = torch.ones(3)


def complete(folder: Path, tensors: dict[str, torch.Tensor]) -> Source:
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_complete(folder)


def filled(source: Source, name: str, box: Box | None = None) -> torch.Tensor:
    shape = source.shape(name)
    box = box or full_box(shape)
    tensor = torch.full(box.size, -1.0)
    load({name: Shard(shape, box, tensor)}, source, strict=False)
    return tensor


@pytest.mark.parametrize("prefix", ["", "adam_m."])
def test_complete_weights_come_apart(prefix: str, tmp_path: Path) -> None:
    fused = torch.cat((GATE, UP))
    found = apart(complete(tmp_path, {prefix + FUSED: fused, "model.norm.weight": OTHER}), GLM)
    assert sorted(found.tensors) == sorted(
        [*(prefix + name for name in NAMES), "model.norm.weight"]
    )
    assert torch.equal(filled(found, prefix + NAMES[0]), GATE)
    assert torch.equal(filled(found, prefix + NAMES[1]), UP)
    part = Box((2, 1), (3, 2))  # of a tensor-parallel rank
    assert torch.equal(filled(found, prefix + NAMES[1], part), UP[2:5, 1:3])
    assert torch.equal(filled(found, "model.norm.weight"), OTHER)


def test_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    found = apart(complete(tmp_path, {"layers.3.mlp.gate_up_proj.weight": GATE}), GLM)
    assert {*found.tensors} == {f"layers.3.mlp.{side}_proj.weight" for side in ("gate", "up")}


@pytest.mark.parametrize("config", [None, {"model_type": "phi3"}, {"model_type": ["glm"]}])
def test_other_models_are_left_alone(config: dict[str, object] | None, tmp_path: Path) -> None:
    source = complete(tmp_path, {FUSED: GATE, **dict.fromkeys(NAMES, OTHER)})
    assert apart(source, config) is source
    assert together(source, config) is source


def test_modules_with_longer_names_are_others(tmp_path: Path) -> None:
    names = ("model.layers.0.other_mlp.gate_up_proj.weight", "x.mlp.gate_up_proj.lora.weight",
             "model.layers.0.mlp.shared_experts.gate_up_proj.weight")  # fmt: skip
    source = complete(tmp_path, {name: torch.ones(2, 2) for name in names})
    assert apart(source, GLM) is source


@pytest.mark.parametrize("prefix", ["", "adam_v."])
def test_rank_files_of_earlier_versions_come_apart(prefix: str, tmp_path: Path) -> None:
    """Sharded data parallelism cut rows of the fused tensor, here inside of gate and of up."""
    fused = torch.cat((GATE, UP))
    source = saved(tmp_path, {prefix + FUSED: [(start, fused[start : start + 4])
                                               for start in (0, 4, 8)]}, ranks=3)  # fmt: skip
    found = apart(source, GLM)
    assert torch.equal(filled(found, prefix + NAMES[0]), GATE)
    assert torch.equal(filled(found, prefix + NAMES[1], Box((1, 0), (4, 5))), UP[1:5])


def saved(folder: Path, parts: dict[str, list[tuple[int, torch.Tensor]]], *, ranks: int) -> Source:
    """A save whose rank r has part r of each tensor: (its first row, its rows)."""
    files = []
    for rank in range(ranks):
        held = {}
        for name, cuts in parts.items():
            shape = (sum(len(rows) for _, rows in cuts), *cuts[0][1].shape[1:])
            first, rows = cuts[rank]
            box = Box((first, *(0 for _ in shape[1:])), tuple(rows.shape))
            held[name] = Shard(shape, box, rows.clone())
        file = folder / f"rank_{rank}" / f"m_rank_{rank}-1_1.safetensors"
        file.parent.mkdir(parents=True)
        write_rank_file(file, held, mesh=Mesh(tp=ranks), rank=rank)
        files.append(file)
    return open_rank_files(folder, files)


def tensor_parallel(folder: Path) -> Source:
    """Rank files of two tensor-parallel ranks, and the config.json of their run."""
    cuts = {prefix + name: [(0, whole[:3]), (3, whole[3:])]
            for name, whole in zip(NAMES, (GATE, UP), strict=True)
            for prefix in ("", "adam_m.")}  # fmt: skip
    source = saved(folder, cuts, ranks=2)
    (folder / MODEL_FOLDER / "m").mkdir(parents=True)
    (folder / MODEL_FOLDER / "m" / "config.json").write_text(json.dumps(GLM))
    return source


def test_a_merge_writes_them_together(tmp_path: Path) -> None:
    tensor_parallel(tmp_path / "ranks")
    merge(tmp_path / "ranks", tmp_path / "merged", suffix="1_1")
    held = {}
    for file in sorted((tmp_path / "merged").glob("*.safetensors")):
        held |= load_file(file)
    assert sorted(held) == [f"adam_m.{FUSED}", FUSED]
    for tensor in held.values():
        assert torch.equal(tensor, torch.cat((GATE, UP)))


def test_both_forms_are_equal(tmp_path: Path) -> None:
    source = complete(tmp_path / "one", {FUSED: torch.cat((GATE, UP))})
    changed = complete(tmp_path / "other", {NAMES[0]: GATE, NAMES[1]: UP + 1})
    (tmp_path / "same").mkdir()
    write_complete(apart(source, GLM), tmp_path / "same")
    assert compare(open_complete(tmp_path / "same"), source).is_equal
    assert [row.name for row in compare(source, changed).rows] == [FUSED]
    llama = complete(tmp_path / "llama", {NAMES[0]: GATE, NAMES[1]: UP})
    assert [row.name for row in compare(llama, changed).rows] == [NAMES[1]]


def test_scales_follow_their_weights(tmp_path: Path) -> None:
    weight = torch.randn(8, 4).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    source = replace(
        complete(tmp_path, {FUSED: weight, f"{FUSED}_scale_inv": scales}), scale_block=(2, 4)
    )
    expected = weight[4:].float() * scales[2:].repeat_interleave(2, 0)
    assert torch.equal(filled(apart(source, GLM), NAMES[1]), expected)
    with pytest.raises(UserError, match="divided between blocks"):
        apart(replace(source, scale_block=(3, 4)), GLM)


def test_what_cannot_be_divided_or_joined(tmp_path: Path) -> None:
    odd = complete(tmp_path / "odd", {FUSED: torch.ones(7, 2)})
    with pytest.raises(UserError, match="its rows are those of 2 projections"):
        apart(odd, GLM)
    both = complete(tmp_path / "both", {FUSED: GATE, NAMES[0]: GATE})
    with pytest.raises(UserError, match="is stored twice"):
        apart(both, GLM)
    mixed = complete(tmp_path / "mixed", {NAMES[0]: GATE, NAMES[1]: UP.bfloat16()})
    with pytest.raises(UserError, match="they become one tensor"):
        together(mixed, GLM)
    alone = complete(tmp_path / "alone", {NAMES[0]: GATE})
    assert together(alone, GLM) is alone
