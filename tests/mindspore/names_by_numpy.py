"""Names and layouts of MindFormers written out once more, tensor by tensor, with numpy alone: what
the mapping of the launcher is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.mindspore.names import Arrays


def group(q: Any, k: Any, v: Any, groups: int) -> Any:
    """For each group its query heads, key head, value head."""
    parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
    return np.concatenate(parts, 1).reshape(-1, *q.shape[1:])


def pair(gate: Any, up: Any) -> Any:
    """Row j of gate, row j of up."""
    return np.stack([gate, up], 1).reshape(-1, *gate.shape[1:])


def plain(tensors: list[Any], ranks: int) -> Any:
    """For each tensor parallel rank its part of each tensor."""
    shards = [np.split(x, ranks) for x in tensors]
    return np.concatenate([shard[rank] for rank in range(ranks) for shard in shards])


def halves(rows: Any, heads: int) -> Any:
    """Of each head the even rows, then the odd ones."""
    split = rows.reshape(heads, -1, *rows.shape[1:])
    return np.concatenate([split[:, 0::2], split[:, 1::2]], 1).reshape(rows.shape)


def heads_of(rows: Any, heads: int, first: int, last: int) -> Any:
    """Rows `first` to `last` of each head."""
    split = rows.reshape(heads, -1, *rows.shape[1:])[:, first:last]
    return split.reshape(-1, *rows.shape[1:])


def qkv_of(hf: Arrays, place: str, kind: str, config: dict[str, Any], order: str, tp: int) -> Any:
    """Query, key and value in one."""
    q, k, v = (hf[f"{place}self_attn.{letter}_proj.{kind}"] for letter in "qkv")
    return group(q, k, v, config["num_key_value_heads"]) if order == "group" else plain(
        [q, k, v], tp)  # fmt: skip


def mlp_of(gate: Any, up: Any, order: str, tp: int) -> Any:
    """Gate and up in one."""
    return pair(gate, up) if order == "pair" else plain([gate, up], tp)


def legacy(
    hf: Arrays, config: dict[str, Any], *, is_fused: bool, qkv: str = "group", mlp: str = "pair",
    tp: int = 1, gmm: bool = False,
) -> Arrays:  # fmt: skip
    """Llama, Qwen2 and Mixtral under legacy names."""
    ms = {"model.tok_embeddings.embedding_weight": hf["model.embed_tokens.weight"],
          "model.norm_out.weight": hf["model.norm.weight"]}  # fmt: skip
    if "lm_head.weight" in hf:
        ms["lm_head.weight"] = hf["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        ms[f"{p}attention_norm.weight"] = hf[f"{p}input_layernorm.weight"]
        ms[f"{p}ffn_norm.weight"] = hf[f"{p}post_attention_layernorm.weight"]
        ms[f"{p}attention.wo.weight"] = hf[f"{p}self_attn.o_proj.weight"]
        for kind in ("weight", "bias"):
            if f"{p}self_attn.q_proj.{kind}" not in hf:
                continue
            if is_fused:
                ms[f"{p}attention.w_qkv.{kind}"] = qkv_of(hf, p, kind, config, qkv, tp)
            else:
                for c in "qkv":
                    ms[f"{p}attention.w{c}.{kind}"] = hf[f"{p}self_attn.{c}_proj.{kind}"]
        if config["model_type"] == "mixtral":
            block = f"{p}block_sparse_moe."
            ms[f"{p}feed_forward.router.dense.weight"] = hf[f"{block}gate.weight"]
            for n in (1, 2, 3):
                stack = np.stack([hf[f"{block}experts.{e}.w{n}.weight"]
                                  for e in range(config["num_local_experts"])])  # fmt: skip
                ms[f"{p}feed_forward.ffn.w{n}.weight"] = stack.swapaxes(1, 2) if gmm else stack
            continue
        gate, up = hf[f"{p}mlp.gate_proj.weight"], hf[f"{p}mlp.up_proj.weight"]
        ms[f"{p}feed_forward.w2.weight"] = hf[f"{p}mlp.down_proj.weight"]
        if is_fused:
            ms[f"{p}feed_forward.w_gate_hidden.weight"] = mlp_of(gate, up, mlp, tp)
        else:
            ms |= {f"{p}feed_forward.w1.weight": gate, f"{p}feed_forward.w3.weight": up}
    return ms


def core(
    hf: Arrays, config: dict[str, Any], *, qkv: str = "group", mlp: str = "pair", tp: int = 1
) -> Arrays:
    """Qwen3, Qwen3-MoE and DeepSeek-V3 under core names, with separate latent projections."""
    ms = {"embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
          "decoder.final_layernorm.weight": hf["model.norm.weight"]}  # fmt: skip
    if "lm_head.weight" in hf:
        ms["output_layer.weight"] = hf["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        p, m = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        ms[f"{m}input_layernorm.weight"] = hf[f"{p}input_layernorm.weight"]
        ms[f"{m}pre_mlp_layernorm.weight"] = hf[f"{p}post_attention_layernorm.weight"]
        ms[f"{m}self_attention.linear_proj.weight"] = hf[f"{p}self_attn.o_proj.weight"]
        if "kv_lora_rank" in config:
            names = {"q_a_proj": "linear_q_down_proj", "q_a_layernorm": "q_layernorm",
                     "q_b_proj": "linear_q_up_proj", "kv_a_layernorm": "kv_layernorm",
                     "kv_a_proj_with_mqa": "linear_kv_down_proj",
                     "kv_b_proj": "linear_kv_up_proj", "q_proj": "linear_q_proj"}  # fmt: skip
            for name, new in names.items():
                if f"{p}self_attn.{name}.weight" not in hf:
                    continue  # low-rank queries, or queries that are not
                ms[f"{m}self_attention.{new}.weight"] = hf[f"{p}self_attn.{name}.weight"]
        else:
            ms[f"{m}self_attention.linear_qkv.weight"] = qkv_of(hf, p, "weight", config, qkv, tp)
            for c in "qk":
                ms[f"{m}self_attention.{c}_layernorm.weight"] = hf[f"{p}self_attn.{c}_norm.weight"]
        _core_mlp(ms, hf, f"{m}mlp.", f"{p}mlp.", mlp, tp)
    return ms


def _core_mlp(ms: Arrays, hf: Arrays, m: str, p: str, order: str, tp: int) -> None:
    if f"{p}gate.weight" not in hf:
        ms[f"{m}linear_fc1.weight"] = mlp_of(
            hf[f"{p}gate_proj.weight"], hf[f"{p}up_proj.weight"], order, tp)  # fmt: skip
        ms[f"{m}linear_fc2.weight"] = hf[f"{p}down_proj.weight"]
        return
    ms[f"{m}router.weight"] = hf[f"{p}gate.weight"]
    if f"{p}gate.e_score_correction_bias" in hf:
        ms[f"{m}router.expert_bias"] = hf[f"{p}gate.e_score_correction_bias"]
        _core_mlp(ms, hf, f"{m}shared_experts.", f"{p}shared_experts.", order, tp)
    one, two, e = [], [], 0
    while f"{p}experts.{e}.gate_proj.weight" in hf:
        gate, down, up = (hf[f"{p}experts.{e}.{n}_proj.weight"] for n in ("gate", "down", "up"))
        one.append(np.concatenate([gate, up]).T)
        two.append(down.T)
        e += 1
    ms |= {f"{m}experts.weight1": np.concatenate(one), f"{m}experts.weight2": np.concatenate(two)}


def legacy_deepseek(hf: Arrays, config: dict[str, Any]) -> Arrays:
    """DeepSeek-V3 under legacy names, experts grouped."""
    nh, no, ro = (config[k] for k in (
        "num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))  # fmt: skip
    vd, kr = config["v_head_dim"], config["kv_lora_rank"]
    ms = {"model.tok_embeddings.embedding_weight": hf["model.embed_tokens.weight"],
          "model.norm_out.weight": hf["model.norm.weight"],
          "lm_head.weight": hf["lm_head.weight"]}  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        a, f, s = f"{p}attention.", f"{p}feed_forward.", f"{p}self_attn."
        q_b, kv_a = hf[f"{s}q_b_proj.weight"], hf[f"{s}kv_a_proj_with_mqa.weight"]
        kv_b = hf[f"{s}kv_b_proj.weight"]
        ms |= {
            f"{p}attention_norm.weight": hf[f"{p}input_layernorm.weight"],
            f"{p}ffn_norm.weight": hf[f"{p}post_attention_layernorm.weight"],
            f"{a}wo.weight": hf[f"{s}o_proj.weight"],
            f"{a}q2l_proj.weight": hf[f"{s}q_a_proj.weight"],
            f"{a}lq_norm.weight": hf[f"{s}q_a_layernorm.weight"],
            f"{a}lkv_norm.weight": hf[f"{s}kv_a_layernorm.weight"],
            f"{a}l2q_nope_proj.weight": heads_of(q_b, nh, 0, no),
            f"{a}l2q_pe_proj.weight": halves(heads_of(q_b, nh, no, no + ro), nh),
            f"{a}kv2l_latent_kv.weight": kv_a[:kr],
            f"{a}kv2l_k_pe.weight": halves(kv_a[kr:], 1),
            f"{a}lkv2kv_k_nope.weight": heads_of(kv_b, nh, 0, no),
            f"{a}lkv2kv_v.weight": heads_of(kv_b, nh, no, no + vd),
        }
        mlps = {f"{f}shared_experts.": f"{p}mlp.shared_experts."}
        if f"{p}mlp.gate.weight" not in hf:
            mlps = {f: f"{p}mlp."}
        for new, old in mlps.items():
            for n, name in enumerate(("gate", "down", "up"), 1):
                ms[f"{new}w{n}.weight"] = hf[f"{old}{name}_proj.weight"]
        if f"{p}mlp.gate.weight" in hf:
            routed, experts = f"{f}routed_experts.", range(config["n_routed_experts"])
            ms[f"{routed}router_dense.weight"] = hf[f"{p}mlp.gate.weight"]
            ms[f"{routed}topk_bias"] = hf[f"{p}mlp.gate.e_score_correction_bias"]
            of = {n: [hf[f"{p}mlp.experts.{e}.{n}_proj.weight"] for e in experts]
                  for n in ("gate", "up", "down")}  # fmt: skip
            both = zip(of["gate"], of["up"], strict=True)
            ms[f"{routed}ffn.w1"] = np.stack([np.concatenate(pair_of).T for pair_of in both])
            ms[f"{routed}ffn.w2"] = np.stack([down.T for down in of["down"]])
    return ms


def telechat(hf: Arrays, config: dict[str, Any], *, is_fused: bool, tp: int = 1) -> Arrays:
    """TeleChat2, with a mixture of experts where the config has some."""
    groups, hidden = config["num_key_value_heads"], config["hidden_size"]
    head = hidden // config["n_head"]
    ms = {"model.tok_embeddings.embedding_weight": hf["transformer.word_embeddings.weight"],
          "model.norm_out.weight": hf["transformer.ln_f.weight"],
          "lm_head.weight": hf["lm_head.weight"]}  # fmt: skip
    for layer in range(config["n_layer"]):
        p, m = f"transformer.h.{layer}.", f"model.layers.{layer}."
        ms[f"{m}attention_norm.weight"] = hf[f"{p}input_layernorm.weight"]
        ms[f"{m}ffn_norm.weight"] = hf[f"{p}post_attention_layernorm.weight"]
        q, kv = (hf[f"{p}self_attention.{n}.weight"] for n in ("query", "key_value"))
        for kind in ("weight", "bias"):
            ms[f"{m}attention.wo.{kind}"] = hf[f"{p}self_attention.dense.{kind}"]
        if is_fused:
            k, v = (heads_of(kv, groups, i * head, (i + 1) * head) for i in (0, 1))
            ms[f"{m}attention.w_qkv.weight"] = plain([q, k, v], tp)
        else:
            ms |= {f"{m}attention.wq.weight": q, f"{m}attention.wk_v.weight": kv}
        f = f"{m}feed_forward."
        if f"{p}mlp.router.weight" in hf:
            ms[f"{f}router.dense.weight"] = hf[f"{p}mlp.router.weight"]
            place, e = f"{p}mlp.local_experts.", range(len(hf[f"{p}mlp.router.weight"]))
            for n, name in enumerate(("gate", "down", "up"), 1):
                ms[f"{f}ffn.w{n}.weight"] = np.stack(
                    [hf[f"{place}{i}.{name}_proj.weight"] for i in e])  # fmt: skip
            biases = np.stack([hf[f"{place}{i}.down_proj.bias"] for i in e])
            ms[f"{f}ffn.w2.bias"] = biases[None, :, None, :]
            continue
        gate, up = hf[f"{p}mlp.gate_proj.weight"], hf[f"{p}mlp.up_proj.weight"]
        for kind in ("weight", "bias"):
            ms[f"{f}w2.{kind}"] = hf[f"{p}mlp.down_proj.{kind}"]
        if is_fused:
            ms[f"{f}w_gate_hidden.weight"] = plain([gate, up], tp)
        else:
            ms |= {f"{f}w1.weight": gate, f"{f}w3.weight": up}
    return ms


def glm(hf: Arrays, config: dict[str, Any], *, rearranged: bool) -> Arrays:
    """GLM-4-9B from the names of the class `glm`, separate projections."""
    nh, kv = config["num_attention_heads"], config["num_key_value_heads"]
    ms = {"transformer.embedding.embedding_weight": hf["model.embed_tokens.weight"],
          "transformer.encoder.final_layernorm.weight": hf["model.norm.weight"],
          "transformer.output_layer.weight": hf["lm_head.weight"]}  # fmt: skip
    for layer in range(config["num_hidden_layers"]):
        p, m = f"model.layers.{layer}.", f"transformer.encoder.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            ms[f"{m}{name}.weight"] = hf[f"{p}{name}.weight"]
        ms[f"{m}self_attention.dense.weight"] = hf[f"{p}self_attn.o_proj.weight"]
        ms[f"{m}mlp.dense_4h_to_h.weight"] = hf[f"{p}mlp.down_proj.weight"]
        for kind in ("weight", "bias"):
            for c, heads in (("q", nh), ("k", kv), ("v", 0)):
                rows = hf[f"{p}self_attn.{c}_proj.{kind}"]
                ms[f"{m}self_attention.w{c}.{kind}"] = (
                    halves(rows, heads) if rearranged and heads else rows)  # fmt: skip
        left, right = np.split(hf[f"{p}mlp.gate_up_proj.weight"], 2)
        ms |= {f"{m}mlp.dense_left.weight": left, f"{m}mlp.dense_right.weight": right}
    return ms
