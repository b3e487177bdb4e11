"""Recompute and offload: bitwise the same gradients, fewer saved activations."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from launcher.config.schema.parallel import SwapSection
from launcher.errors import UserError
from launcher.parallel import offload as offload
from launcher.parallel.interleave import interleave
from launcher.parallel.layer_modules import (
    check_patterns,
    layer_modules,
    layers_selected,
    matching,
    module_names,
)
from launcher.parallel.offload import Swap, apply_offload, offloaded_parts
from launcher.parallel.recompute import CHEAP
from launcher.streams import STREAMS
from models.decoder import Decoder
from models.stage import StageSplit
from tests.models.tiny import tokens
from tests.parallel.keeping import (
    CPU,
    INTERLEAVED,
    LAYERS,
    SEQUENCE,
    SPECS,
    SWAP,
    assert_same,
    check,
    decoder,
    numbered,
    plain,
    recompute,
    run_again,
    step,
)  # fmt: skip
from tests.parallel.parity import Case
from tests.ranks import run_job
from tests.streams import LateStreams
from tests.workshop import BASE, Workshop


@pytest.mark.parametrize("model_name", SPECS)
@pytest.mark.parametrize(
    ("section", "most"),
    [
        ({"recompute": True}, 0.15),
        ({"recompute": [2]}, 0.5),
        ({"select_recompute": True}, 0.85),
        ({"recompute": [1], "select_recompute": True}, 0.7),
        ({"recompute": True, "select_recompute_exclude": [r"self_attn\.attend"]}, 0.7),
        ({"select_recompute": [r"feed_forward\.mul", "attention_norm"]}, 0.95),
        ({"select_recompute": {"mlp": [2], "self_attn": True}}, 0.6),
    ],
)
def test_recomputed_gradients_are_the_same_bits_from_less(
    model_name: str, section: dict[str, Any], most: float
) -> None:
    """`most`: the maximum fraction of the saved bytes without recompute."""
    model = decoder(model_name)
    run_again(model, **section)
    gradients, kept = step(model)
    expected, everything = plain(model_name)
    assert_same(gradients, expected)
    assert sum(kept.values()) <= most * everything


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    model = decoder("dense")
    run_again(model, recompute=True)
    inputs: list[int] = []
    for layer in model.model.layers.values():
        layer.register_forward_pre_hook(
            lambda module, arguments: inputs.append(arguments[0].untyped_storage().data_ptr())
        )
    model.ends = False
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()), _never):
        model(tokens(2, 24))
    first_ids = kept[:1]  # saved by the embedding
    assert kept == first_ids + inputs[:LAYERS]


def _never(value: object) -> Tensor:
    raise AssertionError


def test_evaluation_runs_layers_once() -> None:
    model = decoder("dense")
    run_again(model, recompute=True)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens(2, 9)), decoder("dense").eval()(tokens(2, 9)))


@pytest.mark.parametrize(
    ("value", "layers"),
    [
        (True, range(8)),
        (False, []),
        ([], []),
        ([3, 0], [0, 1, 4]),  # one by one to the two stages of the first rank: 0 1 | 4 5
        ([True, 1], [0, 1, 4, 5, 2]),
        ([1], [0]),
        ([9, False], [0, 1, 4, 5]),
        ([[1, 0], [0, True]], [0, 6, 7]),
        ([[2, 2]], [0, 1, 2, 3]),
        ([True, [0, 1]], [0, 1, 2, 3, 6]),
    ],
)
def test_layers_selected_by_entries_of_two_ranks_with_two_stages(value: Any, layers: Any) -> None:
    loop = StageSplit((range(2), range(2, 4), range(4, 6), range(6, 8)), (0, 1, 0, 1))
    assert layers_selected(value, loop) == set(layers)


def test_entries_of_a_v_belong_to_ranks() -> None:
    there_and_back = StageSplit((range(2), range(2, 4), range(4, 6), range(6, 8)), (0, 1, 1, 0))
    assert layers_selected([[1, 0], [2, 0]], there_and_back) == {0, 6, 7}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"feed_forward\.mul", {"mlp.activation"}),
        (r"feed_forward\.w1\.activation", {"mlp.activation"}),
        (r"mlp\.activation_func\.silu", {"mlp.activation"}),
        (r"feed_forward\.w1", {"mlp.gate_proj"}),
        ("feed_forward", {"mlp"}),
        ("attention_norm", {"input_layernorm"}),
        (r"ffn_norm\.norm", {"post_attention_layernorm"}),
        (r"attention\.flash_attention", {"self_attn.attend"}),
        (r"self_attention\.core_attention", {"self_attn.attend"}),
        (r".*\.wq", {"self_attn.q_proj"}),
        (r"self_attn\.[kv]_proj", {"self_attn.k_proj", "self_attn.v_proj"}),
        ("no_such", set()),
    ],
)
def test_names_of_mindformers_match_layer_modules(pattern: str, names: set[str]) -> None:
    assert matching(pattern, module_names(list(numbered(decoder("dense")).values()))) == names


def test_experts_have_activations_too() -> None:
    names = module_names(list(numbered(decoder("latent")).values()))
    assert matching(CHEAP[1], names) == {
        "mlp.activation", "mlp.experts.activation", "mlp.shared_experts.activation"
    }  # fmt: skip
    assert matching(r"mlp\.shared_experts\.mul", names) == {"mlp.shared_experts.activation"}


def test_a_pattern_that_matches_no_module_is_an_error() -> None:
    names = module_names(list(numbered(decoder("dense")).values()))
    with pytest.raises(UserError) as error:
        check_patterns("recompute_config.select_recompute", ["feed_foward"], names, _line)
    assert str(error.value) == (
        "x.yaml:3: recompute_config.select_recompute: 'feed_foward': the layers of this model have "
        "no such module. did you mean `feed_forward`?"
    )
    assert check_patterns("x", [r"feed_forward\.w1\.reshape", "add", "mlp"], names, _line) == [
        r"feed_forward\.w1\.reshape", "add"
    ]  # fmt: skip


def _line(key: str) -> str:
    return "x.yaml:3"


def swapped(model: Decoder, **section: Any) -> Swap:
    layers = numbered(model)
    kept = dict.fromkeys(layers, ())
    return apply_offload(
        layers, offloaded_parts(layers, SwapSection(swap=True, **section), kept), CPU
    )


@pytest.mark.parametrize("model_name", SPECS)
@pytest.mark.parametrize(
    ("section", "most"),
    [
        ({}, 0.15),
        ({"layer_swap": [{"layers": [0, 2], "backward_prefetch": 2}]}, 0.5),
        ({"layer_swap": [{"layers": True, "backward_prefetch": "Auto"}]}, 0.15),
        ({"op_swap": [{"op_name": "mlp", "layers": True}]}, 0.85),
        ({"op_swap": [{"op_name": ["mlp", r"attention\.flash_attention"]}]}, 0.7),
    ],
)
def test_swapped_gradients_are_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, model_name: str, section: Any, most: float
) -> None:
    copy_engine = Copying()
    monkeypatch.setattr(offload, "copy_engine_for", lambda device: copy_engine)
    model = decoder(model_name)
    swap = swapped(model, **section)
    gradients, kept = step(model)
    expected, everything = plain(model_name)
    assert_same(gradients, expected)
    stays = sum(kept.values())
    assert stays <= most * everything
    assert stays + swap.moved_bytes <= everything
    assert copy_engine.sent == swap.moved_bytes == copy_engine.brought


class Copying(offload.CopyEngine):
    """Copies as to and from a device, and counts."""

    def __init__(self) -> None:
        self.sent = self.brought = 0

    def out(self, storage: torch.UntypedStorage) -> Any:
        self.sent += storage.nbytes()
        return storage.clone()

    def back(self, host: Any) -> Any:
        self.brought += host.nbytes()
        return host.clone()


@pytest.mark.parametrize("model_name", SPECS)
def test_offload_waits_for_its_copies_however_late_they_are(
    monkeypatch: pytest.MonkeyPatch, model_name: str
) -> None:
    streams = LateStreams()
    monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    model = decoder(model_name)
    swap = swapped(model, layer_swap=[{"layers": True, "backward_prefetch": 2}])
    gradients, _ = step(model)
    assert_same(gradients, plain(model_name)[0])
    copied = [call.detail for call in streams.calls if call.what == "copy"]
    assert sum(copied) == 2 * swap.moved_bytes, "to the host and back"
    used = [call.detail for call in streams.calls if call.what == "record use"]
    assert sum(used) >= 2 * swap.moved_bytes, "memory is not reused before the copy"
    assert streams.pending == 0


def test_parameters_and_shared_tables_stay() -> None:
    model = decoder("dense")
    swap = swapped(model)
    sent: list[int] = []

    def record_transfer(storage: torch.UntypedStorage) -> Any:
        sent.append(storage.data_ptr())
        return storage

    swap.copy_engine.out = record_transfer  # type: ignore[method-assign]
    step(model)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert sent
    assert not set(sent) & parameters
    assert len(set(sent)) == len(sent)


def test_parcels_before_are_sent_for_and_none_is_left_behind() -> None:
    model, order = decoder("dense"), []
    swap = swapped(model, layer_swap=[{"layers": True, "backward_prefetch": 1}])
    layer_of: dict[int, int] = {}
    current = [0]
    for number, layer in numbered(model).items():
        layer.register_forward_pre_hook(lambda m, a, number=number: current.__setitem__(0, number))

    def out(storage: torch.UntypedStorage) -> Any:
        layer_of[id(storage)] = current[0]
        return storage

    def back(host: torch.UntypedStorage) -> Any:
        order.append(layer_of[id(host)])
        return host

    swap.copy_engine.out, swap.copy_engine.back = out, back  # type: ignore[method-assign]
    step(model)
    assert order == sorted(order, reverse=True)
    gc.collect()
    assert swap._latest is not None
    assert swap._latest() is None


def test_recomputed_modules_are_not_offloaded_but_their_inputs_are() -> None:
    model = decoder("dense")
    layers, again = numbered(model), run_again(model, recompute=True)
    inner = SwapSection(swap=True, op_swap=[{"op_name": "mlp"}])
    swap = apply_offload(layers, offloaded_parts(layers, inner, again), CPU)
    outer = apply_offload(layers, offloaded_parts(layers, SwapSection(swap=True), again), CPU)
    gradients, _ = step(model)
    assert_same(gradients, plain("dense")[0])
    assert swap.moved_bytes == 0
    assert outer.moved_bytes == LAYERS * 2 * 24 * 64 * 4  # the input of each layer


def test_wrapping_does_not_change_parameter_names() -> None:
    model = decoder("experts")
    before = list(model.state_dict())
    run_again(model, recompute=True)
    swapped(model)
    interleave(model, 2)
    assert list(model.state_dict()) == before
    assert "self_attn.attend" in layer_modules(model.model.layers["0"])


ZERO_BUBBLE = {"pipeline_scheduler": "zero_bubble_v"}
LAYOUTS = [
    Case(dp=2, sharded=True, more=recompute(recompute=True)),
    Case("qwen3 moe", dp=2, ep=2, more=SWAP),
]
MORE_LAYOUTS = [
    Case(dp=2, sharded=True, more=recompute(recompute=True)),
    Case(dp=2, sharded=True, more=SWAP),
    Case("qwen3 moe", dp=2, sharded=True, more=recompute(recompute=True)),
    Case("qwen3 moe", dp=2, ep=2, more=SWAP),
    Case(tp=2, parallel=SEQUENCE, more=recompute(recompute=True)),
    Case(tp=2, more=recompute(select_recompute=["self_attn", "mlp"])),
    Case(cp=2, more=recompute(recompute=True, select_recompute_exclude=["mlp"])),
    Case(cp=2, parallel={"context_parallel_algo": "ulysses_cp"},
         more=recompute(select_recompute=[r"self_attention\.core_attention"])),
    Case(pp=2, more=recompute(recompute=[1, True])),
    Case("qwen3 moe", pp=2, pipeline=ZERO_BUBBLE,
         more=recompute(recompute=[[1, 0], [0, True]], select_recompute=True)),
    Case(pp=2, pipeline=ZERO_BUBBLE, more=SWAP),
]  # fmt: skip


def test_layouts(workshop: Workshop) -> None:
    check(workshop, LAYOUTS)


@pytest.mark.long
def test_more_layouts(workshop: Workshop) -> None:
    check(workshop, MORE_LAYOUTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recompute_config": {"select_recompute": ["feed_foward"]}},
            "recompute_config.select_recompute: 'feed_foward': the layers of this model have no "
            "such module. did you mean `feed_forward`?",
        ),
        (
            {"recompute_config": {"recompute": True, "select_recompute_exclude": ["attn"]}},
            "recompute_config.select_recompute_exclude: 'attn': the layers of this model have no "
            "such module.",
        ),
        (
            {"swap_config": {"swap": True, "op_swap": [{"op_name": r"mlp\.muul"}]}},
            r"swap_config.op_swap: 'mlp\\.muul': the layers of this model have no such module. did "
            "you mean `mlp.mul`?",
        ),
    ],
)
def test_patterns_that_match_nothing_end_the_run(
    workshop: Workshop, changes: dict[str, Any], message: str
) -> None:
    name = workshop.yaml(**changes)
    job = run_job(["--config", name, "--run_mode", "train"], workshop.folder)
    assert job.code == 2
    assert message in job.stderr + job.stdout
    assert "Traceback" not in job.stderr


def test_families_of_transformers_recompute_their_blocks(workshop: Workshop) -> None:
    dropped = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.1)
    sizes = {"type": "GPT2Config", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4,
             "n_positions": 128, **dropped}  # fmt: skip
    base = {**BASE, "model": {"model_config": sizes}}
    changes: dict[str, Any] = {"runner_config": {"max_steps": 4}, "callbacks": [],
                               "train_dataset": {"packing": False}}  # fmt: skip
    once = workshop.yaml("plain.yaml", base, output_dir="plain", **changes)
    more = recompute(recompute=True) | SWAP
    again = workshop.yaml("again.yaml", base, output_dir="again", **changes, **more)
    for name in (once, again):
        job = run_job(["--config", name, "--run_mode", "train"], workshop.folder)
        assert job.code == 0, job.stderr + job.stdout
    assert workshop.losses("plain") == workshop.losses("again")
    for more, what in (
        ({"recompute_config": {"select_recompute": True}}, "recompute_config.select_recompute"),
        (INTERLEAVED, "micro_batch_interleave_num"),
    ):
        name = workshop.yaml("refused.yaml", base, **changes, **more)
        job = run_job(["--config", name, "--run_mode", "train"], workshop.folder)
        assert job.code == 2
        assert f"{what}: not built for gpt2" in job.stderr + job.stdout
