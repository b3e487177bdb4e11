"""What vLLM's loaders and llama.cpp's converter require of a directory, for every decoder family.

Neither is installed. The table holds the facts of their sources: the architectures that they
register (vLLM: model_executor/models/registry.py; llama.cpp: `ModelBase.register` of its
conversion), the tensor names that their loaders map, and the keys of config.json that they read.
`transformers`, which both of them use for configurations and tokenizers, opens every directory.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.tools.export import main as export
from launcher.weights.formats.safetensors import read_header
from models.families import DECODERS
from tests.parallel.parity import FAMILIES
from tests.ranks import run_ranks
from tests.workshop import BASE, Workshop, merged

DENSE = r"mlp\.(gate|up|down)_proj\.weight"
ATTENTION = r"self_attn\.[qkv]_proj\.(weight|bias)|self_attn\.o_proj\.weight"
NORMS = r"input_layernorm\.weight|post_attention_layernorm\.weight"
QK_NORM = r"self_attn\.[qk]_norm\.weight"
EXPERTS = r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight|mlp\.gate\.weight"
SHARED = r"mlp\.shared_experts\.(gate|up|down)_proj\.weight"
BIASED_ROUTER = r"mlp\.gate\.e_score_correction_bias"
LATENT = (
    r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight|"
    r"self_attn\.(q_a_layernorm|kv_a_layernorm)\.weight"
)
FUSED = r"mlp\.(gate_up_proj|down_proj)\.weight"
AROUND = r"post_self_attn_layernorm\.weight|post_mlp_layernorm\.weight"
GPT_OSS = (
    r"self_attn\.[qkvo]_proj\.(weight|bias)|self_attn\.sinks|mlp\.router\.(weight|bias)|"
    r"mlp\.experts\.(gate_up_proj|down_proj)(_bias)?"
)
TELECHAT = (
    r"(input|post_attention)_layernorm\.weight|self_attention\.(query|key_value|dense)\.weight|"
    r"self_attention\.dense\.bias|mlp\.(gate_proj|up_proj|down_proj)\.weight|mlp\.down_proj\.bias"
)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What both loaders know of a family."""

    architecture: str
    in_vllm: bool = True
    in_llama_cpp: bool = True
    of_layers: tuple[str, ...]
    """Patterns of the names of tensors below a layer."""
    layers: str = r"model\.layers\.\d+\."
    others: str = r"(model\.embed_tokens|model\.norm|lm_head)\.weight"
    keys: tuple[str, ...] = ()
    """Keys of config.json that the converter or the loader reads, beside the common ones."""


_EXPERT_KEYS = ("num_experts_per_tok",)
_DEEPSEEK_KEYS = (
    *("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_intermediate_size"),
    *("routed_scaling_factor", "norm_topk_prob", *_EXPERT_KEYS),
)
_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

READERS: dict[str, Reader] = {
    "llama": Reader(architecture="LlamaForCausalLM", of_layers=(ATTENTION, DENSE, NORMS)),
    "mistral": Reader(architecture="MistralForCausalLM", of_layers=(ATTENTION, DENSE, NORMS)),
    "qwen2": Reader(architecture="Qwen2ForCausalLM", of_layers=(ATTENTION, DENSE, NORMS)),
    "qwen3": Reader(architecture="Qwen3ForCausalLM", keys=("head_dim",),
                    of_layers=(ATTENTION, QK_NORM, DENSE, NORMS)),
    "qwen3_moe": Reader(
        architecture="Qwen3MoeForCausalLM", of_layers=(ATTENTION, QK_NORM, EXPERTS, NORMS),
        keys=("head_dim", "num_experts", "moe_intermediate_size", *_EXPERT_KEYS),
    ),
    "mixtral": Reader(
        architecture="MixtralForCausalLM", keys=("num_local_experts", *_EXPERT_KEYS),
        of_layers=(ATTENTION, NORMS, r"block_sparse_moe\.gate\.weight",
                   r"block_sparse_moe\.experts\.\d+\.w[123]\.weight"),
    ),
    "deepseek_v3": Reader(
        architecture="DeepseekV3ForCausalLM", keys=(*_DEEPSEEK_KEYS, *_LATENT_KEYS),
        of_layers=(LATENT, DENSE, EXPERTS, SHARED, BIASED_ROUTER, NORMS),
    ),
    "glm": Reader(architecture="GlmForCausalLM", keys=("head_dim", "partial_rotary_factor"),
                  of_layers=(ATTENTION, FUSED, NORMS)),
    "glm4": Reader(architecture="Glm4ForCausalLM", keys=("head_dim", "partial_rotary_factor"),
                   of_layers=(ATTENTION, FUSED, NORMS, AROUND)),
    "glm4_moe": Reader(
        architecture="Glm4MoeForCausalLM", keys=(*_DEEPSEEK_KEYS, "partial_rotary_factor"),
        of_layers=(ATTENTION, QK_NORM, DENSE, EXPERTS, SHARED, BIASED_ROUTER, NORMS),
    ),
    "gpt_oss": Reader(architecture="GptOssForCausalLM", of_layers=(GPT_OSS, NORMS),
                      keys=("num_local_experts", "sliding_window", *_EXPERT_KEYS)),
    "telechat": Reader(
        architecture="TelechatForCausalLM", in_vllm=False, in_llama_cpp=False,
        of_layers=(TELECHAT,), layers=r"transformer\.h\.\d+\.",
        others=r"(transformer\.(word_embeddings|ln_f)|lm_head)\.weight",
    ),
}  # fmt: skip
COMMON_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)
OF_PARITY = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3 moe", "mixtral": "mixtral", "deepseek_v3": "deepseek", "glm": "glm 9b",
    "glm4": "glm 0414", "glm4_moe": "glm", "gpt_oss": "gpt-oss", "telechat": "telechat",
}  # fmt: skip
TYPES = {"mistral": "MistralConfig"}


