"""What others do with the same work: a plain loop of PyTorch, transformers, torchtitan.

The plain loop has the same module and none of this launcher's wrappers: no FSDP, no loss of its own
and no exactness; autocast, layers compiled one by one, scaled dot product attention as PyTorch
chooses it, `F.cross_entropy`, fused AdamW. It is what a good engineer writes in an afternoon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.driver import Bench
from benchmarks.gpu.runs import LEARNING_RATE, fill_parameter
from benchmarks.gpu.sizes import Training
from models.build import build_model
from models.decoder import Decoder
from models.families import model_spec

Step = Callable[[], Tensor]
"""One optimizer step on random tokens; its loss."""


def plain_loop(bench: Bench, size: Training, *, dtype: torch.dtype, compiled: bool) -> Step:
    """A step of the plain loop with weights of `dtype`, computing in bfloat16."""
    model = build_model(model_spec(size.model, None), dtype=dtype, device=bench.device)
    assert isinstance(model, Decoder)
    _fill(model, bench)
    if compiled:
        for layer in model.decoder_layers():
            layer.compile()
    return _step(bench, size, model)


def torchtitan_loop(bench: Bench, size: Training) -> Step:
    """The same loop around torchtitan's Llama 3 with its own attention, its layers compiled.

    Raises ImportError where torchtitan is not installed, or has another interface.
    """
    from importlib import import_module

    # As in torchtitan 0.3: name of a size -> builder of its configuration.
    configs: dict[str, Any] = import_module("torchtitan.models.llama3").llama3_configs
    flavor = {16: "1B", 32: "8B"}.get(size.model["num_hidden_layers"], "debugmodel")
    config = configs[flavor]("sdpa")
    with torch.device(bench.device):
        model = config.build()
    _fill(model, bench)
    if bench.on_cuda:
        for layer in model.layers.values():
            layer.compile()
    return _step(bench, size, model, min(size.model["vocab_size"], config.vocab_size))


@torch.no_grad()
def _fill(model: nn.Module, bench: Bench) -> None:
    generator = torch.Generator(bench.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        fill_parameter(name, parameter, generator)


def _step(bench: Bench, size: Training, model: nn.Module, vocabulary: int | None = None) -> Step:
    vocabulary = size.model["vocab_size"] if vocabulary is None else vocabulary
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    shape = (size.rows, size.length + 1)
    tokens = torch.randint(vocabulary, shape, device=bench.device)
    model.train()

    def step() -> Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def transformers_directory(bench: Bench, size: Training) -> str:
    """A directory with bfloat16 weights of this size in the files of transformers; made once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = bench.folder / "weights"
    if not (folder / "config.json").exists():
        spec = model_spec(size.model, None)
        config = AutoConfig.for_model(**spec.hf_config)
        with torch.device(bench.device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        _tokenizer(min(config.vocab_size, 1000)).save_pretrained(folder)
    return str(folder)


def _tokenizer(vocabulary: int) -> Any:
    """A tokenizer of words, which a directory with weights must have."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w0"
    )
