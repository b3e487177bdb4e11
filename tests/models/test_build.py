"""Building, tying, initialization; and transformers modules behind the decoder's interface."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.shard import Shard
from launcher.weights.tensor_mapping import mapped, shapes_in_files
from models.build import (
    blocks,
    build_model,
    hf_directory_files,
    initialize,
    initialize_shard,
    mappings_of,
    materialize,
    no_weight_decay,
    parameter_count,
    retie,
    tied_names,
)
from models.families import TRANSFORMERS_MODULES, model_spec, needs_weights, supports_packing
from models.transformers_model import TransformersModel
from tests.models.tiny import dense_spec, module_spec, oracle, tokens

OURS = dense_spec(type="Qwen3Config", head_dim=16)
A_FEW = ["gpt_neox", "gpt2", "opt", "gemma2", "phi", "starcoder2", "bloom", "qwen2_moe"]


def reference(model: TransformersModel) -> torch.nn.Module:
    """The same module as initialized by transformers."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = model.wrapped.config
    return AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "starcoder2", "qwen2_moe"])
def test_names_and_values_of_a_saved_directory(family: str, tied: bool, tmp_path: Path) -> None:
    """A directory of save_pretrained has the decoder's names; loaded by them, logits are equal."""
    from safetensors.torch import load_file

    spec = module_spec(family, tie_word_embeddings=tied)
    module = oracle(spec).eval()
    module.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")

    config_json = json.loads((tmp_path / "config.json").read_text())
    spec = model_spec({}, config_json)
    model = build_model(spec, dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert set(shapes_in_files(shapes, mappings_of(model))) == set(files)
    assert bool(tied_names(model)) == tied

    materialize(model, "cpu")
    held = {
        name: Shard(shapes[name], full_box(shapes[name]), p.detach())
        for name, p in model.named_parameters()
    }
    for name, shard in mapped(held, mappings_of(model)).items():
        shard.tensor.copy_(files[name])
    for target, source in model.tied_names().items():
        assert model.get_parameter(target) is model.get_parameter(source)
    input_ids = tokens(2, 24)
    assert torch.equal(model.eval()(input_ids), module(input_ids).logits)
    last = model(input_ids, last_only=True)
    assert torch.equal(last, module(input_ids).logits[:, -1:])


@pytest.mark.parametrize("family", A_FEW)
def test_module_families(family: str) -> None:
    check_family(family)


@pytest.mark.long
@pytest.mark.parametrize("family", [f for f in TRANSFORMERS_MODULES if f not in A_FEW])
def test_the_other_module_families(family: str) -> None:
    check_family(family)


def check_family(family: str) -> None:
    """Initialized as by transformers, with equal buffers; packed documents separate or refused."""
    spec = module_spec(family)
    model = build_model(spec, dtype=torch.float32, device="cpu")
    assert isinstance(model, TransformersModel)
    initialize(model, spec, seed=0)
    module = reference(model)
    expected = dict(module.named_parameters())
    otherwise = [
        name for name, parameter in model.named_parameters()
        if not is_initialized_as(parameter, expected[name])
    ]  # fmt: skip
    assert bool(otherwise) == needs_weights(spec), otherwise
    model.load_state_dict(module.state_dict(), strict=False)
    buffers = dict(module.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert len(blocks(model)) in (1, 2, 4)

    input_ids = tokens(2, 24)
    document_ids = torch.repeat_interleave(torch.tensor([9, 1, 14])).repeat(2, 1)
    model.eval()
    if not supports_packing(spec):
        with pytest.raises(UserError, match="Set train_dataset"):
            model(input_ids, document_ids=document_ids)
        return
    packed = model(input_ids, document_ids=document_ids)
    alone = torch.cat([model(piece) for piece in input_ids.split([9, 1, 14], dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)


def is_initialized_as(parameter: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether initial values have the distribution of those of transformers."""
    if parameter.ndim == 1 or not expected.any():
        return torch.equal(parameter, expected)
    spread = 0.25 if parameter.numel() > 100 else 0.6
    return parameter.std().item() == pytest.approx(expected.std().item(), rel=spread)


REFUSED = {
    "unknown key": (
        {"type": "GPTNeoXConfig", "hidden_siz": 8},
        "model.model_config.hidden_siz: GPTNeoXConfig has no such key. did you mean `hidden_size`?",
    ),
    "impossible": (
        {"type": "GPTNeoXConfig", "hidden_size": 30, "num_heads": 4},
        "transformers cannot build a gpt_neox model from this model_config",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model_config, text = REFUSED[name]
    with pytest.raises(UserError) as raised:
        build_model(model_spec(model_config, None), dtype=torch.float32)
    assert text in str(raised.value)


UNKNOWN = {
    "no such type": ({"model_type": "qwn4"}, "transformers has no such model type"),
    "fused on disk": (
        {"model_type": "sarvam_moe"},
        "tensors in files that differ from those of the module",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_refusals_of_config_json(name: str) -> None:
    config_json, text = UNKNOWN[name]
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "intermediate_size": 32}
    with pytest.raises(UserError, match=text):
        build_model(model_spec({}, config_json | small), dtype=torch.float32)


def test_shards_equal_slices_of_the_full_parameter() -> None:
    shape, name = (700, 12), "model.layers.0.mlp.up_proj.weight"
    whole = initialize_shard(name, shape, (0, 0), shape, OURS, seed=7)
    boxes = [((0, 0), (256, 12)), ((256, 0), (444, 12)), ((100, 3), (333, 5)), ((699, 11), (1, 1)),
             ((0, 0), (700, 0)), ((300, 0), (0, 12))]  # fmt: skip
    for offset, size in boxes:
        shard = initialize_shard(name, shape, offset, size, OURS, seed=7)
        rows, columns = (slice(o, o + n) for o, n in zip(offset, size, strict=True))
        assert torch.equal(shard, whole[rows, columns])
    assert whole.std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(whole[:256], whole[256:512])
    assert not torch.equal(whole, initialize_shard(name, shape, (0, 0), shape, OURS, seed=8))
    other = initialize_shard(name + "x", shape, (0, 0), shape, OURS, seed=7)
    assert not torch.equal(whole, other)


def test_initial_values_do_not_change() -> None:
    """Recorded values: a later version must give the same model for the same seed."""
    values = initialize_shard("lm_head.weight", (300, 8), (256, 0), (2, 2), OURS, seed=1)
    assert values.flatten().tolist() == pytest.approx(KNOWN_VALUES, abs=1e-7)


KNOWN_VALUES = [
    0.002321397652849555,
    -0.007892363704741001,
    -0.012260416522622108,
    -0.03328100964426994,
]


def test_biases_zero_norms_one() -> None:
    def first(name: str, *shape: int) -> float:
        return float(initialize_shard(name, shape, [0] * len(shape), shape, OURS, 1).flatten()[0])

    assert first("model.layers.0.self_attn.q_proj.bias", 8) == 0
    assert first("model.norm.weight", 8) == 1
    assert first("model.embed_tokens.weight", 8, 8) not in (0, 1)


def test_no_weight_decay() -> None:
    model = build_model(dense_spec(type="Qwen2Config"), dtype=torch.float32)
    exempt = {name for name, p in model.named_parameters() if no_weight_decay(name, p.ndim)}
    decayed = {name for name, _ in model.named_parameters()} - exempt
    assert all("norm" in name or name.endswith("bias") for name in exempt)
    assert all(name.endswith(("proj.weight", "tokens.weight", "head.weight")) for name in decayed)


def test_counts_blocks_and_ties_of_the_decoder() -> None:
    untied = build_model(OURS, dtype=torch.bfloat16)
    assert {p.dtype for p in untied.parameters()} == {torch.bfloat16}
    assert len(blocks(untied)) == 3
    assert tied_names(untied) == {}
    tied = build_model(dense_spec(type="Qwen3Config", head_dim=16, tie_word_embeddings=True),
                       dtype=torch.float32)  # fmt: skip
    assert tied_names(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert parameter_count(untied) - parameter_count(tied) == 96 * 64


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["decoder", "module"])
def test_sharded_on_meta_then_filled(kind: str, tied: bool, tmp_path: Path) -> None:
    """FSDP over one rank, on meta: materialized, retied and filled, it equals the plain model."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    spec = module_spec("gpt_neox", tie_word_embeddings=tied)
    if kind == "decoder":
        spec = dense_spec(type="Qwen3Config", head_dim=16, tie_word_embeddings=tied)
    plain = build_model(spec, dtype=torch.float32, device="cpu")
    initialize(plain, spec, seed=5)
    input_ids = tokens(2, 16)
    plain(input_ids).pow(2).sum().backward()

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = build_model(spec, dtype=torch.float32)
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        materialize(model, "cpu")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shape = tuple(parameter.shape)
                ((file_name, _),) = shapes_in_files({name: shape}, mappings_of(model)).items()
                values = initialize_shard(file_name, shape, [0] * len(shape), shape, spec, 5)
                parameter.to_local().copy_(values)
        model(input_ids).pow(2).sum().backward()
        retie(model)
        expected = dict(plain.named_parameters())
        assert [name for name, _ in model.named_parameters()] == list(expected)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), expected[name].grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_an_exported_directory_opens_in_transformers(name: str, tied: bool, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    given = {"qwen3": {"type": "Qwen3Config", "head_dim": 24}, "llama": {
        "type": "LlamaConfig", "max_position_embeddings": 64,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    }}[name]  # fmt: skip
    spec = dense_spec(tie_word_embeddings=tied, **given)
    model = build_model(spec, dtype=torch.float32, device="cpu")
    initialize(model, spec, seed=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    for file_name, content in hf_directory_files(spec, None, dtype=torch.float32).items():
        (tmp_path / file_name).write_bytes(content)
    module, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    input_ids = tokens(2, 32)
    assert torch.equal(model.eval()(input_ids), module.eval()(input_ids).logits)
    again = model_spec({}, json.loads((tmp_path / "config.json").read_text()))
    assert again.decoder == spec.decoder


def test_files_next_to_the_weights(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("not copied")
    (tmp_path / "sentencepiece.bpe.model").write_text("")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    files = hf_directory_files(OURS, tmp_path, dtype=torch.bfloat16)
    assert set(files) == {"config.json", "tokenizer.json", "sentencepiece.bpe.model",
                          "additional_chat_templates/rag.jinja"}  # fmt: skip
    config = json.loads(files["config.json"])
    assert (config["dtype"], config["model_type"]) == ("bfloat16", "qwen3")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    module_config = json.loads(hf_directory_files(module_spec("phi"), None)["config.json"])
    assert module_config["architectures"] == ["PhiForCausalLM"]
    assert module_config["num_hidden_layers"] == 2
    with pytest.raises(UserError, match="is not a directory"):
        hf_directory_files(OURS, tmp_path / "absent")
