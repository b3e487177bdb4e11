"""The keys and values of a text, used again for texts that begin like it."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.generation.loop import continue_tokens
from launcher.generation.prefix import PrefixCache
from launcher.generation.settings import GenerationSettings
from tests.models.tiny import DEEPSEEK, EXPERTS, dense_spec, pair

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig"},
    "window": {"type": "MistralConfig", "sliding_window": 6},
    "latent": {**EXPERTS["deepseek_v3"], **DEEPSEEK},
    "gpt-oss": EXPERTS["gpt_oss"],
    "dynamic": {
        "type": "LlamaConfig", "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_of_a_chat_are_what_they_are_from_the_beginning(name: str) -> None:
    model, _ = pair(dense_spec(**FAMILIES[name]))
    prefix, stopped = PrefixCache(), iter([False] * 3 + [True] + [False] * 99)

    def run(prompt: list[int], **arguments: Any) -> list[int]:
        settings = GenerationSettings(max_new_tokens=7)
        (new,) = continue_tokens(
            model, [prompt], settings, limits=[len(prompt) + 7], indices=[0], seed=0, device="cpu",
            **arguments,
        )  # fmt: skip
        return new

    text = [5, 9, 33, 40]
    for question in ([50, 51], [7], [80, 81, 82]):
        before = list(text)
        text += question
        new = run(text, prefix=prefix, watch=lambda _: next(stopped))
        assert run(text)[: len(new)] == new
        if name != "dynamic":  # its keys depend on the length of the text
            assert prefix.reused == (len(before) - 1 if len(before) > 4 else 0)
        text += new
    edited = [*text[:6], 11, 12]
    assert run(edited, prefix=prefix) == run(edited)
    assert prefix.reused == (0 if name == "dynamic" else 6)
    assert run(edited, prefix=prefix) == run(edited)  # the last token is always computed
    assert prefix.reused == (0 if name == "dynamic" else len(edited) - 1)
