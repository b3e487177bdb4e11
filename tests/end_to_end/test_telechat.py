"""TeleChat2 through all commands, its tokenizer given by files: train on a layout, resume, merge,
slice, predict. And the other families of GLM, whose directories have configurations of their own.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, GlmConfig

from launcher.errors import UserError
from models.families import ModelConfigError, model_spec
from tests.mindspore.test_tokenizers import qwen2_files
from tests.models.test_telechat import reference
from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

MODEL = {
    "type": "TelechatConfig", "vocab_size": 516, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
TOKENIZER = {
    "pretrained_model_dir": None, "type": "Qwen2Tokenizer", "vocab_file": "vocab.json",
    "merges_file": "merges.txt", "bos_token": "None", "eos_token": "<|im_end|>",
}  # fmt: skip
PROMPT = "def main(argument):"


EXPERTS = MODEL | {"num_experts": 4, "num_experts_per_tok": 2}
LAYOUTS = {
    "dense": (MODEL, {"model_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 2}),
    "experts": (EXPERTS, {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 2}),
}


def telechat_yaml(
    workshop: Workshop, name: str = "run.yaml", model: dict[str, Any] | None = None, **changes: Any
) -> str:
    qwen2_files(workshop, workshop.folder)
    given: dict[str, Any] = {
        "processor": {"tokenizer": TOKENIZER}, "runner_config": {"max_steps": 3},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": 3}],
        "lr_schedule": {"learning_rate": 2e-3, "warmup_steps": 1},
    }  # fmt: skip
    workshop.yaml(name, **given | changes)
    path = workshop.folder / name
    config = yaml.safe_load(path.read_text())
    config["model"]["model_config"] = model or MODEL
    path.write_text(yaml.safe_dump(config))
    return name


def job(workshop: Workshop, *arguments: str, ranks: int = 1) -> JobResult:
    return run_job(["--config", *arguments], workshop.folder, ranks)


def predicted(workshop: Workshop, *arguments: str, ranks: int = 1) -> str:
    more = ["--run_mode", "predict", "--predict_data", PROMPT]
    length = ["--generation_config.max_new_tokens", "6", "--output_dir", "predicted"]
    result = job(workshop, *arguments, *more, *length, ranks=ranks)
    assert result.code == 0, result.stderr
    return (workshop.folder / "predicted" / "text_generation_result.txt").read_text()


@pytest.mark.parametrize("case", LAYOUTS)
def test_telechat_through_all_commands(workshop: Workshop, case: str) -> None:
    from launcher.tools.slice_safetensors import main as slice_safetensors
    from launcher.tools.unified_safetensors import main as unified_safetensors

    folder = workshop.folder
    model, layout = LAYOUTS[case]
    name = telechat_yaml(workshop, model=model, parallel_config=layout)
    trained = job(workshop, name, "--run_mode", "train", ranks=4)
    assert trained.code == 0, trained.stderr
    alone = telechat_yaml(
        workshop, "alone.yaml", model, runner_config={"max_steps": 4, "batch_size": 16}
    )
    again = ["--run_mode", "train", "--resume_training", "True"]
    resumed = job(workshop, alone, *again, "--load_checkpoint", "output/checkpoint")
    assert resumed.code == 0, resumed.stderr
    assert "restored       weights, optimizer state" in resumed.stdout

    root, complete = folder / "output" / "checkpoint", folder / "merged"
    assert unified_safetensors([
        "--mindspore_ckpt_dir", str(root), "--output_dir", str(complete), "--file_suffix", "1_3",
        "--filter_out_param_prefix", "adam_",
    ]) == 0  # fmt: skip
    tensors = load_file(next(complete.glob("model*.safetensors")))
    config = json.loads((complete / "config.json").read_text())
    ids = torch.tensor([AutoTokenizer.from_pretrained(complete)(PROMPT)["input_ids"]])
    for _ in range(6):  # greedily
        logits = reference(config, tensors, ids, 1e4)
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
    text = AutoTokenizer.from_pretrained(complete).decode(ids[0])

    (folder / "merged.yaml").write_text(
        "pretrained_model_dir: merged\ncontext: {device_target: CPU}\n"
    )
    assert text.strip() in predicted(workshop, "merged.yaml")
    rank_folders = ["--load_checkpoint", "output/checkpoint", "--load_ckpt_format", "safetensors"]
    halves = ["pipeline_stage=1", "micro_batch_num=1", "data_parallel=1", "expert_parallel=1"]
    words = [f"parallel_config.{word}" for word in halves]
    assert text.strip() in predicted(workshop, name, *rank_folders, *words, ranks=2)
    assert slice_safetensors([
        "--unified_safetensors_dir", str(complete), "--dst_safetensors_dir", str(folder / "cut"),
        "--config", str(folder / name),
    ]) == 0  # fmt: skip
    cut = load_file(next((folder / "cut" / "rank_1").glob("*.safetensors")))
    expected = tensors["transformer.h.0.self_attention.key_value.weight"]
    assert torch.equal(cut["transformer.h.0.self_attention.key_value.weight"], expected[16:])
    absent = "transformer.h.1." if case == "dense" else "transformer.h.0.mlp.local_experts.2."
    assert not [key for key in cut if key.startswith(absent)]


def refused(workshop: Workshop, *changes: str) -> str:
    more = ["--run_mode", "predict", "--predict_data", PROMPT, *changes]
    result = job(workshop, telechat_yaml(workshop), *more)
    assert result.code == 2
    return result.stderr


def test_files_of_a_tokenizer_that_do_not_exist(workshop: Workshop) -> None:
    error = refused(workshop, "--processor.tokenizer.merges_file", "merge.txt")
    assert "--processor.tokenizer.merges_file: processor.tokenizer.merges_file = 'merge.txt': " in (
        error
    )
    assert "did you mean `merges.txt`?" in error
    error = refused(workshop, "--processor.tokenizer.type", "Qwen3Tokenizer")
    assert "unknown type of tokenizer. did you mean `Qwen2Tokenizer`?" in error
    # With a directory, it is used.
    directory = ["--processor.tokenizer.pretrained_model_dir", "tokenizer"]
    missing = [*directory, "--processor.tokenizer.merges_file", "merge.txt"]
    result = job(workshop, telechat_yaml(workshop), "--run_mode", "train", *missing)
    assert result.code == 0, result.stderr
    assert "tokenizer: that of tokenizer; processor.tokenizer.merges_file = merge.txt" in (
        result.stdout
    )
    assert "accepted, no effect: processor.tokenizer.type, bos_token, eos_token" in result.stdout


CHATGLM: dict[str, Any] = {
    "model_type": "chatglm", "architectures": ["ChatGLMModel"], "hidden_size": 32, "num_layers": 2,
    "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
    "kv_channels": 8, "ffn_hidden_size": 40, "padded_vocab_size": 96, "add_qkv_bias": True,
    "add_bias_linear": False, "layernorm_epsilon": 1e-5, "rmsnorm": True, "rope_ratio": 500,
    "seq_length": 64, "tie_word_embeddings": False, "torch_dtype": "float32",
    "eos_token_id": [2], "pad_token_id": 0,
}  # fmt: skip


def test_chatglm_is_the_glm_of_transformers() -> None:
    spec = model_spec({}, CHATGLM)
    expected = GlmConfig(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        rms_norm_eps=1e-5, attention_bias=True, eos_token_id=[2], pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    given = {k: v for k, v in spec.hf_config.items() if k not in ("architectures", "dtype")}
    assert spec.family == "glm"
    assert given.items() <= expected.to_dict().items()
    plain = model_spec({}, CHATGLM | {"multi_query_attention": False, "add_qkv_bias": False})
    assert (plain.hf_config["num_key_value_heads"], plain.hf_config["attention_bias"]) == (4, False)
    for key, value in (("rmsnorm", False), ("post_layer_norm", False), ("quantization_bit", 4)):
        with pytest.raises(ModelConfigError, match=f"config.json: {key} = {value}"):
            model_spec({}, CHATGLM | {key: value})
    with pytest.raises(UserError, match="rope_ratio = 'a': must be a number above 0"):
        model_spec({}, CHATGLM | {"rope_ratio": "a"})
