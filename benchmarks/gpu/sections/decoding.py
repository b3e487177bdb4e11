"""New tokens a second, of this launcher and of `generate` with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.gpu.driver import Bench, Case, Figures
from benchmarks.gpu.peers import transformers_directory
from benchmarks.gpu.sections.files import loaded, predict_job
from launcher.generation.loop import continue_tokens
from launcher.generation.settings import GenerationSettings

Continue = Callable[[list[list[int]]], Sequence[Sequence[int]]]
"""From prompts to their new tokens."""


def decode(bench: Bench) -> Iterator[Case]:
    """1B in bfloat16, the likeliest tokens, without an end token."""
    directory = transformers_directory(bench, bench.sizes.train_1b)
    for rows in bench.sizes.batches:
        yield Case(
            f"Slipway, {rows}", lambda rows=rows: _speed(bench, rows, ours(bench, directory))
        )
        yield Case(
            f"generate, {rows}", lambda rows=rows: _speed(bench, rows, theirs(bench, directory))
        )
        if bench.on_cuda:
            yield Case(
                f"generate, static cache and compile, {rows}",
                lambda rows=rows: _speed(bench, rows, theirs(bench, directory, static=True)),
            )


def ours(bench: Bench, directory: str) -> Continue:
    """This launcher, as `predict` builds it."""
    forward = loaded(predict_job(bench, directory))
    settings = GenerationSettings(max_new_tokens=bench.sizes.new_tokens)

    def run(prompts: list[list[int]]) -> Sequence[Sequence[int]]:
        limits = [len(prompt) + bench.sizes.new_tokens for prompt in prompts]
        return continue_tokens(
            forward, prompts, settings, limits=limits, indices=range(len(prompts)), seed=0,
            device=bench.device,
        )  # fmt: skip

    return run


def theirs(bench: Bench, directory: str, *, static: bool = False) -> Continue:
    """transformers; `static`: with its static cache, which makes it compile the decoding step."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, device_map=str(bench.device)
    )
    more: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    new = bench.sizes.new_tokens
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, **more
    )

    def run(prompts: list[list[int]]) -> Sequence[Sequence[int]]:
        ids = torch.tensor(prompts, device=bench.device)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config
        )  # fmt: skip
        found: list[list[int]] = made[:, ids.shape[1] :].tolist()
        return found

    return run


def _speed(bench: Bench, rows: int, run: Continue) -> Figures:
    """Of the second call: the first one allocates, records and compiles."""
    vocabulary = bench.sizes.train_1b.model["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(
        3, vocabulary, (rows, bench.sizes.prompt), generator=generator
    ).tolist()
    begun = bench.now()
    run(prompts)
    started = bench.now()
    made = run(prompts)
    seconds = bench.now() - started
    return {
        "new_tokens_per_second": sum(map(len, made)) / seconds,
        "first_call_seconds": started - begun,
        "tokens": list(made[0][:8]),
    }
