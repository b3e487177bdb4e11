"""Generation with a module of transformers, by its own `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from launcher.generation.draw import draw_seed
from launcher.generation.settings import GenerationSettings
from models.transformers_model import TransformersModel


def continue_with_transformers(
    model: TransformersModel, prompt: Sequence[int], settings: GenerationSettings, limit: int,
    index: int, seed: int, device: torch.device | str,
    watch: Callable[[int], bool] | None = None,
) -> list[int]:  # fmt: skip
    """The new tokens of one prompt; `index` is its index among all, for random draws.

    `watch` is called with each new token and returns whether to stop.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    sampling: dict[str, Any] = {}
    if settings.do_sample:
        sampling = {"temperature": settings.temperature, "top_k": settings.top_k,
                    "top_p": settings.top_p, "min_p": settings.min_p,
                    "typical_p": settings.typical_p, "epsilon_cutoff": settings.epsilon_cutoff,
                    "eta_cutoff": settings.eta_cutoff}  # fmt: skip
    config = GenerationConfig(
        max_length=limit,
        min_length=settings.min_length,
        min_new_tokens=settings.min_new_tokens,
        do_sample=settings.do_sample,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        bad_words_ids=settings.bad_words_ids,
        suppress_tokens=settings.suppress_tokens,
        begin_suppress_tokens=settings.begin_suppress_tokens,
        eos_token_id=list(settings.eos_token_ids) or None,
        pad_token_id=settings.pad_token_id,
        **sampling,
    )
    ids = torch.tensor([list(prompt)], device=device)
    stoppers: list[Any] = [_stopper(watch)] if watch else []
    with torch.random.fork_rng():
        torch.manual_seed(draw_seed(seed, index, 0))
        text = cast(Any, model.wrapped).generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config,
            stopping_criteria=StoppingCriteriaList(stoppers),
        )  # fmt: skip
    return text[0, len(prompt) :].tolist()


def _stopper(watch: Callable[[int], bool]) -> Callable[..., torch.Tensor]:
    """A stopping criterion of transformers: called with the ids [1, length] after each step."""

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        stopped = watch(int(ids[0, -1]))
        return torch.full((len(ids),), stopped, dtype=torch.bool, device=ids.device)

    return stop
