"""Keeping less for the backward pass, or elsewhere: the same gradients to the bit, less kept."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from launcher.config.schema.parallel import RecomputeSection, SwapSection
from launcher.errors import UserError
from launcher.parallel import swap as swaps
from launcher.parallel.interleave import cut, interleave
from launcher.parallel.pieces import check_patterns, layers_chosen, matching, names_in, pieces
from launcher.parallel.recompute import CHEAP, apply_recompute, recompute_plan, recomputed_pieces
from launcher.parallel.swap import Swap, apply_swap, swapped_pieces
from models.attention import Sight, StepContext
from models.decoder import Decoder
from models.spec import ModelSpec
from models.stage import StageSplit
from tests.models.tiny import dense_spec, experts_spec, tokens
from tests.parallel.parity import Case, assert_equal, run_cases
from tests.workshop import Workshop

LAYERS = 3
ALONE = StageSplit((range(LAYERS),), (0,))
CPU = torch.device("cpu")
SPECS: dict[str, Callable[[], ModelSpec]] = {
    "dense": lambda: dense_spec(
        type="Qwen3Config", head_dim=16, hidden_dropout=0.1, attention_dropout=0.1
    ),
    "experts": lambda: experts_spec("qwen3_moe"),
    "latent": lambda: experts_spec("deepseek_v3"),
}


def decoder(name: str) -> Decoder:
    """The same numbers at each call."""
    spec = SPECS[name]()
    assert spec.decoder is not None
    model = Decoder(spec.decoder, spec.precision)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise + (parameter.ndim == 1))
        for buffer in model.buffers():
            buffer.zero_()
    return model.train()


def numbered(model: Decoder) -> dict[int, nn.Module]:
    return {int(number): layer for number, layer in model.model.layers.items()}


def run_again(model: Decoder, **section: Any) -> dict[int, list[str]]:
    layers = numbered(model)
    names = recomputed_pieces(layers, recompute_plan(RecomputeSection(**section), ALONE))
    apply_recompute(layers, names)
    return names


def step(model: Decoder) -> tuple[dict[str, Tensor], dict[int, int]]:
    """Gradients, and the storages that were kept for them, parameters apart: address to bytes."""
    ids, kept = tokens(2, 24), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ids, sample_seeds=torch.tensor([5, 6]), balance_scale=torch.tensor(0.01))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1)[:-1], ids.flatten()[1:])
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, kept  # type: ignore[misc]


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[dict[str, Tensor], int]]:
    """Gradients, and bytes kept, of each model that keeps everything."""
    return {name: _with_sum(*step(decoder(name))) for name in SPECS}


def _with_sum(gradients: dict[str, Tensor], kept: dict[int, int]) -> tuple[Any, int]:
    return gradients, sum(kept.values())


def assert_same(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    wrong = [name for name in expected if not torch.equal(gradients[name], expected[name])]
    assert not wrong, wrong


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
    plain: Any, model_name: str, section: dict[str, Any], most: float
) -> None:
    """`most`: the largest share of what is kept otherwise."""
    model = decoder(model_name)
    run_again(model, **section)
    gradients, kept = step(model)
    expected, everything = plain[model_name]
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
    first_ids = kept[:1]  # what the embedding keeps
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
def test_layers_chosen_by_entries_of_two_ranks_with_two_stages(value: Any, layers: Any) -> None:
    loop = StageSplit((range(2), range(2, 4), range(4, 6), range(6, 8)), (0, 1, 0, 1))
    assert layers_chosen(value, loop) == set(layers)


def test_entries_of_a_v_belong_to_ranks() -> None:
    there_and_back = StageSplit((range(2), range(2, 4), range(4, 6), range(6, 8)), (0, 1, 1, 0))
    assert layers_chosen([[1, 0], [2, 0]], there_and_back) == {0, 6, 7}


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
def test_names_of_mindformers_mean_our_pieces(pattern: str, names: set[str]) -> None:
    assert matching(pattern, names_in(list(numbered(decoder("dense")).values()))) == names


def test_experts_have_activations_too() -> None:
    names = names_in(list(numbered(decoder("latent")).values()))
    assert matching(CHEAP[1], names) == {
        "mlp.activation", "mlp.experts.activation", "mlp.shared_experts.activation"
    }  # fmt: skip
    assert matching(r"mlp\.shared_experts\.mul", names) == {"mlp.shared_experts.activation"}


def test_a_pattern_without_a_piece_is_an_error() -> None:
    names = names_in(list(numbered(decoder("dense")).values()))
    with pytest.raises(UserError) as error:
        check_patterns("recompute_config.select_recompute", ["feed_foward"], names, _line)
    assert str(error.value) == (
        "x.yaml:3: recompute_config.select_recompute: 'feed_foward': the layers of this model have "
        "no such piece. did you mean `feed_forward`?"
    )
    assert check_patterns("x", [r"feed_forward\.w1\.reshape", "add", "mlp"], names, _line) == [
        r"feed_forward\.w1\.reshape", "add"
    ]  # fmt: skip


def _line(key: str) -> str:
    return "x.yaml:3"


def swapped(model: Decoder, **section: Any) -> Swap:
    layers = numbered(model)
    kept = dict.fromkeys(layers, ())
    return apply_swap(layers, swapped_pieces(layers, SwapSection(swap=True, **section), kept), CPU)


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
    plain: Any, monkeypatch: pytest.MonkeyPatch, model_name: str, section: Any, most: float
) -> None:
    carrier = Copying()
    monkeypatch.setattr(swaps, "carrier_for", lambda device: carrier)
    model = decoder(model_name)
    swap = swapped(model, **section)
    gradients, kept = step(model)
    expected, everything = plain[model_name]
    assert_same(gradients, expected)
    stays = sum(kept.values())
    assert stays <= most * everything
    assert stays + swap.moved_bytes <= everything
    assert carrier.sent == swap.moved_bytes == carrier.brought


class Copying(swaps.Carrier):
    """Really copies, as to and from a device, and counts."""

    def __init__(self) -> None:
        self.sent = self.brought = 0

    def out(self, storage: torch.UntypedStorage) -> Any:
        self.sent += storage.nbytes()
        return storage.clone()

    def back(self, host: Any) -> Any:
        self.brought += host.nbytes()
        return host.clone()


def test_parameters_and_shared_tables_stay() -> None:
    model = decoder("dense")
    swap = swapped(model)
    sent: list[int] = []

    def note(storage: torch.UntypedStorage) -> Any:
        sent.append(storage.data_ptr())
        return storage

    swap.carrier.out = note  # type: ignore[method-assign]
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

    swap.carrier.out, swap.carrier.back = out, back  # type: ignore[method-assign]
    step(model)
    assert order == sorted(order, reverse=True)
    gc.collect()
    assert swap._latest is not None
    assert swap._latest() is None


def test_what_runs_again_is_not_swapped_but_what_it_keeps_is(plain: Any) -> None:
    model = decoder("dense")
    layers, again = numbered(model), run_again(model, recompute=True)
    inner = SwapSection(swap=True, op_swap=[{"op_name": "mlp"}])
    swap = apply_swap(layers, swapped_pieces(layers, inner, again), CPU)
    outer = apply_swap(layers, swapped_pieces(layers, SwapSection(swap=True), again), CPU)
    gradients, _ = step(model)
    assert_same(gradients, plain["dense"][0])
    assert swap.moved_bytes == 0
    assert outer.moved_bytes == LAYERS * 2 * 24 * 64 * 4  # the states each layer was given


@pytest.mark.parametrize("model_name", SPECS)
@pytest.mark.parametrize("recompute", [False, True])
def test_copies_that_take_turns_give_the_same_gradients(
    plain: Any, model_name: str, recompute: bool
) -> None:
    model = decoder(model_name)
    run_again(model, recompute=recompute)
    interleave(model, 2)
    gradients, _ = step(model)
    for name, expected in plain[model_name][0].items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)


def test_rows_that_do_not_divide_run_as_one() -> None:
    model = decoder("dense")
    interleave(model, 2)
    assert torch.equal(model.eval()(tokens(3, 9)), decoder("dense").eval()(tokens(3, 9)))


def test_each_copy_has_its_rows_of_the_context() -> None:
    rows, total = 4, 6
    documents = torch.arange(rows * total).view(rows, total)
    sight = Sight(length=total, total=total, device=CPU, document_ids=documents)
    context = StepContext(
        cos=torch.arange(rows).view(rows, 1, 1, 1), sin=torch.zeros(1, 1, total, 2), sight=sight,
        dropout_seeds=torch.arange(rows),
    )  # fmt: skip
    first, second = cut(context, rows, 2)
    assert first.cos.flatten().tolist() == [0, 1]
    assert second.cos.flatten().tolist() == [2, 3]
    assert second.sin is context.sin
    assert second.dropout_seeds is not None
    assert second.dropout_seeds.tolist() == [2, 3]
    assert torch.equal(second.sight.document_ids, documents[2:])  # type: ignore[arg-type]
    assert torch.equal(sight.mask(None)[2:], second.sight.mask(None))  # type: ignore[index, arg-type]


def recompute(**section: Any) -> dict[str, Any]:
    return {"recompute_config": section}


def test_every_piece_has_the_parameter_names_it_had() -> None:
    model = decoder("experts")
    before = list(model.state_dict())
    run_again(model, recompute=True)
    swapped(model)
    interleave(model, 2)
    assert list(model.state_dict()) == before
    assert "self_attn.attend" in pieces(model.model.layers["0"])


SWAP = {"swap_config": {"swap": True}}
COPIES = {"micro_batch_interleave_num": 2}
SEQUENCE = {"use_seq_parallel": True}
ZERO_BUBBLE = {"pipeline_scheduler": "zero_bubble_v"}
LAYOUTS = [
    Case(dp=2, sharded=True, batch=2, more={**COPIES, **recompute(select_recompute=True)}),
    Case("qwen3 moe", dp=2, ep=2, batch=2, more={**COPIES, **SWAP, **recompute(recompute=True)}),
    Case(tp=2, parallel=SEQUENCE, batch=4, more={**COPIES, **recompute(recompute=[2]), **SWAP}),
]
MORE_LAYOUTS = [
    Case(dp=2, sharded=True, more=recompute(recompute=True)),
    Case(dp=2, sharded=True, batch=2, more=COPIES),
    Case(dp=2, batch=2, more=COPIES),
    Case(dp=2, sharded=True, more=SWAP),
    Case("qwen3 moe", dp=2, sharded=True, more=recompute(recompute=True)),
    Case("qwen3 moe", dp=2, ep=2, more=SWAP),
    Case("deepseek", dp=2, batch=2, more={**COPIES, **SWAP, **recompute(select_recompute=True)}),
    Case(tp=2, parallel=SEQUENCE, more=recompute(recompute=True)),
    Case(tp=2, more=recompute(select_recompute=["self_attn", "mlp"])),
    Case(cp=2, more=recompute(recompute=True, select_recompute_exclude=["mlp"])),
    Case(cp=2, batch=4, more={**COPIES, **recompute(recompute=True)}),
    Case(cp=2, parallel={"context_parallel_algo": "ulysses_cp"},
         more=recompute(select_recompute=[r"self_attention\.core_attention"])),
    Case(pp=2, more=recompute(recompute=[1, True])),
    Case(pp=2, batch=1, more={**COPIES, **SWAP}),
    Case("qwen3 moe", pp=2, pipeline=ZERO_BUBBLE,
         more=recompute(recompute=[[1, 0], [0, True]], select_recompute=True)),
    Case(pp=2, pipeline=ZERO_BUBBLE, more=SWAP),
]  # fmt: skip


def check(workshop: Workshop, cases: list[Case], tolerance: float = 1e-5) -> None:
    """Each case agrees with one process that keeps everything."""
    alone = [case.alone() for case in cases]
    outcomes = run_cases(workshop, alone + cases, timeout=240)
    for case, reference, outcome in zip(cases, outcomes, outcomes[len(cases) :], strict=False):
        assert_equal(case, outcome, reference[0], tolerance)


def test_layouts(workshop: Workshop) -> None:
    check(workshop, LAYOUTS)


@pytest.mark.long
def test_more_layouts(workshop: Workshop) -> None:
    check(workshop, MORE_LAYOUTS)