def train_all(folder: str, configs: dict[str, Any]) -> None:
    """One step of every configuration, saved."""
    from launcher import modes
    from launcher.builders.callbacks import build_callbacks
    from launcher.builders.job import Job
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.parallel import world as worlds
    from launcher.report.console import Console

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    for name, config in configs.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config))
        resolved = resolve_command_line(parse(["--config", f"{name}.yaml", "--run_mode", "train"]))
        assert not resolved.problems, resolved.problems
        job = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
        modes.train_to_the_end(job, modes.fresh_run(job, None), build_callbacks(job))
        gc.collect()
    worlds.stop()


SAMPLE = ("qwen3", "deepseek_v3", "gpt_oss")
"""Families of a quick test: dense; experts apart; experts in one tensor."""
EACH = [
    family if family in SAMPLE else pytest.param(family, marks=pytest.mark.long)
    for family in READERS
]
IN_TRANSFORMERS = [
    entry for family, entry in zip(READERS, EACH, strict=True) if DECODERS[family].in_transformers
]


@pytest.fixture(scope="module")
def exported(
    materials: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The exported directory of a family, made with those of its group."""
    others = tuple(family for family in OF_PARITY if family not in SAMPLE)
    folders: dict[tuple[str, ...], Path] = {}

    def directory(family: str) -> Path:
        group = SAMPLE if family in SAMPLE else others
        if group not in folders:
            workshop = materials.copy_to(tmp_path_factory.mktemp("readers"))
            folders[group] = export_all(workshop, group)
        return folders[group] / family

    return directory


def export_all(workshop: Workshop, families: Sequence[str]) -> Path:
    """Train and export `families`, in one process. Returns the folder with their directories."""
    configs = {}
    for family in families:
        known = OF_PARITY[family]
        sizes = {**FAMILIES[known], "num_hidden_layers": 2}
        if family in TYPES:
            sizes["type"] = TYPES[family]
        config = merged(BASE, {
            "output_dir": f"out_{family}", "model": {"model_config": None},
            "runner_config": {"batch_size": 2, "max_steps": 1}, "callbacks": [],
        })  # fmt: skip
        config["model"]["model_config"] = sizes
        configs[family] = config
    run_ranks(1, train_all, str(workshop.folder), configs)
    for family in configs:
        source, target = workshop.folder / f"out_{family}/checkpoint", workshop.folder / family
        code = export(["--load_checkpoint", str(source), "--output_dir", str(target),
                       "--dtype", "bfloat16"])  # fmt: skip
        assert code == 0, family
    return workshop.folder


def test_every_family_has_a_reader() -> None:
    assert READERS.keys() == DECODERS.keys() == OF_PARITY.keys()


@pytest.mark.parametrize("family", EACH)
def test_names_and_configuration_are_those_that_loaders_know(
    exported: Callable[[str], Path], family: str
) -> None:
    reader, folder = READERS[family], exported(family)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [reader.architecture]
    assert config["model_type"] == family
    assert config["dtype"] == "bfloat16"
    if reader.in_vllm or reader.in_llama_cpp:
        missing = [key for key in (*COMMON_KEYS, *reader.keys) if config.get(key) is None]
        assert not missing
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    names = {
        name: entry.dtype
        for file in folder.glob("model-*.safetensors")
        for name, entry in read_header(file).entries.items()
    }
    known = re.compile(f"{reader.others}|{reader.layers}({'|'.join(reader.of_layers)})")
    assert [name for name in names if not known.fullmatch(name)] == []
    assert set(names.values()) == {"BF16"}
    for pattern in reader.of_layers:
        assert any(re.fullmatch(f"{reader.layers}({pattern})", name) for name in names), pattern
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == names.keys()


@pytest.mark.parametrize("family", IN_TRANSFORMERS)
def test_transformers_opens_every_family(exported: Callable[[str], Path], family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, report = AutoModelForCausalLM.from_pretrained(exported(family), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert len(AutoTokenizer.from_pretrained(exported(family))) <= 512


def test_the_tokenizer_is_of_a_kind_that_the_converter_reads(
    exported: Callable[[str], Path],
) -> None:
    """A byte-level BPE in tokenizer.json, with its merges, and special tokens by name."""
    tokenizer = json.loads((exported("qwen3") / "tokenizer.json").read_text())
    assert tokenizer["model"]["type"] == "BPE"
    assert tokenizer["model"]["merges"]
    assert tokenizer["model"]["vocab"]
    assert tokenizer["pre_tokenizer"]["type"] == "ByteLevel"
    settings = json.loads((exported("qwen3") / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    generation = json.loads((exported("qwen3") / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer["model"]["vocab"]["<|endoftext|>"]
