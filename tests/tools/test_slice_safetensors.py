"""Complete weights become rank files: those a run of the same layout writes, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import launcher.weights
from launcher.builders.layout import model_layout, split_of
from launcher.config.derived import mesh_of
from launcher.config.resolve import resolve
from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.mindspore.strategy import strategy_file
from launcher.mindspore.tensor_layout import TensorLayout
from launcher.tools.slice_safetensors import main
from launcher.tools.unified_safetensors import main as merge
from launcher.weights.formats.safetensors import read_header
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.reading.tensor_bytes import TORCH_DTYPES
from launcher.weights.tensor_mapping import mapped
from models.build import build_model, mappings_of
from models.families import model_spec
from tests.mindspore.golden import ALL, needs_all
from tests.tools.checkpoints import content, same, save, tensors

DENSE = {
    "type": "Qwen3Config", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {
    **DENSE, "type": "Qwen3MoeConfig", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}  # fmt: skip
STACKS = {
    **DENSE, "type": "GptOssConfig", "num_local_experts": 4, "num_experts_per_tok": 2,
    "sliding_window": 8,
}  # fmt: skip
"""A family whose files hold the experts of a layer in one tensor."""
SCALARS = ("epoch_num", "step_num", "global_step", "loss_scale", "learning_rate")
LAYOUTS = {
    "dp2 tp2 pp3": {"parallel_config": {"data_parallel": 2, "model_parallel": 2,
                                        "pipeline_stage": 3, "micro_batch_num": 3},
                    "parallel": {"enable_parallel_optimizer": True}},
    "dp4 ep2": {"parallel_config": {"data_parallel": 4, "expert_parallel": 2},
                "parallel": {"enable_parallel_optimizer": True}},
    "tp2": {"parallel_config": {"model_parallel": 2, "vocab_emb_dp": False}},
}  # fmt: skip


def weights(model_config: dict[str, object]) -> dict[str, torch.Tensor]:
    """Random weights under the names of files, with the first moment of two of them."""
    model = build_model(model_spec(model_config, None), dtype=torch.bfloat16)
    mappings, named = mappings_of(model), dict[str, torch.Tensor]()
    for name, parameter in model.named_parameters():
        found = mappings(name, tuple(parameter.shape))
        shapes = {name: parameter.shape} if found is None else {k.name: k.shape for k in found}
        named |= {n: torch.randn(shape).bfloat16() for n, shape in shapes.items()}
    state = [name for name in named if "layers.1." in name and "proj" in name]
    return named | {f"adam_m.{name}": torch.randn(named[name].shape) for name in state}


def complete(folder: Path, model_config: dict[str, object]) -> dict[str, torch.Tensor]:
    """A Hugging Face directory of the model, with optimizer state beside the index."""
    folder.mkdir()
    named = weights(model_config)
    model = {n: t for n, t in named.items() if not n.startswith("adam_")}
    save_file(model, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    save_file({n: t for n, t in named.items() if n not in model},
              folder / "optimizer-00001-of-00001.safetensors")  # fmt: skip
    weight_map = dict.fromkeys(model, "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = model_spec(model_config, None).hf_config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    return named


def configuration(folder: Path, layout: str) -> str:
    """A YAML file whose data and tokenizer are on another machine."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({
        **LAYOUTS[layout], "output_dir": "output", "load_checkpoint": "/elsewhere",
        "train_dataset": {"data_loader": {"type": "TextDataLoader", "dataset_dir": "/elsewhere"},
                          "seq_length": 32},
        "runner_config": {"batch_size": 2},
    }))  # fmt: skip
    return str(path)


