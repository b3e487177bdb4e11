"""Tokens per second of generation, against `transformers.generate` on the same weights.

    python -m benchmarks.decoding [--rounds 9] [--models tiny 100M] [--dtypes float32 bfloat16]
                                  [--rows 1 8] [--new 128] [--threads 2] [--products] [--write]

Both continue the same random prompts of 128 tokens by the likeliest tokens, without an end token,
in one process and in turns, with the same weights and number of threads; time runs from the prompts
to the last token. With --products instead: how fast one product reads its weights, in GB/s, by
`F.linear` and by the kernel of inference (`models/products.py`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import Spread, in_turns, parser, ratios, report, table
from launcher.generation.loop import continue_tokens
from launcher.generation.settings import GenerationSettings
from models.build import build_model
from models.families import model_spec
from models.products import linear

PROMPT = 128
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "type": "Qwen3Config", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768,
        "num_layers": 4, "num_heads": 8, "n_kv_heads": 4, "head_dim": 32,
        "tie_word_embeddings": True, "max_position_embeddings": 4096,
    },
    "100M": {
        "type": "LlamaConfig", "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
        "num_layers": 12, "num_heads": 12, "n_kv_heads": 4, "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    },
}  # fmt: skip
HEADER = (
    "model", "dtype", "rows", "Slipway, tokens/s", "transformers, tokens/s",
    "ratio (above 1: Slipway is faster)", "same tokens",
)  # fmt: skip
SHAPES = [(768, 768), (768, 2048), (2048, 768), (768, 32000)]
"""(inputs, outputs) of the products that are measured."""


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.decoding", __doc__, rounds=9)
    add = arguments_parser.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--rows", type=int, nargs="+", default=[1, 8])
    add("--new", type=int, default=128, help="tokens that are generated")
    add("--threads", type=int, default=2)
    add("--products", action="store_true")
    arguments = arguments_parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.products:
        report("Products of decoding", "benchmarks.decoding --products", arguments, products())
    else:
        report("Decoding", "benchmarks.decoding", arguments, decoding(arguments))


def decoding(arguments: argparse.Namespace) -> str:
    """One line for each model, dtype and number of rows."""
    lines = []
    for name in arguments.models:
        for dtype in arguments.dtypes:
            own, theirs = pair(MODELS[name], getattr(torch, dtype))
            for rows in arguments.rows:
                compared = compare(own, theirs, rows, arguments.new, arguments.rounds)
                lines.append((name, dtype, str(rows), *compared))
    return table(HEADER, lines)


def pair(config: dict[str, Any], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(decoder, module of transformers) with equal random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    spec = model_spec(config, None)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec.hf_config)).to(dtype)
    state = theirs.state_dict()
    state.pop("lm_head.weight", None)
    own = build_model(spec, dtype=dtype, device="cpu")
    own.load_state_dict(state, strict=True)
    return own.eval(), theirs.eval()


def compare(own: nn.Module, theirs: nn.Module, rows: int, new: int, rounds: int) -> tuple[str, ...]:
    """Speeds, ratio, and the share of the tokens that are the same, as text."""
    vocabulary = next(own.parameters()).shape[0]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (rows, PROMPT), generator=generator).tolist()
    ours = partial(by_slipway, own, prompts, new)
    others = partial(by_transformers, theirs, prompts, new)
    pairs = [a == b for mine, its in zip(ours(), others(), strict=True)
             for a, b in zip(mine, its, strict=True)]  # fmt: skip
    speeds = in_turns(
        {"Slipway": partial(rate, ours), "transformers": partial(rate, others)},
        rounds, warm_up=False,
    )  # fmt: skip
    return (
        *(Spread.of(values).text(",.1f") for values in speeds.values()),
        ratios(speeds["Slipway"], speeds["transformers"]).text(),
        f"{sum(pairs) / len(pairs):.0%}",
    )


def rate(generate: Callable[[], list[list[int]]]) -> float:
    """New tokens a second, of all rows together."""
    started = time.perf_counter()
    made = generate()
    return sum(map(len, made)) / (time.perf_counter() - started)


def by_slipway(model: nn.Module, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The likeliest continuations."""
    limits = [len(prompt) + new for prompt in prompts]
    settings = GenerationSettings(max_new_tokens=new)
    return continue_tokens(
        model, prompts, settings, limits=limits, indices=range(len(prompts)), seed=0, device="cpu"
    )


def by_transformers(model: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """As `by_slipway`."""
    from transformers import GenerationConfig

    ids = torch.tensor(prompts)
    config = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    texts = model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config
    )  # fmt: skip
    return texts[:, ids.shape[1] :].tolist()


def products() -> str:
    """How fast weights are read by one product after the other, too many for the caches."""
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        for inputs, outputs in SHAPES:
            count = max(2, 300_000_000 // (inputs * outputs * dtype.itemsize))
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
            for rows in (1, 8):
                states = torch.randn(rows, inputs).to(dtype)
                measures = {
                    name: partial(read_speed, product, states, weights)
                    for name, product in (("F.linear", F.linear), ("inference", linear))
                }
                speeds = in_turns(measures, 9)
                lines.append((
                    f"{rows} x {inputs} x {outputs}", str(dtype).removeprefix("torch."),
                    *(Spread.of(values).text(".1f") for values in speeds.values()),
                    ratios(speeds["inference"], speeds["F.linear"]).text(),
                ))  # fmt: skip
    return table(("product", "dtype", "F.linear, GB/s", "inference, GB/s", "ratio"), lines)


@torch.inference_mode()
def read_speed(product: Callable[..., Any], states: torch.Tensor, weights: list[Any]) -> float:
    """GB/s of the weights."""
    started = time.perf_counter()
    for weight in weights:
        product(states, weight)
    return sum(w.nbytes for w in weights) / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    main()
