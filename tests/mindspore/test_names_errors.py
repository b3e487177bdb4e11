"""What cannot be mapped is refused with the name of the tensor or key; what files do not show is
said in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher.errors import UserError
from launcher.extensions import NAME_WRITERS, required
from launcher.mindspore.naming.translation import with_keys
from launcher.weights.offline.merge import unified_safetensors
from launcher.weights.source import open_complete
from tests.mindspore.names import (
    GROUP,
    HERE,
    PLAIN,
    Arrays,
    arrays,
    assert_same,
    config_of,
    hugging_face,
    native,
    translated,
    write_ranks,
)
from tests.mindspore.names_by_numpy import core, legacy

QWEN = config_of("qwen2_5")


def of_family(family: str) -> tuple[Arrays, dict[str, Any]]:
    """(Hugging Face tensors, config) of a golden family."""
    return native(arrays(open_complete(HERE / family / "hf"))), config_of(family)


def written(folder: Path, tensors: Arrays) -> Path:
    """A file with these tensors."""
    path = folder / "ms.safetensors"
    save_file({n: np.ascontiguousarray(v) for n, v in tensors.items()}, path, {"format": "ms"})
    return path


def refused(path: Path, config: dict[str, Any], **keys: Any) -> str:
    """The error of reading all tensors at `path`."""
    with pytest.raises(UserError) as caught:
        hugging_face(path, config, **keys)
    return str(caught.value)


def change_fused(change: Callable[[Arrays], Any]) -> Callable[[Path], str]:
    """The error for fused Qwen2.5 weights after a change."""

    def error(folder: Path) -> str:
        hf, config = of_family("qwen2_5")
        tensors = legacy(hf, config, is_fused=True)
        change(tensors)
        return refused(written(folder, tensors), config)

    return error


def _both_forms(tensors: Arrays) -> None:
    tensors["model.layers.0.attention.wq.weight"] = np.zeros((32, 32), np.float32)


def _wrong_rows(tensors: Arrays) -> None:
    name = "model.layers.1.attention.w_qkv.weight"
    tensors[name] = tensors[name][:-1]


WRONG: dict[str, tuple[Callable[[Path], str], str]] = {
    "fused and separate": (
        change_fused(_both_forms),
        "`model.layers.0.self_attn.q_proj.weight` is stored twice: in "),
    "rows that do not fit": (
        change_fused(_wrong_rows),
        "`model.layers.1.attention.w_qkv.weight` has shape [63, 32]: 63 is not a multiple of"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_cannot_be_mapped(case: str, tmp_path: Path) -> None:
    error, expected = WRONG[case]
    assert expected in error(tmp_path)


def test_half_of_a_projection_is_missing(tmp_path: Path) -> None:
    tensors = native(arrays(open_complete(HERE / "deepseek_v3" / "legacy")))
    del tensors["model.layers.2.attention.l2q_pe_proj.weight"]
    message = refused(written(tmp_path, tensors), config_of("deepseek_v3"))
    assert "lacks `model.layers.2.attention.l2q_pe_proj.weight`" in message
    assert "`model.layers.2.self_attn.q_b_proj.weight`" in message


def test_names_without_a_rule_stay_for_the_load_to_report(tmp_path: Path) -> None:
    hf, config = of_family("qwen2_5")
    tensors = legacy(hf, config, is_fused=False)
    tensors["model.layers.7.attention.wq.weight"] = np.zeros((2, 2), np.float32)
    del tensors["model.norm_out.weight"]
    found = hugging_face(written(tmp_path, tensors), config)
    assert found.keys() ^ hf.keys() == {"model.layers.7.attention.wq.weight", "model.norm.weight"}


def test_the_model_is_of_another_family(tmp_path: Path) -> None:
    hf, config = of_family("qwen2_5")
    path = written(tmp_path, legacy(hf, config, is_fused=False))
    message = refused(path, {**config, "model_type": "gemma"})
    assert "legacy names of MindFormers, and the model is gemma" in message
    assert "qwen2" in message
    assert "config.json has no num_attention_heads" in refused(path, {
        "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2})  # fmt: skip


def test_dense_core_weights_do_not_show_their_order(tmp_path: Path) -> None:
    hf, config = of_family("qwen3")
    path = written(tmp_path, core(hf, config))
    message = refused(path, config)
    assert "mindformers_qkv_order (--qkv_order: group or plain)" in message
    assert "mindformers_mlp_order" in message
    only_one = refused(path, config, mindformers_qkv_order="group")
    assert "mindformers_qkv_order" not in only_one
    assert "mindformers_mlp_order" in only_one


def test_one_group_has_one_order(tmp_path: Path) -> None:
    hf, config = of_family("qwen3")
    single = {**config, "num_key_value_heads": 1}
    for layer in range(2):
        for letter in "kv":
            name = f"model.layers.{layer}.self_attn.{letter}_proj.weight"
            hf[name] = hf[name][: config["head_dim"]]
    path = written(tmp_path, core(hf, single))
    found = hugging_face(path, single, mindformers_mlp_order="pair")
    name = "model.layers.0.self_attn.v_proj.weight"
    assert np.array_equal(found[name], hf[name].view(np.uint32))


def test_what_is_taken_by_default_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    source = open_complete(HERE / "qwen2_5" / "legacy_concat")
    with_keys(source, QWEN, {}, said.append)
    assert said == [
        f"{source.path}: legacy names of MindFormers",
        "weights of MindFormers: mindformers_qkv_order: group (the default), "
        "mindformers_mlp_order: pair (the default)",
    ]
    said.clear()
    with_keys(open_complete(HERE / "deepseek_v3" / "mcore_old"), config_of("deepseek_v3"), {},
              said.append)  # fmt: skip
    assert "mindformers_mlp_order: plain (the default)" in said[1]


def test_plain_orders_that_ranks_have_cut_need_their_degree(tmp_path: Path) -> None:
    from launcher.weights.ranks.saves import open_any_format

    hf, config = of_family("qwen3")
    folder = write_ranks(tmp_path, core(hf, config, qkv="plain", mlp="plain", tp=2), grid=(2, 1))
    source = open_any_format(folder, strategy=tmp_path / "strategy")
    with pytest.raises(UserError, match="Set mindformers_tensor_parallel"):
        translated(source, config, **PLAIN)
    found = arrays(translated(source, config, **PLAIN, mindformers_tensor_parallel=2))
    assert all(np.array_equal(found[name], hf[name].view(np.uint32)) for name in hf)


def test_square_experts_do_not_show_whether_they_are_transposed(tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_local_experts": 2, "intermediate_size": 8}  # fmt: skip
    stack = np.arange(128, dtype=np.float32).reshape(2, 8, 8)
    tensors = {f"model.layers.0.feed_forward.ffn.w{n}.weight": stack for n in (1, 2, 3)}
    path = written(tmp_path, tensors)
    assert "Set mindformers_use_gmm" in refused(path, config)
    for transposed in (True, False):
        found = hugging_face(path, config, mindformers_use_gmm=transposed)
        one = found["model.layers.0.block_sparse_moe.experts.1.w1.weight"].view(np.float32)
        assert np.array_equal(one, stack[1].T if transposed else stack[1])


def test_state_of_other_optimizers_is_left_out(tmp_path: Path) -> None:
    hf, config = of_family("qwen3_state")
    tensors = core(hf, config)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    added = {
        f"exp_avg.{name}": tensors[name], f"exp_avg_sq_row_{name}": tensors[name][:, 0],
        f"main_param.{name}": tensors[name], "adam_m.placeholder.0": np.zeros(1, np.float32),
        "decoder.layers.0.mlp.router.expert_load": np.zeros(4, np.float32),
        "max_logits_val": np.zeros((4, 1), np.float32),
    }  # fmt: skip
    said: list[str] = []
    found = with_keys(open_complete(written(tmp_path, tensors | added)), config, GROUP, said.append)
    assert found.tensors.keys() == hf.keys()
    assert f"left out, state of an optimizer that is not built here: adam_m.placeholder.0, " \
        f"exp_avg.{name}" in said[1]  # fmt: skip


def test_what_has_no_name_is_not_written() -> None:
    source = open_complete(HERE / "qwen2_5" / "hf")
    write = required(NAME_WRITERS, "mindspore", "")
    with pytest.raises(UserError, match=r"`model.layers.1.\S+ and 8 more cannot be named"):
        write(source, {**QWEN, "num_hidden_layers": 1}, {}, str)
    with pytest.raises(UserError, match="has no mcore names") as caught:
        write(
            open_complete(HERE / "mixtral" / "hf"), config_of("mixtral"), {"naming": "mcore"}, str
        )
    assert "--naming legacy" in str(caught.value)
    with pytest.raises(UserError, match=r"q_proj.weight` has shape \[32, 32\]"):
        write(source, {**QWEN, "num_attention_heads": 3, "num_key_value_heads": 1},
              {"qkv_concat": True}, str)  # fmt: skip


def _without(name: str) -> Callable[[Arrays], Any]:
    return lambda tensors: tensors.pop(name)


def _empty(tensors: Arrays) -> None:
    tensors["lm_head.weight"] = np.zeros((0, 32), np.float32)


PARTS: dict[str, tuple[Callable[[Arrays], Any], dict[str, Any], str]] = {
    "too few layers in config.json": (lambda t: None, {"num_hidden_layers": 1},
                                      "and 3 more cannot be named"),
    "too many": (lambda t: None, {"num_hidden_layers": 3},
                 "lacks `model.layers.2.self_attn.k_proj.bias`"),
    "a norm is missing": (_without("model.layers.1.ffn_norm.weight"), {},
                          "lacks `model.layers.1.post_attention_layernorm.weight`"),
    "the last norm is missing": (_without("model.norm_out.weight"), {}, "lacks the final norm"),
    "half an MLP is missing": (_without("model.layers.0.feed_forward.w2.weight"), {},
                               "lacks `model.layers.0.mlp.down_proj.weight`"),
    "no elements": (_empty, {}, "`lm_head.weight` has shape [0, 32]: it has no elements"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_a_part_of_a_model_is_not_converted(case: str, tmp_path: Path) -> None:
    change, other_sizes, expected = PARTS[case]
    hf, config = of_family("qwen2_5")
    tensors = legacy(hf, config, is_fused=True)
    change(tensors)
    message = refused(written(tmp_path, tensors), config | other_sizes, complete=True)
    assert expected in message


@pytest.mark.parametrize("is_fused", [False, True])
def test_rank_folders_are_merged_with_fused_projections(is_fused: bool, tmp_path: Path) -> None:
    hf, config = of_family("qwen2_5")
    folder = write_ranks(tmp_path, hf, grid=(2, 1))
    (tmp_path / "config.json").write_text(json.dumps(config))
    unified_safetensors(
        folder, tmp_path / "out", src_strategy_dirs=tmp_path / "strategy", file_suffix="1_4",
        format="mindspore", config=tmp_path / "config.json", qkv_concat=is_fused,
    )  # fmt: skip
    found = native(arrays(open_complete(tmp_path / "out")))
    assert_same(found, legacy(hf, config, is_fused=is_fused))
