"""Initial values: the same as ever, for any family, layout, dtype and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import xxhash

from launcher.layout.box import Box, full_box
from launcher.layout.shard import Shard
from launcher.streams import STREAMS
from models.build import build_model, initialize, initialize_shard
from models.families import model_spec
from models.initial import Drawn, initial_blocks, narrowed
from models.initialize import fill_initial
from models.spec import ModelSpec
from tests.models.tiny import IN_TRANSFORMERS, WITH_CODE_OF_THEIR_OWN, experts_spec, module_spec
from tests.streams import LateStreams

VALUES = {
    "llama": "256097b22efdc816", "mistral": "256097b22efdc816", "qwen2": "6521710cc651e9c1",
    "qwen3": "f0073710aee4c28d", "qwen3_moe": "c08930005f0b4969", "mixtral": "2bf6191953d251f0",
    "deepseek_v3": "b3be09764273bb6a", "glm": "6521710cc651e9c1", "glm4": "c947c4dad1291d43",
    "glm4_moe": "910f3879ac4f5924", "gpt_oss": "f2a4a604430226ca", "telechat": "a7534566ff89f3fc",
    "gpt_neox": "a685a460a7dc7b5e", "gpt2": "8ac4c3f1f9d5c3c0", "mamba2": "7485bb8696ee2e6d",
    "nanochat": "05e850189b7d4958", "falcon_h1": "eab8f96ea8c78f53",
}  # fmt: skip
"""xxh3_64 of the parameters of a small model, by family. Recorded when one thread drew all values
of a tensor: a later version must give the same model for the same seed."""
ROWS = 600
"""More than two blocks of rows."""


def specs() -> Iterator[tuple[str, ModelSpec]]:
    for family, config in WITH_CODE_OF_THEIR_OWN.items():
        yield family, model_spec({}, config | {"vocab_size": ROWS})
    for family in {*IN_TRANSFORMERS, *VALUES} - WITH_CODE_OF_THEIR_OWN.keys():
        yield family, module_spec(family, vocab_size=ROWS)


def test_values_of_every_family_do_not_change() -> None:
    found = dict[str, str]()
    for family, spec in specs():
        model = build_model(spec, dtype=torch.float32, device="cpu")
        initialize(model, spec, 11)
        hasher = xxhash.xxh3_64()
        for name, parameter in sorted(model.named_parameters()):
            hasher.update(name.encode())
            hasher.update(parameter.detach().numpy().tobytes())
        found[family] = hasher.hexdigest()
    assert found == VALUES


def shards(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Shard]:
    """Shards as ranks hold them: all of a tensor, some rows, some columns, an expert of a stack, a
    part that is not contiguous."""

    def part(name: str, shape: tuple[int, ...], box: Box, like: torch.Tensor) -> tuple[str, Shard]:
        return name, Shard(shape, box, like)

    def empty(*size: int) -> torch.Tensor:
        return torch.full(size, float("nan"), dtype=dtype)

    stack = "model.layers.0.mlp.experts.up_proj"
    return dict([
        part("lm_head.weight", (ROWS, 8), full_box((ROWS, 8)), empty(ROWS, 8)),
        part("a.q_proj.weight", (ROWS, 8), Box((100, 0), (400, 8)), empty(400, 8)),
        part("b.q_proj.weight", (ROWS, 8), Box((0, 2), (ROWS, 5)), empty(ROWS, 5)),
        part("c.q_proj.weight", (ROWS, 8), Box((10, 0), (300, 8)), empty(8, 300).t()),
        part("d.q_proj.weight", (ROWS, 8), Box((10, 0), (0, 8)), empty(0, 8)),
        part("q_proj.bias", (ROWS,), Box((3,), (100,)), empty(100)),
        part("norm.weight", (ROWS,), full_box((ROWS,)), empty(ROWS)),
        part("x.lora_A.weight", (ROWS, 8), full_box((ROWS, 8)), empty(ROWS, 8)),
        part("x.lora_B.weight", (ROWS, 8), full_box((ROWS, 8)), empty(ROWS, 8)),
        part(stack, (4, ROWS, 8), Box((1, 200, 0), (2, 400, 8)), empty(2, 400, 8)),
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("on_device", [False, True])
def test_shards_are_filled_alike_on_any_device_and_number_of_threads(
    dtype: torch.dtype, threads: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, streams = experts_spec("qwen3_moe"), LateStreams()
    held = shards(spec, dtype)
    if on_device:
        monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    fill_initial(held, spec, 5, threads=threads)
    for name, shard in held.items():
        values = initialize_shard(name, shard.shape, shard.box.offset, shard.box.size, spec, 5)
        assert torch.equal(shard.tensor, values.to(dtype)), name
    if on_device:
        sizes = [call.detail for call in streams.calls if call.what == "pinned"]
        block = 256 * 8 * dtype.itemsize
        assert max(sizes) <= block, "no more than a block of rows is in host memory"
        assert len(sizes) <= 2 * threads, "buffers are used again"
        assert "MainThread" in streams.threads("wait for current")
    else:
        assert not streams.calls


def test_blocks_cover_a_box_once() -> None:
    spec = experts_spec("qwen3_moe")
    for name, shard in shards(spec, torch.float32).items():
        counts = torch.zeros(shard.box.size)
        for block in initial_blocks(name, shard.shape, shard.box, spec, 0):
            narrowed(counts, block.region).add_(1)
        assert torch.equal(counts, torch.ones(shard.box.size)), name


def test_an_error_of_a_thread_leaves_no_copy_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, streams = experts_spec("qwen3_moe"), LateStreams()
    monkeypatch.setitem(STREAMS, "cpu", lambda device: streams)
    monkeypatch.setattr(Drawn, "_draw", fail_after(3, Drawn._draw))
    with pytest.raises(MemoryError):
        fill_initial(shards(spec, torch.float32), spec, 0, threads=2)
    assert "copy" in streams.whats()
    assert streams.pending == 0


def fail_after(count: int, function: Callable[..., None]) -> Callable[..., None]:
    left = iter(range(count))

    def called(*arguments: object) -> None:
        if next(left, None) is None:
            raise MemoryError
        function(*arguments)

    return called
