"""Generation with a module of transformers, by its own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from launcher.generation.draw import draw_seed
from launcher.generation.settings import GenerationSettings
from models.transformers_model import TransformersModel

_ALWAYS = (
    "min_length", "min_new_tokens", "do_sample", "repetition_penalty", "no_repeat_ngram_size",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "max_time", "pad_token_id",
)  # fmt: skip
_SAMPLED = (
    "temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
"""Settings that `GenerationConfig` has under the same name."""


def continue_with_transformers(
    model: TransformersModel, prompt: Sequence[int], settings: GenerationSettings, limit: int,
    index: int, seed: int, device: torch.device | str,
    watch: Callable[[int], bool] | None = None, tokenizer: Any = None,
) -> list[int]:  # fmt: skip
    """The new tokens of one prompt; `index`: see `launcher.generation.draw`.

    `watch` is called with each new token and returns whether to stop. `tokenizer`: needed with
    `settings.stop_strings`.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    names = _ALWAYS + (_SAMPLED if settings.do_sample else ())
    config = GenerationConfig(
        max_length=limit,
        eos_token_id=list(settings.eos_token_ids) or None,
        stop_strings=list(settings.stop_strings) or None,
        **{name: getattr(settings, name) for name in names},
    )
    ids = torch.tensor([list(prompt)], device=device)
    stoppers: list[Any] = [_stopper(watch)] if watch else []
    gpus = [ids.device] if ids.is_cuda else []  # not those of other processes
    with torch.random.fork_rng(gpus):
        torch.manual_seed(draw_seed(seed, index, 0))
        text = cast(Any, model.wrapped).generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config,
            stopping_criteria=StoppingCriteriaList(stoppers),
            tokenizer=tokenizer,
        )  # fmt: skip
    return text[0, len(prompt) :].tolist()


def _stopper(watch: Callable[[int], bool]) -> Callable[..., torch.Tensor]:
    """A stopping criterion of transformers: called with the ids [1, length] after each step."""

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stopped = watch(int(ids[0, -1]))
        return torch.full((len(ids),), stopped, dtype=torch.bool, device=ids.device)

    return stop
