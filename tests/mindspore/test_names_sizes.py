"""Models of other sizes, ratios and biases are mapped as `names_by_numpy` maps them, both ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher.extensions import NAME_WRITERS, required
from launcher.weights.offline.export import write_complete
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.source import open_complete
from tests.mindspore import names_by_numpy as by_numpy
from tests.mindspore.names import (
    Arrays,
    arrays,
    assert_same,
    hugging_face,
    translated,
    write_ranks,
)

Config = dict[str, Any]


def llama(pick: random.Random, kind: str) -> tuple[Config, Arrays]:
    """A Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE or GLM of random sizes."""
    groups, ratio, head = pick.randint(1, 3), pick.randint(1, 3), pick.choice([2, 4, 6])
    hidden = pick.choice([6, 10]) if kind in ("qwen3", "qwen3_moe") else groups * ratio * head
    config = {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": pick.randint(1, 2),
        "num_attention_heads": groups * ratio, "num_key_value_heads": groups, "head_dim": head,
        "intermediate_size": pick.choice([3, 7, 8]), "num_local_experts": pick.randint(1, 4),
    }  # fmt: skip
    has_bias = kind in ("qwen2", "glm")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (11, hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (11, hidden),
    }  # fmt: skip
    if kind == "qwen2" and pick.random() < 0.5:
        del shapes["lm_head.weight"]  # tied
    for layer in range(config["num_hidden_layers"]):
        p, rows = f"model.layers.{layer}.", {"q": groups * ratio, "k": groups, "v": groups}
        shapes |= {f"{p}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        for c, heads in rows.items():
            shapes[f"{p}self_attn.{c}_proj.weight"] = (heads * head, hidden)
            if has_bias:
                shapes[f"{p}self_attn.{c}_proj.bias"] = (heads * head,)
        shapes[f"{p}self_attn.o_proj.weight"] = (hidden, groups * ratio * head)
        if kind.startswith("qwen3"):
            shapes |= {f"{p}self_attn.{c}_norm.weight": (head,) for c in "qk"}
        shapes |= _mlp(p, kind, config)
    return config, _filled(pick, shapes)


def _mlp(p: str, kind: str, config: Config) -> dict[str, tuple[int, ...]]:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    experts = config["num_local_experts"]
    if kind == "mixtral":
        block, wide, back = f"{p}block_sparse_moe.", (width, hidden), (hidden, width)
        return {f"{block}gate.weight": (experts, hidden)} | {
            f"{block}experts.{e}.w{n}.weight": back if n == 2 else wide
            for e in range(experts) for n in (1, 2, 3)
        }  # fmt: skip
    if kind == "glm":
        return {f"{p}mlp.gate_up_proj.weight": (2 * width, hidden),
                f"{p}mlp.down_proj.weight": (hidden, width)}  # fmt: skip
    places = [f"{p}mlp."]
    found: dict[str, tuple[int, ...]] = {}
    if kind == "qwen3_moe":
        places = [f"{p}mlp.experts.{e}." for e in range(experts)]
        found[f"{p}mlp.gate.weight"] = (experts, hidden)
    for place in places:
        found |= {f"{place}{n}_proj.weight": (width, hidden) for n in ("gate", "up")}
        found[f"{place}down_proj.weight"] = (hidden, width)
    return found


def deepseek(pick: random.Random, kind: str) -> tuple[Config, Arrays]:
    """A DeepSeek-V3 of random sizes, without prediction layers."""
    nh, no, ro, vd = (pick.choice(c) for c in ([1, 2, 3], [3, 4], [2, 4, 6], [3, 5]))
    hidden, qr, kr, experts, width = (pick.randint(2, 7) for _ in range(5))
    config = {
        "model_type": "deepseek_v3", "hidden_size": hidden, "num_hidden_layers": 2,
        "num_attention_heads": nh, "num_key_value_heads": nh,
        "q_lora_rank": qr if kind != "direct queries" else None,
        "kv_lora_rank": kr, "qk_nope_head_dim": no, "qk_rope_head_dim": ro, "v_head_dim": vd,
        "n_routed_experts": experts, "moe_intermediate_size": width, "intermediate_size": 9,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (11, hidden), "model.norm.weight": (hidden,),
        "lm_head.weight": (11, hidden),
    }  # fmt: skip
    for layer in range(2):
        p = f"model.layers.{layer}."
        shapes |= {f"{p}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {f"{p}self_attn.{name}.weight": shape for name, shape in {
            "q_a_proj": (qr, hidden), "q_a_layernorm": (qr,), "q_b_proj": (nh * (no + ro), qr),
            "kv_a_proj_with_mqa": (kr + ro, hidden), "kv_a_layernorm": (kr,),
            "kv_b_proj": (nh * (no + vd), kr), "o_proj": (hidden, nh * vd)}.items()}  # fmt: skip
        if kind == "direct queries":
            for name in ("q_a_proj", "q_a_layernorm", "q_b_proj"):
                del shapes[f"{p}self_attn.{name}.weight"]
            shapes[f"{p}self_attn.q_proj.weight"] = (nh * (no + ro), hidden)
        mlps = {f"{p}mlp.": 9} if layer == 0 else {
            f"{p}mlp.shared_experts.": 2 * width,
            **{f"{p}mlp.experts.{e}.": width for e in range(experts)}}  # fmt: skip
        for place, wide in mlps.items():
            shapes |= {f"{place}{n}_proj.weight": (wide, hidden) for n in ("gate", "up")}
            shapes[f"{place}down_proj.weight"] = (hidden, wide)
        if layer:
            shapes[f"{p}mlp.gate.weight"] = (experts, hidden)
            shapes[f"{p}mlp.gate.e_score_correction_bias"] = (experts,)
    return config, _filled(pick, shapes)


def telechat(pick: random.Random, kind: str) -> tuple[Config, Arrays]:
    """A TeleChat2 of random sizes; `telechat_moe` with experts."""
    groups, ratio, head = pick.choice([2, 4]), pick.randint(1, 3), pick.choice([2, 3])
    hidden, width, experts = groups * ratio * head, pick.choice([4, 6]), pick.randint(2, 4)
    config = {
        "model_type": "telechat", "hidden_size": hidden, "n_layer": 2, "n_head": groups * ratio,
        "num_key_value_heads": groups, "ffn_hidden_size": width,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.word_embeddings.weight": (11, hidden), "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (11, hidden),
    }  # fmt: skip
    for layer in range(2):
        p = f"transformer.h.{layer}."
        shapes |= {f"{p}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {f"{p}self_attention.query.weight": (hidden, hidden),
                   f"{p}self_attention.key_value.weight": (2 * groups * head, hidden),
                   f"{p}self_attention.dense.weight": (hidden, hidden),
                   f"{p}self_attention.dense.bias": (hidden,)}  # fmt: skip
        places = [f"{p}mlp."]
        if kind == "telechat_moe":
            places = [f"{p}mlp.local_experts.{e}." for e in range(experts)]
            shapes[f"{p}mlp.router.weight"] = (experts, hidden)
        for place in places:
            shapes |= {f"{place}{n}_proj.weight": (width, hidden) for n in ("gate", "up")}
            shapes |= {f"{place}down_proj.weight": (hidden, width),
                       f"{place}down_proj.bias": (hidden,)}  # fmt: skip
    if kind == "telechat_moe" and pick.random() < 0.5:
        config["num_experts"] = experts
    return config, _filled(pick, shapes)


def _filled(pick: random.Random, shapes: dict[str, tuple[int, ...]]) -> Arrays:
    numbers = np.random.default_rng(pick.randint(0, 1 << 30))
    return {name: numbers.standard_normal(shape, np.float32) for name, shape in shapes.items()}


Make = Callable[[random.Random, str], tuple[Config, Arrays]]
GROUP = {"mindformers_qkv_order": "group", "mindformers_mlp_order": "pair"}
PLAIN = {"mindformers_qkv_order": "plain", "mindformers_mlp_order": "plain"}
CASES: dict[str, tuple[Make, str, Callable[..., Arrays], dict[str, Any], dict[str, Any]]] = {
    "llama": (llama, "llama", by_numpy.legacy, {"is_fused": False}, {}),
    "llama fused": (llama, "llama", by_numpy.legacy, {"is_fused": True}, {"qkv_concat": True}),
    "qwen2 fused": (llama, "qwen2", by_numpy.legacy, {"is_fused": True}, {"qkv_concat": True}),
    "qwen2 plain": (llama, "qwen2", by_numpy.legacy,
                    {"is_fused": True, "qkv": "plain", "mlp": "plain"},
                    {"qkv_concat": True, **PLAIN}),
    "mixtral": (llama, "mixtral", by_numpy.legacy, {"is_fused": True},
                {"qkv_concat": True, "mindformers_use_gmm": False}),
    "mixtral gmm": (llama, "mixtral", by_numpy.legacy, {"is_fused": False, "gmm": True},
                    {"mindformers_use_gmm": True}),
    "qwen3": (llama, "qwen3", by_numpy.core, {}, GROUP),
    "qwen3 plain": (llama, "qwen3", by_numpy.core, {"qkv": "plain", "mlp": "plain"}, PLAIN),
    "qwen3_moe": (llama, "qwen3_moe", by_numpy.core, {}, GROUP),
    "deepseek core": (deepseek, "", by_numpy.core, {}, {}),
    "deepseek core, direct queries": (deepseek, "direct queries", by_numpy.core, {}, {}),
    "deepseek legacy": (deepseek, "", by_numpy.legacy_deepseek, {},
                        {"naming": "legacy", "mindformers_use_gmm": True}),
    "telechat": (telechat, "telechat", by_numpy.telechat, {"is_fused": False}, {}),
    "telechat fused": (telechat, "telechat", by_numpy.telechat, {"is_fused": True},
                       {"qkv_concat": True}),
    "telechat fused by two ranks": (
        telechat, "telechat", by_numpy.telechat, {"is_fused": True, "tp": 2},
        {"qkv_concat": True, "mindformers_tensor_parallel": 2}),
    "telechat_moe": (telechat, "telechat_moe", by_numpy.telechat, {"is_fused": False},
                     {"mindformers_use_gmm": False}),
    "glm": (llama, "glm", by_numpy.glm, {"rearranged": False}, {}),
    "glm rearranged": (llama, "glm", by_numpy.glm, {"rearranged": True},
                       {"mindformers_rearranged_rope": True}),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_other_sizes(case: str, seed: int, tmp_path: Path) -> None:
    make, kind, mindformers, options, keys = CASES[case]
    config, hf = make(random.Random(f"{case} {seed}"), kind)
    stored = mindformers(hf, config, **options)
    bits = {name: values.view(np.uint32) for name, values in hf.items()}
    save_file({n: np.ascontiguousarray(v) for n, v in stored.items()}, tmp_path / "ms.safetensors",
              {"format": "ms"})  # fmt: skip
    assert_same(hugging_face(tmp_path / "ms.safetensors", config, **keys), bits)
    save_file(hf, tmp_path / "hf.safetensors", {"format": "pt"})
    named = required(NAME_WRITERS, "mindspore", "")(
        open_complete(tmp_path / "hf.safetensors"), config, keys, str)  # fmt: skip
    assert_same(arrays(named.source), {n: v.view(np.uint32) for n, v in stored.items()})
    (tmp_path / "written").mkdir()
    write_complete(named.source, tmp_path / "written", form="mindspore", metadata=named.metadata)
    again = open_complete(tmp_path / "written")  # its metadata say what keys said before
    assert_same(arrays(translated(again, config)), bits)


@pytest.mark.parametrize("case", CASES)
def test_other_sizes_in_rank_folders_with_optimizer_state(case: str, tmp_path: Path) -> None:
    make, kind, mindformers, options, keys = CASES[case]
    pick = random.Random(case)
    config, hf = make(pick, kind)
    kinds = {"": "", "adam_m.": "adam_m.", "exp_avg_sq.": "adam_v."}
    stored, expected = {}, {}
    for prefix, own in kinds.items():
        values = {name: pick.random() * value for name, value in hf.items()}
        values = {name: value.astype(np.float32) for name, value in values.items()}
        stored |= {prefix + n: v for n, v in mindformers(values, config, **options).items()}
        expected |= {own + n: v.view(np.uint32) for n, v in values.items()}
    folder = write_ranks(tmp_path, stored, grid=(2, 2), stages=pick.randint(1, 2))
    source = open_any_format(folder, strategy=tmp_path / "strategy")
    keys = {"mindformers_tensor_parallel": 1, **keys}
    assert_same(arrays(translated(source, config, **keys)), expected)


def test_direct_queries_beside_the_latent_part(tmp_path: Path) -> None:
    config, hf = deepseek(random.Random(5), "direct queries")
    stored = by_numpy.core(hf, config)
    for layer in range(2):
        place = f"decoder.layers.{layer}.self_attention."
        parts = [stored.pop(f"{place}linear_{n}_proj.weight") for n in ("q", "kv_down")]
        stored[f"{place}linear_qkv.weight"] = np.concatenate(parts)
        stored[f"{place}linear_kvb.weight"] = stored.pop(f"{place}linear_kv_up_proj.weight")
        stored[f"{place}k_layernorm.weight"] = stored.pop(f"{place}kv_layernorm.weight")
    save_file({n: np.ascontiguousarray(v) for n, v in stored.items()}, tmp_path / "ms.safetensors",
              {"format": "ms"})  # fmt: skip
    found = hugging_face(tmp_path / "ms.safetensors", config, mindformers_mlp_order="pair")
    assert_same(found, {name: values.view(np.uint32) for name, values in hf.items()})
