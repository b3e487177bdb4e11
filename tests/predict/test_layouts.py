"""Tokens on every layout: greedy ones are those of transformers, sampled ones those of one rank."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from launcher.generation.forward import Forward
from launcher.generation.settings import GenerationSettings
from launcher.layout.mesh import Mesh
from models.decoder import Decoder
from models.families import DECODERS
from tests.models.tiny import EXPERTS, GLM, dense_spec, pair
from tests.predict.layouts import PROMPTS, Case, continued, run_cases
from tests.predict.test_generation import generated
from tests.ranks import run_ranks

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig"},
    "mistral": {"type": "MistralConfig", "sliding_window": 6},
    "qwen2": {"type": "Qwen2Config", "use_sliding_window": True, "sliding_window": 6,
              "max_window_layers": 1},
    "qwen3": {"type": "Qwen3Config", "head_dim": 16, "tie_word_embeddings": True},
    "telechat": {"type": "TelechatConfig"},
    **GLM,
    **EXPERTS,
}  # fmt: skip
"""A small model of each family."""
LAYOUTS: dict[str, dict[str, int]] = {
    "tp 2": {"tp": 2},
    "pp 2": {"pp": 2},
    "dp 2": {"dp_replicate": 2},
    "ep 2": {"dp_replicate": 2, "ep": 2},
    "tp 4": {"tp": 4},
    "pp 4": {"pp": 4},
    "ep 4": {"dp_replicate": 4, "ep": 4},
    "tp 2 x pp 2": {"tp": 2, "pp": 2},
    "dp 2 x tp 2": {"dp_replicate": 2, "tp": 2},
    "dp 2 x pp 2": {"dp_replicate": 2, "pp": 2},
    "ep 2 x tp 2": {"dp_replicate": 2, "ep": 2, "tp": 2},
    "ep 2 x pp 2": {"dp_replicate": 2, "ep": 2, "pp": 2},
    "dp 2 x ep 2": {"dp_replicate": 4, "ep": 2},
}
"""Axes of the mesh; `dp_replicate` are the ranks with other prompts, `ep` those that share experts.
"""
SETTINGS = {
    "greedy": GenerationSettings(max_new_tokens=8),
    "sampled": GenerationSettings(max_new_tokens=8, do_sample=True, temperature=1.4, top_k=30,
                                  top_p=0.95, repetition_penalty=1.1),
    # Texts end after different numbers of steps: replicas that share experts wait for each other.
    "ending": GenerationSettings(max_new_tokens=8, eos_token_ids=tuple(range(0, 96, 4))),
}  # fmt: skip


def alone(model: nn.Module) -> list[list[list[int]]]:
    """The texts of one process, for each of `SETTINGS`."""
    texts = [continued(Forward(model), setting, Mesh(), 0) for setting in SETTINGS.values()]
    return [[found[index] for index in range(len(PROMPTS))] for found in texts]


def check(ranks: int, families: Collection[str], layouts: Collection[str], folder: Path) -> None:
    """Texts of `families` on `layouts` of so many ranks."""
    cases: list[Case] = []
    expected: list[tuple[str, Any, int]] = []
    for family in families:
        own, texts = model_and_texts(family)
        file = folder / f"{family}.safetensors"
        save_file({name: t.contiguous() for name, t in own.state_dict().items()}, file)
        for layout in layouts:
            axes = LAYOUTS[layout]
            assert prod(n for axis, n in axes.items() if axis != "ep") == ranks
            if "ep" in axes and own.config.experts is None:
                continue
            cases.append(({**FAMILIES[family], "num_layers": 4}, str(file), axes))
            size = sum(parameter.numel() for parameter in own.parameters())
            expected.append((f"{family}, {layout}", texts, size))
    of_ranks = run_ranks(ranks, run_cases, cases, list(SETTINGS.values()))
    for index, (name, texts, parameters) in enumerate(expected):
        for found, held in (results[index] for results in of_ranks):
            assert dict(zip(SETTINGS, found, strict=True)) == dict(
                zip(SETTINGS, texts, strict=True)
            ), name
            if name.endswith(("pp 2", "pp 4")):
                assert held < 0.8 * parameters, name


def model_and_texts(family: str) -> tuple[Decoder, Any]:
    """A model of `family`, and its texts for each of `SETTINGS`; greedy ones by transformers."""
    spec = dense_spec(**{**FAMILIES[family], "num_layers": 4})
    if not DECODERS[spec.family].in_transformers:
        assert spec.decoder is not None
        torch.manual_seed(0)
        own = Decoder(spec.decoder, spec.precision)
        for parameter in own.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return own, alone(own)
    own, module = pair(spec)
    greedy = [generated(module, p, max_new_tokens=8, do_sample=False) for p in PROMPTS]
    texts = alone(own)
    assert texts[0] == greedy, family
    return own, texts


def of_size(ranks: int) -> list[str]:
    """Names of the layouts of so many ranks."""
    sizes: Mapping[str, int] = {
        name: prod(n for axis, n in axes.items() if axis != "ep") for name, axes in LAYOUTS.items()
    }
    return [name for name, size in sizes.items() if size == ranks]


def test_every_family_has_a_case() -> None:
    assert set(FAMILIES) == set(DECODERS)


def test_texts_on_four_ranks_are_those_of_transformers(tmp_path: Path) -> None:
    layouts = ["tp 4", "tp 2 x pp 2", "ep 2 x tp 2", "ep 2 x pp 2"]
    check(4, ["qwen3", "qwen3_moe"], layouts, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_texts_of_all_families_on_all_layouts(ranks: int, tmp_path: Path) -> None:
    check(ranks, list(FAMILIES), of_size(ranks), tmp_path)