@pytest.mark.parametrize(
    ("model_config", "layout"),
    [
        (DENSE, "dp2 tp2 pp3"),
        (EXPERTS, "dp4 ep2"),
        (EXPERTS, "dp2 tp2 pp3"),
        (DENSE, "tp2"),
        (STACKS, "dp4 ep2"),
        (STACKS, "dp2 tp2 pp3"),
    ],
)
def test_a_configuration_is_sliced_as_its_run_saves(
    tmp_path: Path, model_config: dict[str, object], layout: str, capsys
) -> None:
    named = complete(tmp_path / "full", model_config)
    arguments = ["--unified_safetensors_dir", str(tmp_path / "full"), "--dst_safetensors_dir",
                 str(tmp_path / "sliced"), "--config", configuration(tmp_path, layout)]  # fmt: skip
    assert main(arguments) == 0
    assert "warning" not in capsys.readouterr().out
    source = open_any_format(tmp_path / "sliced")
    for rank in range(source.world_size):
        file = tmp_path / "sliced" / f"rank_{rank}" / f"net_rank_{rank}-1_1.safetensors"
        own, header = load_file(file), read_header(file)
        expected = held_in_training(model_config, layout, rank)
        assert {n for n in own if not n.startswith("adam_")} == set(expected)
        for name, box in expected.items():
            cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
            assert torch.equal(own[name], named[name][cut])
            assert TORCH_DTYPES[header.entries[name].dtype] == torch.bfloat16
            if f"adam_m.{name}" in named:
                assert torch.equal(own[f"adam_m.{name}"], named[f"adam_m.{name}"][cut])
    merged = str(tmp_path / "merged")
    ranks = str(tmp_path / "sliced")
    assert merge(["--mindspore_ckpt_dir", ranks, "--output_dir", merged]) == 0
    assert same(content(tmp_path / "merged"), named)
    assert (tmp_path / "merged" / "config.json").exists()
    assert (tmp_path / "merged" / "additional_chat_templates/rag.jinja").exists()


def held_in_training(model_config: dict[str, object], layout: str, rank: int) -> dict[str, Box]:
    """Name in files to the box that the training run of the layout writes on `rank`."""
    words = [f"{section}.{key}={value}" for section, keys in LAYOUTS[layout].items()
             for key, value in keys.items()]  # fmt: skip
    config = resolve(str(Path(__file__).parents[2] / "configs" / "quickstart.yaml"),
                     overrides=words).config  # fmt: skip
    spec = model_spec(model_config, None)
    model = build_model(spec, dtype=torch.bfloat16)
    placed = model_layout(
        model, spec, mesh_of(config), split=split_of(config, spec),
        vocab_emb_dp=config.parallel_config.vocab_emb_dp,
    ).of(rank)  # fmt: skip
    shards = {
        name: Shard(p.shape, p.boxes[0], torch.empty(p.boxes[0].size, device="meta"))
        for name, p in placed.items()
    }
    return {name: shard.box for name, shard in mapped(shards, mappings_of(model)).items()}


def test_rank_files_are_sliced_anew_from_a_strategy(tmp_path: Path, capsys) -> None:
    """Two stages of two ranks; what the strategy does not know is not lost."""
    save(tmp_path / "ranks", tensors(), Mesh(dp_shard=3))
    strategies = tmp_path / "strategy"
    strategies.mkdir()
    rows, columns = TensorLayout((2,), ((0, -1),)), TensorLayout((2,), ((-1, 0),))
    for stage, entries in enumerate(({"counts": columns}, {"proj": rows})):
        data = strategy_file(entries, stage)
        (strategies / f"ckpt_strategy_rank_{stage}.ckpt").write_bytes(data)
    target = tmp_path / "sliced"
    arguments = ["--unified_safetensors_dir", str(tmp_path / "ranks"), "--dst_safetensors_dir",
                 str(target), "--predict_strategy", str(strategies)]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "left out, the strategy has no optimizer state: 6 tensors" in said
    assert "warning: the layout does not know 3 of 5 tensors, such as" in said
    expected = tensors(optimizer=False)
    last = load_file(target / "rank_3" / "net_rank_3-1_1.safetensors")
    assert last.keys() == {"proj"}
    assert torch.equal(last["proj"], expected["proj"][3:])
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    merged = str(tmp_path / "out")
    assert merge(["--mindspore_ckpt_dir", str(target), "--output_dir", merged]) == 0
    assert same(content(tmp_path / "out"), expected)


