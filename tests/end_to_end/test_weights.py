"""The samples of MindFormers' page about weights, as written but for paths and sizes.

One story: a Hugging Face directory is fine-tuned on four ranks, and what that run saved is loaded,
resharded, merged, sliced, converted, resumed, and predicted with. Every way of loading the same
weights gives the same loss, or the same text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from launcher.weights import (
    ckpt_to_safetensors,
    load_distributed_checkpoint,
    merge_pipeline_strategys,
)
from tests.end_to_end.page import Shop
from tests.ranks import run_job
from tests.workshop import BASE, VOCABULARY, Workshop, merged

TEXT = {"type": "TextDataLoader", "dataset_dir": "corpus", "num_samples": 1}
FINETUNE = """
# Modified configuration
load_checkpoint: 'hf_unified_safetensors'           # Load weights file path
load_ckpt_format: 'safetensors'                     # Load weights file format
auto_trans_ckpt: True                               # turns on the online slicing feature
save_converted_checkpoint: True
parallel_config:                                    # Configure the target distributed strategy
  data_parallel: 2
  model_parallel: 2
  pipeline_stage: 1
callbacks:
  - type: CheckpointMonitor
    checkpoint_format: safetensors                  # Save weights file format
    save_checkpoint_steps: 2
"""


@pytest.fixture(scope="module")
def shop(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Materials, a Hugging Face directory, and the run `tuned` that was fine-tuned from it."""
    workshop = materials.copy_to(tmp_path_factory.mktemp("weights"))
    hugging_face = workshop.folder / "hf_unified_safetensors"
    sizes = {k: v for k, v in BASE["model"]["model_config"].items() if k != "type"}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes))
    model.save_pretrained(hugging_face, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(workshop.folder / "tokenizer").save_pretrained(hugging_face)
    base = merged(BASE, {
        "runner_config": {"batch_size": 2, "max_steps": 2},
        "train_dataset": {"data_loader": TEXT},
        "eval_dataset": {"data_loader": TEXT, "seq_length": 32, "packing": True},
        "output_dir": None, "callbacks": [],
    })  # fmt: skip
    (workshop.folder / "base.yaml").write_text(yaml.safe_dump(base))
    shop = Shop(workshop)
    shop.run(FINETUNE, "finetune", 4, "tuned")
    return shop


SINGLE_CARD = """
load_checkpoint: '{path}'                           # Load full weights file path
load_ckpt_format: 'safetensors'                     # Load weight file format
auto_trans_ckpt: False                              # Full weights + single card loading
use_parallel: False                                 # single card loading
parallel_config:                                    # Configure the target distributed strategy
  data_parallel: 1
  model_parallel: 1
  pipeline_stage: 1
"""
MULTI_CARD = """
load_checkpoint: '{path}'                           # Load full weights file path
load_ckpt_format: 'safetensors'                     # Load weight file format
auto_trans_ckpt: True                               # turn on online slicing
use_parallel: True                                  # Multi-cards loading
parallel_config:                                    # Configure the target distributed strategy
  data_parallel: 1
  model_parallel: 4
  pipeline_stage: 1
"""
ORIGINAL_SLICING = """
load_checkpoint: 'tuned/checkpoint'                 # Load source distributed weights file paths
load_ckpt_format: 'safetensors'                     # Load weight file format
auto_trans_ckpt: False                              # Disable the online slicing function
parallel_config:                                    # Configure the target distributed strategy
  data_parallel: 2
  model_parallel: 2
  pipeline_stage: 1
"""
CHANGED_SLICING = """
load_checkpoint: 'tuned/checkpoint'                 # Load source distributed weights file paths
src_strategy_path_or_dir: 'tuned/strategy'          # Load source strategy file
load_ckpt_format: 'safetensors'                     # Load weight file format
auto_trans_ckpt: True                               # Able the online slicing function
parallel_config:                                    # Configure the target distributed strategy
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 1
"""
TO_ONE = "load_checkpoint: 'tuned/checkpoint'\nsave_unified_checkpoint: True\n"


@pytest.fixture(scope="module")
def untouched(shop: Shop) -> float:
    """The loss of the Hugging Face directory, on a single card."""
    return shop.loss(SINGLE_CARD.format(path="hf_unified_safetensors"), 1, "single")


@pytest.fixture(scope="module")
def tuned(shop: Shop) -> float:
    """The loss of what the fine-tuned run saved, put together by one process, which also writes it
    whole."""
    return shop.loss(TO_ONE, 1, "put_together")


def test_complete_weights_on_several_cards(shop: Shop, untouched: float) -> None:
    sample = MULTI_CARD.format(path="hf_unified_safetensors")
    assert shop.loss(sample, 4, "several") == pytest.approx(untouched, rel=1e-5)


def test_the_converted_copy_loads_as_the_original(shop: Shop, untouched: float) -> None:
    copy = shop.folder / "tuned/ms_safetensors"
    names = json.loads((copy / "param_name_map.json").read_text())["weight_map"]
    assert set(names) == set(load_all(shop.folder / "hf_unified_safetensors"))
    sample = SINGLE_CARD.format(path="tuned/ms_safetensors")
    assert shop.loss(sample, 1, "converted") == untouched


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder of safetensors."""
    files = folder.glob("model*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_the_original_slicing(shop: Shop, tuned: float, untouched: float) -> None:
    assert tuned < untouched
    assert shop.loss(ORIGINAL_SLICING, 4, "original") == pytest.approx(tuned, rel=1e-5)


def test_another_slicing(shop: Shop, tuned: float) -> None:
    assert shop.loss(CHANGED_SLICING, 2, "changed") == pytest.approx(tuned, rel=1e-5)
    result = shop.try_run(CHANGED_SLICING, "eval", 2, "changed", "--check_config")
    assert "src_strategy_path_or_dir = 'tuned/strategy': not needed" in result.stderr


def test_equal_axes_that_shard_in_another_way_are_another_layout(shop: Shop) -> None:
    sample = ORIGINAL_SLICING + "  vocab_emb_dp: False\n"
    refused = shop.try_run(sample, "eval", 4, "otherwise")
    assert refused.code == 2
    assert "no rank has written the part of `model.embed_tokens.weight`" in refused.stderr
    assert "auto_trans_ckpt: False loads only the same layout" in refused.stderr


def test_the_complete_copy_opens_in_transformers_and_replaces_only_itself(
    shop: Shop, tuned: float
) -> None:
    copy = shop.folder / "put_together/unified_checkpoint"
    model, report = AutoModelForCausalLM.from_pretrained(copy, output_loading_info=True)
    assert (report["missing_keys"], report["unexpected_keys"]) == (set(), set())
    assert model.config.vocab_size == VOCABULARY
    assert AutoTokenizer.from_pretrained(copy)("x")["input_ids"]
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert shop.loss(MULTI_CARD.format(path="put_together/unified_checkpoint"), 4, "whole") == (
        pytest.approx(tuned, rel=1e-5)
    )
    (copy / "notes.txt").write_text("mine")
    refused = shop.try_run(TO_ONE, "eval", 1, "put_together")
    assert refused.code == 2
    assert "unified_checkpoint holds notes.txt, " in refused.stderr
    (copy / "notes.txt").unlink()
    shop.run(TO_ONE + "parallel_config: {model_parallel: 2}\n", "eval", 2, "put_together")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


PREDICT = """
load_checkpoint: '{path}'                             # Load weights file path
load_ckpt_format: 'safetensors'                       # Load weights file format
{more}parallel_config:
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 1
"""


def test_prediction_from_complete_and_from_distributed_weights(shop: Shop, tuned: float) -> None:
    whole = PREDICT.format(path="put_together/unified_checkpoint", more="auto_trans_ckpt: True\n")
    cut = PREDICT.format(path="tuned/checkpoint", more="")
    texts = [
        shop.text(sample, 2, output, "--use_parallel", "True")
        for sample, output in ((whole, "says"), (cut, "repeats"))
    ]
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["text"].startswith("I love Beijing, because")


HUGGING_FACE = """
use_legacy: False
load_checkpoint : ''
pretrained_model_dir: "hf_unified_safetensors"
model:
  model_config:
    compute_dtype: "bfloat16"
    layernorm_compute_dtype: "float32"
    softmax_compute_dtype: "float32"
    rotary_dtype: "bfloat16"
    params_dtype: "bfloat16"
generation:
  max_length: 30
"""


def test_a_hugging_face_directory_alone(shop: Shop) -> None:
    (shop.folder / "alone.yaml").write_text(HUGGING_FACE)
    arguments = ["--config", "alone.yaml", "--run_mode", "predict", "--output_dir", "alone"]
    arguments += ["--predict_data", "def f", "--device_target", "CPU"]
    result = run_job(arguments, shop.folder)
    assert result.code == 0, result.stderr
    assert "loaded: " in result.stdout
    assert "read from hf_unified_safetensors (complete)" in result.stdout


RESUME = """
load_checkpoint: 'tuned/checkpoint'                # Load source distributed weights file path
load_ckpt_format: 'safetensors'                    # Load weights file format
resume_training: True                              # Resumable training after breakpoint switch
callbacks:
  - type: CheckpointMonitor
    checkpoint_format: safetensors                 # Save weights file format
    save_checkpoint_steps: 4
runner_config: {max_steps: 4}
"""
RESUME_SAME = RESUME + "parallel_config: {data_parallel: 2, model_parallel: 2}\n"
RESUME_CHANGED = (
    RESUME.replace("tuned/checkpoint", "crippled")
    + """
src_strategy_path_or_dir: 'tuned/strategy'          # Load source strategy file
auto_trans_ckpt: True                               # Enable online slicing
parallel_config:                                    # Configure the target distributed strategy
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 1
"""
)


def test_resuming_on_the_same_layout_and_on_another_without_a_rank(shop: Shop) -> None:
    """Ranks 1 and 3 hold the same, so do 0 and 2: one folder is lost, a file of another damaged."""
    same = shop.run(RESUME_SAME, "train", 4, "resumed")
    assert "step 2 of 4" in same.stdout
    crippled = shop.folder / "crippled"
    shutil.copytree(shop.folder / "tuned/checkpoint", crippled)
    shutil.rmtree(crippled / "rank_3")
    damaged = crippled / "rank_0/CKP_rank_0-1_2.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    changed = shop.run(RESUME_CHANGED, "train", 2, "moved", "--batch_size", "4")
    assert "step 2 of 4" in changed.stdout
    assert f"crippled/rank_0/{damaged.name}: bytes " in changed.stdout
    assert f"crippled/rank_3/{damaged.name.replace('_0-', '_3-')} is missing" in changed.stdout
    assert "ranks 0, 3 have no valid file; their parts are read from the ranks" in changed.stdout
    losses = [shop.workshop.losses(output) for output in ("resumed", "moved")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    shutil.rmtree(crippled / "rank_1")
    refused = shop.try_run(RESUME_CHANGED, "train", 2, "refused", "--batch_size", "4")
    assert refused.code == 2
    assert "no checkpoint in crippled can be used" in refused.stderr
    assert "ranks 0, 1, 3 have no valid file in crippled, and no other rank holds" in refused.stdout


CLUSTER = """
output_dir: './output'                              # The strategy file is generated under it
load_checkpoint: 'hf_unified_safetensors'           # Load full weights file path
load_ckpt_format: 'safetensors'                     # Load weight file format
auto_trans_ckpt: True                               # turn on online slicing
train_dataset: &train_dataset
  data_loader:
    type: TextDataLoader
    dataset_dir: "corpus"
    shuffle: True
parallel_config:                                    # for information only
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 2
  micro_batch_num: 2
  vocab_emb_dp: True
  gradient_aggregation_group: 4
  micro_batch_interleave_num: 1
"""
STRATEGY_ONLY = "only_save_strategy: True\n" + CLUSTER[CLUSTER.index("train_dataset:") :]
OFFLINE_SLICED = """
load_checkpoint: 'sliced'                           # Load distributed weights file path
load_ckpt_format: 'safetensors'                     # Load weight file format
auto_trans_ckpt: False                              # online slicing turned off
parallel_config:
  data_parallel: 1
  model_parallel: 2
  pipeline_stage: 2
  micro_batch_num: 2
  vocab_emb_dp: True
"""


def test_a_cluster_with_and_without_a_shared_disk(shop: Shop, untouched: float) -> None:
    shop.run(STRATEGY_ONLY, "train", 1, "planned")
    strategies, one = shop.folder / "planned/strategy", shop.folder / "planned/merged/dst.ckpt"
    assert len(list(strategies.iterdir())) == 4
    assert merge_pipeline_strategys(strategies, one).by_stage().keys() == {0, 1}
    shop.run(CLUSTER, "train", 4, "cluster", "--max_steps", "1")
    assert len(shop.workshop.losses("cluster")) == 1
    load_distributed_checkpoint(
        network=None,
        predict_strategy=str(one),
        unified_safetensors_dir=str(shop.folder / "hf_unified_safetensors"),
        dst_safetensors_dir=str(shop.folder / "sliced"),
        format="safetensors",
        max_process_num=64,
    )
    assert shop.loss(OFFLINE_SLICED, 4, "offline") == pytest.approx(untouched, rel=1e-5)


SPARED = """
parallel_config: {data_parallel: 2}
callbacks:
  - type: CheckpointMonitor
    checkpoint_format: safetensors                  # Save weights file format
    remove_redundancy: True                         # Turn on de-redundancy when saving weights
    save_checkpoint_steps: 1
    prefix: example
"""
SPARED_LOAD = """
load_checkpoint: spared/checkpoint
load_ckpt_format: 'safetensors'    # Load weight file format
remove_redundancy: True            # Turn on de-redundancy when loading weights
parallel_config: {data_parallel: 2}
"""


def test_without_redundancy(shop: Shop) -> None:
    shop.run(SPARED, "train", 2, "spared", "--max_steps", "1")
    sizes = [path.stat().st_size for path in shop.folder.glob("spared/checkpoint/rank_*/*.saf*")]
    assert max(sizes) < 0.6 * sum(sizes)
    spared = shop.loss(SPARED_LOAD, 2, "spared_loaded")
    left_out = SPARED_LOAD.replace("remove_redundancy: True ", "").replace("{data_parallel: 2}", "")
    assert shop.loss(left_out, 1, "spared_alone") == pytest.approx(spared, rel=1e-5)


def test_merging_in_both_scenarios_of_the_page(shop: Shop, tuned: float) -> None:
    from launcher.tools.unified_safetensors import main

    common = ["--src_strategy_dirs", str(shop.folder / "tuned/strategy"), "--mindspore_ckpt_dir",
              str(shop.folder / "tuned/checkpoint"), "--file_suffix", "1_2"]  # fmt: skip
    merged_dir = shop.folder / "merged"
    assert main([*common, "--output_dir", str(merged_dir), "--has_redundancy", "True"]) == 0
    assert list(merged_dir.glob("optimizer-*"))
    weights_dir = shop.folder / "merged_weights"
    assert main([*common, "--output_dir", str(weights_dir), "--filter_out_param_prefix",
                 "adam_"]) == 0  # fmt: skip
    assert not list(weights_dir.glob("optimizer-*"))
    copy = load_all(shop.folder / "put_together/unified_checkpoint")
    for folder in (merged_dir, weights_dir):
        assert all(torch.equal(t, copy[name]) for name, t in load_all(folder).items())


CONVERT = """
load_checkpoint: 'torch_weights/'                   # Load weights file path
load_ckpt_format: 'ckpt'                            # Load weight file format
callbacks:
  - type: CheckpointMonitor
    checkpoint_format: 'safetensors'                # Save the weights file format as safetensor
"""


def test_converting_by_a_training_task_and_by_the_call(shop: Shop) -> None:
    original = load_all(shop.folder / "hf_unified_safetensors")
    (shop.folder / "torch_weights").mkdir()
    torch.save(original, shop.folder / "torch_weights/net.ckpt")
    result = shop.run(CONVERT, "train", 1, "trained", "--max_steps", "1")
    assert "read from torch_weights (complete)" in result.stdout
    assert (shop.folder / "trained/checkpoint/rank_0/CKP_rank_0-1_1.safetensors").is_file()
    target = shop.folder / "safetensors_path"
    ckpt_to_safetensors(str(shop.folder / "torch_weights/net.ckpt"), str(target))
    converted = load_file(target / "net.safetensors")
    assert all(torch.equal(converted[name], tensor) for name, tensor in original.items())


def as_mindspore(source: Path, target: Path) -> None:
    """Rank files without the metadata of Slipway, with what a run of MindSpore adds."""
    for file in sorted(source.glob("rank_*/*.safetensors")):
        tensors = load_file(file)
        tensors |= {"epoch_num": torch.tensor(1), "step_num": torch.tensor(2),
                    "global_step": torch.tensor([2], dtype=torch.int32)}  # fmt: skip
        path = target / file.parent.name / file.name
        path.parent.mkdir(parents=True)
        save_file(tensors, path, {"format": "ms", "remove_redundancy": "False"})


@pytest.mark.parametrize("place", ["beside", "named", "one merged file"])
def test_rank_files_that_do_not_describe_themselves(
    shop: Shop, tuned: float, place: str, tmp_path: Path
) -> None:
    as_mindspore(shop.folder / "tuned/checkpoint", tmp_path / "foreign/checkpoint")
    sample, strategy = f"load_checkpoint: {tmp_path}/foreign/checkpoint\n", tmp_path / "plan"
    if place == "beside":
        strategy = tmp_path / "foreign/strategy"
        refused = shop.try_run(sample, "eval", 1, "foreign")
        assert refused.code == 2
        assert "does not describe its layout" in refused.stderr
        assert "Set src_strategy_path_or_dir" in refused.stderr
    shutil.copytree(shop.folder / "tuned/strategy", strategy)
    if place == "one merged file":
        merge_pipeline_strategys(strategy, tmp_path / "merged.ckpt")
        strategy = tmp_path / "merged.ckpt"
    if place != "beside":
        sample += f"src_strategy_path_or_dir: {strategy}\n"
    assert shop.loss(sample, 1, "foreign") == tuned
