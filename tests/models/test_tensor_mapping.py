"""The mapping of a transformers module's tensors to files: in both directions, bitwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from launcher.builders.layout import model_layout
from launcher.errors import UserError
from launcher.layout.box import Box, full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.parallel.apply import shards
from launcher.parallel.model_parts import ModelParts
from launcher.weights.joined import apart
from launcher.weights.offline.export import write_complete
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.load import load
from launcher.weights.source import open_complete
from launcher.weights.tensor_mapping import TensorMapping, mapped, shapes_in_files
from models.build import build_model, ignorable, mappings_of, named_as_model, tied_names
from models.config_class import config_class
from models.keys import EXPERT_COUNTS
from models.module_names import mappings_of_module
from models.module_table import TRANSFORMERS_MODULES
from models.names import of_base_model
from models.spec import ModelSpec
from tests.models.tiny import dense_spec, module_spec, oracle, tokens

WITH_EXPERTS = [
    family for family in TRANSFORMERS_MODULES
    if (known := config_class(family)) and any(known.has(key) for key in EXPERT_COUNTS)
]  # fmt: skip
A_FEW = ["qwen2_moe", "granitemoe", "glm4_moe_lite"]


def loaded(spec: ModelSpec, folder: Path, *, strict: bool = True) -> nn.Module:
    """The model of `spec`, filled from `folder` as a job does it."""
    model = build_model(spec, dtype=torch.float32, device="cpu").eval()
    layout = model_layout(model, spec, Mesh(), split=None, vocab_emb_dp=False)
    held = mapped(shards(ModelParts([model]).named_tensors(), layout, 0), mappings_of(model))
    expected = shapes_in_files(layout.shapes, mappings_of(model))
    source = named_as_model(apart(open_complete(folder), spec.hf_config), model, expected)
    leave = ignorable(model, spec, expected)
    load(
        held,
        source,
        tied=tied_names(model),
        strict=strict,
        expected=expected,
        leave=lambda name: leave(name, source.shape(name), source.dtype(name)),
    )
    return model


def rank_files(model: nn.Module, spec: ModelSpec, folder: Path, mesh: Mesh) -> list[Path]:
    """The files of every rank with its shard of `model` on `mesh`."""
    layout = model_layout(model, spec, mesh, split=None, vocab_emb_dp=False)
    tensors, files = ModelParts([model]).named_tensors(), []
    for rank in range(mesh.world_size):
        placed = layout.of(rank)
        held = {}
        for name, tensor in tensors.items():
            box = placed[name].boxes[0]
            cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
            held[name] = Shard(tuple(tensor.shape), box, tensor.detach()[cut])
        files.append(folder / f"rank_{rank}" / f"m_rank_{rank}-1_1.safetensors")
        files[-1].parent.mkdir(parents=True)
        write_rank_file(files[-1], mapped(held, mappings_of(model)), mesh=mesh, rank=rank)
    return files


def check(family: str, folder: Path) -> None:
    """Loading equals from_pretrained; what is saved equals what save_pretrained saves."""
    spec = module_spec(family)
    oracle(spec).save_pretrained(folder / "saved")
    model = loaded(spec, folder / "saved")
    module = AutoModelForCausalLM.from_pretrained(folder / "saved").eval()
    state = module.state_dict()
    assert set(model.state_dict()) == set(state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    input_ids = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids), module(input_ids).logits)
    (folder / "merged").mkdir()
    source = open_rank_files(folder, rank_files(model, spec, folder, Mesh(dp_shard=3)))
    write_complete(source, folder / "merged")
    merged = load_file(folder / "merged" / "model-00001-of-00001.safetensors")
    files = load_file(folder / "saved" / "model.safetensors")
    assert set(merged) == set(files)
    assert all(torch.equal(merged[name], tensor) for name, tensor in files.items())


@pytest.mark.parametrize("family", A_FEW)
def test_experts_are_stacked_and_unstacked(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in WITH_EXPERTS if f not in A_FEW])
def test_the_other_families_with_experts(family: str, tmp_path: Path) -> None:
    check(family, tmp_path)


def test_an_expert_of_a_fused_projection_is_a_box() -> None:
    model = build_model(module_spec("qwen2_moe"), dtype=torch.float32)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    mappings = mappings_of(model)(name, (4, 48, 32))
    assert mappings is not None
    assert mappings[2] == TensorMapping(
        "model.layers.1.mlp.experts.2.gate_proj.weight", Box((2, 0, 0), (1, 24, 32)), (0,)
    )
    assert mappings[6] == TensorMapping(
        "model.layers.1.mlp.experts.2.up_proj.weight", Box((2, 24, 0), (1, 24, 32)), (0,)
    )
    assert mappings_of(model)("model.norm.weight", (32,)) is None


def converter(
    files: str | list[str], module: str | list[str], *operations: ConversionOps
) -> WeightConverter:
    return WeightConverter(files, module, operations=list(operations))


BOXES = {
    "renamed": (WeightRenaming("old", "proj"), {"old.weight": Box((0, 0), (6, 4))}),
    "fused": (
        converter(["up.weight", "gate.weight"], "proj.weight", Concatenate(dim=0)),
        {"up.weight": Box((0, 0), (3, 4)), "gate.weight": Box((3, 0), (3, 4))},
    ),
    "fused in columns": (
        converter(["up.weight", "gate.weight"], "proj.weight", Concatenate(dim=1)),
        {"up.weight": Box((0, 0), (6, 2)), "gate.weight": Box((0, 2), (6, 2))},
    ),
    "stacked in columns": (
        converter("part.*.weight", "proj.weight", MergeModulelist(dim=1)),
        {f"part.{n}.weight": Box((0, n), (6, 1)) for n in range(4)},
    ),
}

NO_BOXES = {
    "turned": converter("old.weight", "proj.weight", Transpose(0, 1)),
    "interleaved": converter("old.weight", "proj.weight", Interleave(dim=0)),
    "one tensor for two": converter("both.weight", ["proj.weight", "other.weight"], Chunk(dim=0)),
}


def module_with(conversion: WeightRenaming | WeightConverter) -> nn.Module:
    """A module whose file names differ by `conversion`."""
    module = nn.Module()
    module.proj, module.other = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    module.config = type("Config", (), {"model_type": "made_up"})()
    module._weight_conversions = [conversion]
    return module


@pytest.mark.parametrize("name", BOXES)
def test_conversions_that_slice_are_supported(name: str) -> None:
    conversion, boxes = BOXES[name]
    mappings = mappings_of_module(module_with(conversion))
    assert set(mappings) == {"proj.weight"}
    assert {mapping.name: mapping.box for mapping in mappings["proj.weight"]} == boxes
    assert all(
        len(mapping.shape) == 2 - len(mapping.dropped) for mapping in mappings["proj.weight"]
    )


@pytest.mark.parametrize("name", NO_BOXES)
def test_conversions_that_do_not_slice_are_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        mappings_of_module(module_with(NO_BOXES[name]))
    assert "model_type made_up: its files and its module have different tensors (`" in str(
        caught.value
    )
    assert "must be a slice of one tensor of the module" in str(caught.value)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_directory_of_the_base_model_has_names_without_it(family: str, tmp_path: Path) -> None:
    if family == "qwen3":
        spec = dense_spec(type="Qwen3Config", head_dim=16, tie_word_embeddings=True)
    else:
        spec = module_spec(family)
    module = oracle(spec).eval()
    module.base_model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith((f"{module.base_model_prefix}.", "lm_head")) for name in files)
    input_ids = tokens(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(spec, tmp_path)(input_ids), module(input_ids).logits, atol=1e-5, rtol=1e-5
        )


def test_names_without_the_base_model_are_used_only_if_nothing_else_fits() -> None:
    expected = ["model.a", "model.b", "head"]
    assert of_base_model(["a", "b"], expected, "model") == {"a": "model.a", "b": "model.b"}
    assert of_base_model(["a", "head", "x"], expected, "model") == {"a": "model.a", "x": "model.x"}
    assert of_base_model(["a", "model.b"], expected, "model") == {}
    assert of_base_model(["c", "d"], expected, "model") == {}
    assert of_base_model(["a", "b"], expected, "") == {}


def test_multi_token_prediction_modules_are_ignored(tmp_path: Path) -> None:
    spec = module_spec("glm4_moe_lite", num_hidden_layers=2)
    spec.hf_config["num_nextn_predict_layers"] = 1
    model = build_model(spec, dtype=torch.float32)
    leave = ignorable(model, spec, ["model.layers.0.mlp.gate.weight"])
    assert leave("model.layers.2.eh_proj.weight", (4, 8), "F32")
    assert leave("model.layers.2.mlp.gate.weight", (4, 8), "F32")
    assert not leave("model.layers.1.mlp.gate.weight", (4, 8), "F32")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_names_are_those_of_files(tied: bool) -> None:
    model = build_model(module_spec("gpt_neox", tie_word_embeddings=tied), dtype=torch.float32)
    expected = {"embed_out.weight": "gpt_neox.embed_in.weight"} if tied else {}
    assert tied_names(model) == expected


def test_a_balance_loss_that_would_be_ignored_is_refused() -> None:
    spec = module_spec("qwen2_moe", output_router_logits=True)
    with pytest.raises(UserError) as caught:
        build_model(spec, dtype=torch.float32)
    assert str(caught.value) == (
        "output_router_logits = True with the model type qwen2_moe: the balance loss of experts "
        "is supported for families with a native decoder only. "
        "Set model.model_config.output_router_logits: False."
    )


def test_a_shard_without_part_of_an_expert_has_no_mapping_of_it() -> None:
    model = build_model(module_spec("qwen2_moe"), dtype=torch.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shard = Shard((4, 48, 32), Box((1, 0, 0), (1, 48, 32)), torch.zeros(1, 48, 32))
    parts = mapped({name: shard}, mappings_of(model))
    assert list(parts) == [
        "model.layers.0.mlp.experts.1.gate_proj.weight",
        "model.layers.0.mlp.experts.1.up_proj.weight",
    ]
    assert all(part.box == full_box((24, 32)) == full_box(part.shape) for part in parts.values())