def test_a_strategy_with_optimizer_state_keeps_it(tmp_path: Path) -> None:
    """Of one moment too: the other lies as its parameter does."""
    save(tmp_path / "ranks", tensors(), Mesh())
    rows = TensorLayout((2,), ((0, -1),))
    for prefixes in (("adam_m.", "adam_v."), ("adam_m.",)):
        strategy = tmp_path / "s.ckpt"
        strategy.write_bytes(strategy_file({"proj": rows}, 0, prefixes=prefixes))
        target = tmp_path / f"sliced_{len(prefixes)}"
        assert main(["--unified_safetensors_dir", str(tmp_path / "ranks"), "--predict_strategy",
                     str(strategy), "--dst_safetensors_dir", str(target)]) == 0  # fmt: skip
        last = load_file(target / "rank_1" / "net_rank_1-1_1.safetensors")
        assert last.keys() == {"proj", "adam_m.proj", "adam_v.proj"}
        assert torch.equal(last["adam_v.proj"], tensors()["adam_v.proj"][3:])


@needs_all
@pytest.mark.parametrize("target", ["dp2mp2pp2_opt", "dp2pp2", "dp8_opt", "mp2_predict"])
def test_slices_are_those_of_mindspore(target: str, tmp_path: Path) -> None:
    merged = tmp_path / "merged" / "dst_strategy.ckpt"
    launcher.weights.merge_pipeline_strategys(ALL / "strategies" / target, merged)
    launcher.weights.load_distributed_checkpoint(
        network=None, predict_strategy=str(merged), format="safetensors", max_process_num=64,
        unified_safetensors_dir=str(ALL / "dist" / "unified" / "dp2mp2pp2"),
        dst_safetensors_dir=str(tmp_path / "out"),
    )  # fmt: skip
    theirs = sorted((ALL / "dist" / "resliced" / target).glob("rank_*/*.safetensors"))
    known = {*open_any_format(ALL / "dist" / "unified" / "dp2mp2pp2").tensors, *SCALARS}
    assert theirs
    for file in theirs:
        (ours,) = (tmp_path / "out" / file.parent.name).glob("*.safetensors")
        found = load_file(ours)
        expected = {
            name: tensor for name, tensor in load_file(file).items()
            if not name.startswith("accu_grads") and name in known
        }  # fmt: skip
        assert expected.keys() > {*SCALARS}
        assert same(found, expected)


def wrong_cases(folder: Path) -> dict[str, list[str]]:
    """What is said, to the arguments that it answers."""
    save_file({"w": torch.ones(6, 3)}, folder / "w.safetensors")
    save_file({"w.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
               "w.weight_scale_inv": torch.ones(1, 1)}, folder / "f8.safetensors")  # fmt: skip
    rows = TensorLayout((4,), ((0, -1),))
    for name in ("w", "other", "w.weight"):
        (folder / f"{name}.ckpt").write_bytes(strategy_file({name: rows}, 0))
    (folder / "bad.yaml").write_text("parallel_config: {model_parallel: two}\n")
    at = str(folder)
    return {
        "`w` of shape [6, 3] does not fit the strategy: dim 0 of length 6":
            [f"{at}/w.safetensors", "--predict_strategy", f"{at}/w.ckpt"],
        "the layout knows no tensor of": [f"{at}/w.safetensors", "--predict_strategy",
                                          f"{at}/other.ckpt"],
        "holds FP8 weights, such as `w.weight`":
            [f"{at}/f8.safetensors", "--predict_strategy", f"{at}/w.weight.ckpt"],
        "parallel_config.model_parallel": [f"{at}/w.safetensors", "--config", f"{at}/bad.yaml"],
        "there is no such path": [f"{at}/nowhere", "--config", f"{at}/bad.yaml"],
        "one of the arguments --predict_strategy --config is required": [f"{at}/w.safetensors"],
    }  # fmt: skip


def test_mistakes_have_a_way_out_and_leave_nothing(tmp_path: Path, capsys) -> None:
    for said, (source, *more) in wrong_cases(tmp_path).items():
        before = sorted(path.name for path in tmp_path.iterdir())
        assert main(["--unified_safetensors_dir", source, "--dst_safetensors_dir",
                     str(tmp_path / "out"), *more]) == 2  # fmt: skip
        assert said in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"network": object()}, "cannot load a network"),
        ({"format": "ckpt"}, "format = 'ckpt': it writes rank files of safetensors"),
        ({"predict_strategy": {"w": []}}, r"predict_strategy = \{'w': \[\]\}: a path is needed"),
        ({}, "predict_strategy = None"),
    ],
)
def test_what_the_python_call_does_not_do(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        launcher.weights.load_distributed_checkpoint(**arguments)
