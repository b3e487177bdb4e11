"""The loop against transformers.generate, and its independence of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.errors import UserError
from launcher.generation.forward import Forward
from launcher.generation.loop import continue_tokens
from launcher.generation.sampling import processors_of
from launcher.generation.settings import GenerationSettings, generation_settings, token_limits
from models.build import build_model
from models.cache import KVCache
from tests.models.tiny import EXPERTS, GLM, dense_spec, module_spec, oracle, pair
from tests.predict.tiny_tokenizer import tiny_tokenizer

PROMPTS = [[5, 9, 33, 40], [7], [50, 51, 52, 53, 54, 55, 56], [80, 3, 11]]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"type": "LlamaConfig"},
    "mistral window": {"type": "MistralConfig", "sliding_window": 6},
    "qwen2 window": {
        "type": "Qwen2Config", "use_sliding_window": True, "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3 tied": {"type": "Qwen3Config", "head_dim": 16, "tie_word_embeddings": True},
    "llama dynamic": {
        "type": "LlamaConfig", "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "glm": EXPERTS["glm4_moe"],
    "glm 9b": GLM["glm"],
    "glm 0414": GLM["glm4"],
    "gpt-oss": EXPERTS["gpt_oss"],
}  # fmt: skip


def run(
    model: nn.Module | Forward, settings: GenerationSettings, prompts: list[list[int]] = PROMPTS,
    *, batch_size: int = 4, seed: int = 0, tokenizer: Any = None,
) -> list[list[int]]:  # fmt: skip
    limits = token_limits([len(p) for p in prompts], settings, None)
    news: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        indices = range(len(prompts))[part]
        news += continue_tokens(model, prompts[part], settings, limits=limits[part],
                                indices=indices, seed=seed, device="cpu",
                                tokenizer=tokenizer)  # fmt: skip
    return news


class CountedForward(Forward):
    """Notes the rows of each step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rows: list[int] = []

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor | None:
        self.rows.append(len(ids))
        return super().__call__(ids, cache)


def generated(
    module: Any, prompt: list[int], *, tokenizer: Any = None, **settings: Any
) -> list[int]:
    """What transformers makes of one prompt: its new tokens, the end token included."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt])
    module.eval()
    text = module.generate(
        ids, attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(pad_token_id=0, **settings), tokenizer=tokenizer,
    )  # fmt: skip
    return text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_transformers_token_for_token(name: str, batch_size: int) -> None:
    own, module = pair(dense_spec(**FAMILIES[name]))
    expected = [generated(module, p, max_new_tokens=12, do_sample=False) for p in PROMPTS]
    settings = GenerationSettings(max_new_tokens=12)
    assert run(own, settings, batch_size=batch_size) == expected
    assert own.training  # as it was


def test_greedy_stops_at_any_end_token_as_transformers_does() -> None:
    own, module = pair(dense_spec(**FAMILIES["llama"]))
    free = run(own, GenerationSettings(max_new_tokens=12))
    ends = (free[0][5], free[2][3])
    expected = [
        generated(module, p, max_new_tokens=12, do_sample=False, eos_token_id=list(ends))
        for p in PROMPTS
    ]
    found = run(own, GenerationSettings(max_new_tokens=12, eos_token_ids=ends))
    assert found == expected
    assert any(len(new) < 12 for new in found)
    assert all(new[-1] in ends for new in found if len(new) < 12)


PROCESSED: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 10},
    "repetition_penalty": {"max_new_tokens": 10, "repetition_penalty": 1.7},
    "min_length": {"max_new_tokens": 12, "min_length": 11, "repetition_penalty": 1.2},
    "min_new_tokens": {"max_new_tokens": 10, "min_new_tokens": 8},
    "no_repeat_ngram_size": {"max_new_tokens": 16, "no_repeat_ngram_size": 2},
    "bad_words_ids": {"max_new_tokens": 10, "bad_words_ids": [[25], [71, 71], [33, 40, 7]]},
    "suppress_tokens": {"max_new_tokens": 10, "suppress_tokens": list(range(0, 96, 2))},
    "begin_suppress_tokens": {"max_new_tokens": 6, "begin_suppress_tokens": list(range(80))},
    "encoder_repetition_penalty": {"max_new_tokens": 10, "encoder_repetition_penalty": 3.0},
    "encoder_no_repeat_ngram_size": {
        "max_new_tokens": 12,
        "encoder_no_repeat_ngram_size": 1,
        "sequence_bias": [[[token], 9.0] for prompt in PROMPTS for token in prompt],
    },
    "sequence_bias": {
        "max_new_tokens": 10,
        "sequence_bias": [[[9], 8.0], [[9, 12], 20.0], [[33, 40, 7], -5.0]],
    },
    "forced_bos_token_id": {
        "max_new_tokens": 6,
        "forced_bos_token_id": 11,
        "begin_suppress_tokens": [60, 61],
    },
    "forced_eos_token_id": {"max_new_tokens": 6, "forced_eos_token_id": [12, 13]},
    "forced_eos_token_id, max_length": {"max_length": 10, "forced_eos_token_id": 12},
    "exponential_decay_length_penalty": {
        "max_new_tokens": 20,
        "exponential_decay_length_penalty": (2, 1.6),
    },
    "renormalize_logits": {"max_new_tokens": 10, "renormalize_logits": True},
}


@pytest.mark.parametrize("name", PROCESSED)
def test_processed_scores_equal_transformers(name: str) -> None:
    own, module = pair(dense_spec(**FAMILIES["qwen3 tied"]))
    end = run(own, GenerationSettings(max_new_tokens=4))[0][2]
    given = PROCESSED[name]
    expected = [generated(module, p, do_sample=False, eos_token_id=[end], **given) for p in PROMPTS]
    kept = {key: value for key, value in given.items() if key != "renormalize_logits"}
    found = run(own, GenerationSettings(eos_token_ids=(end,), **kept))
    assert found == expected
    lengths = {key: given[key] for key in ("max_length", "max_new_tokens") if key in given}
    plain = run(own, GenerationSettings(eos_token_ids=(end,), **lengths))
    assert (found == plain) == (name in ("max_length", "renormalize_logits"))


def test_a_text_ends_with_a_stop_string_as_in_transformers() -> None:
    tokenizer = tiny_tokenizer()
    own, module = pair(dense_spec(**FAMILIES["llama"], vocab_size=len(tokenizer)))
    free = run(own, GenerationSettings(max_new_tokens=12))
    # The second one begins in one token and ends in the next, or in the prompt.
    stops = [tokenizer.decode(free[0][3:4]), tokenizer.decode(free[2][5:7])]
    across = tokenizer.decode([PROMPTS[3][-1], free[3][0]])
    expected = [
        generated(module, p, max_new_tokens=12, stop_strings=[*stops, across], tokenizer=tokenizer)
        for p in PROMPTS
    ]
    settings = GenerationSettings(max_new_tokens=12, stop_strings=(*stops, across))
    found = run(own, settings, tokenizer=tokenizer)
    assert found == expected
    assert [len(new) < 12 for new in found].count(True) >= 3
    assert len(found[3]) == 1


def test_texts_end_after_a_time() -> None:
    own, _ = pair(dense_spec(**FAMILIES["llama"]))
    free = run(own, GenerationSettings(max_new_tokens=12))
    found = run(own, GenerationSettings(max_new_tokens=12, max_time=1e-9))
    assert found == [new[:1] for new in free]
    assert run(own, GenerationSettings(max_new_tokens=12, max_time=1e6)) == free


WARPED: dict[str, Any] = {
    "temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9,
    "epsilon_cutoff": 0.001, "eta_cutoff": 0.001, "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3, "bad_words_ids": [[7, 8]], "suppress_tokens": [3],
    "begin_suppress_tokens": [4], "min_new_tokens": 2, "top_h": 0.9, "sequence_bias": [[[5], 1.0]],
    "encoder_repetition_penalty": 1.2, "encoder_no_repeat_ngram_size": 2, "forced_bos_token_id": 6,
    "forced_eos_token_id": 7, "exponential_decay_length_penalty": (1, 1.2),
}  # fmt: skip


def test_scores_are_changed_in_the_order_of_transformers() -> None:
    from transformers import GenerationConfig

    _, module = pair(dense_spec(**FAMILIES["llama"]))
    config = GenerationConfig(do_sample=True, max_new_tokens=5, eos_token_id=[2], pad_token_id=0,
                              **WARPED)  # fmt: skip
    config.max_length = 9
    module._prepare_special_tokens(config, kwargs_has_attention_mask=True, device="cpu")
    prompt = torch.tensor([[5, 9, 7, 33]])
    expected = module._get_logits_processor(
        config, input_ids_seq_length=4, encoder_input_ids=prompt, device="cpu"
    )
    settings = GenerationSettings(do_sample=True, eos_token_ids=(2,), **WARPED)
    own = processors_of(settings, [5, 9, 7, 33], 9, "cpu")
    assert [type(step) for step in own] == [type(step) for step in expected]
    ids = torch.tensor([[5, 9, 7, 33, 8, 1]])
    scores = torch.randn(1, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(own(ids, scores.clone()), expected(ids, scores.clone()))


SAMPLED = GenerationSettings(
    max_new_tokens=10, do_sample=True, temperature=1.5, top_k=20, top_p=0.95,
    repetition_penalty=1.1,
)  # fmt: skip


def test_samples_depend_on_seed_and_index_not_on_the_batch() -> None:
    own, _ = pair(dense_spec(**FAMILIES["llama"]))
    together = run(own, SAMPLED)
    assert run(own, SAMPLED, batch_size=1) == together
    assert run(own, SAMPLED, batch_size=3) == together
    assert run(own, SAMPLED, seed=1) != together
    twins = run(own, SAMPLED, [PROMPTS[0]] * 3)
    assert twins[0] == together[0]
    assert len({tuple(new) for new in twins}) == 3


def test_samples_follow_the_distribution() -> None:
    own, _ = pair(dense_spec(**FAMILIES["llama"]))
    own.eval()
    with torch.no_grad():
        shares = own(torch.tensor([PROMPTS[0]]), last_only=True)[0, -1].softmax(-1)
    settings = GenerationSettings(max_new_tokens=1, do_sample=True, top_k=0)
    draws = torch.tensor(run(own, settings, [PROMPTS[0]] * 3000, batch_size=500)).flatten()
    counted = torch.bincount(draws, minlength=len(shares)) / len(draws)
    assert (counted - shares).abs().max() < 0.03


@pytest.mark.parametrize("settings", [GenerationSettings(max_new_tokens=16), SAMPLED])
def test_rows_that_have_ended_leave_the_batch(settings: GenerationSettings) -> None:
    own, _ = pair(dense_spec(**FAMILIES["mistral window"]))
    free = run(own, settings, batch_size=1)
    ends = (free[0][1], free[2][3], free[3][6])
    settings = replace(settings, eos_token_ids=ends)
    forward = CountedForward(own)
    found = run(forward, settings)
    assert found == run(own, settings, batch_size=1)
    assert {len(new) for new in found} != {len(found[0])}
    assert forward.rows[0] == len(PROMPTS)
    assert forward.rows[-1] < len(PROMPTS)
    assert forward.rows == sorted(forward.rows, reverse=True)
    assert own.training


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_modules_of_transformers_continue_with_their_own_loop(family: str) -> None:
    spec = module_spec(family)
    model = build_model(spec, dtype=torch.float32, device="cpu")
    module = oracle(spec)
    model.load_state_dict(module.state_dict())
    expected = [generated(module, p, max_new_tokens=8, do_sample=False) for p in PROMPTS]
    assert run(model, GenerationSettings(max_new_tokens=8)) == expected
    assert run(model, SAMPLED) == run(model, SAMPLED, batch_size=2)


def test_settings_take_each_key_from_the_source_of_highest_priority() -> None:
    written, model, directory = {"top_k": 3, "max_length": 40}, {"top_k": 9, "top_p": 0.5}, {
        "top_p": 0.9, "do_sample": True, "temperature": 0.6, "max_new_tokens": 512,
        "eos_token_id": [4, 5], "transformers_version": "5", "pad_token_id": None,
    }  # fmt: skip
    settings = generation_settings(written, model, directory, hf_config={"eos_token_id": 2})
    assert settings == GenerationSettings(
        max_length=40, max_new_tokens=None, do_sample=True, temperature=0.6, top_k=3, top_p=0.5,
        eos_token_ids=(4, 5), pad_token_id=4,
    )  # fmt: skip


def test_special_tokens_come_from_config_json_then_from_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    settings = generation_settings(tokenizer=tokenizer, hf_config={"eos_token_id": 9})
    assert (settings.eos_token_ids, settings.bos_token_id, settings.pad_token_id) == ((9,), 1, 0)
    settings = generation_settings(tokenizer=tokenizer, hf_config={"eos_token_id": None})
    assert settings.eos_token_ids == (2,)


NO_ROOM: dict[str, tuple[list[int], dict[str, Any], int | None, str]] = {
    "max_length": (
        [3, 25], {}, None,
        "prompt 2: has 25 tokens: max_length = 20 counts the prompt. Nearest: "
        "generation_config.max_length: 26. Or set generation_config.max_new_tokens.",
    ),
    "positions": ([70], {}, 64, "prompt 1: has 70 tokens: the model has 64 positions. Shorten"),
    "new tokens": (
        [10], {"max_new_tokens": 100}, 64,
        "generation_config.max_new_tokens = 100: the model has 64 positions. Nearest: 54.",
    ),
    "long max_length": ([10], {"max_length": 100}, 64, "max_length = 100: the model has 64 "),
    "empty": ([0], {}, None, "prompt 1: is empty: generation needs a first token."),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_ROOM)
def test_prompts_that_are_too_long(name: str) -> None:
    lengths, settings, positions, text = NO_ROOM[name]
    with pytest.raises(UserError) as raised:
        token_limits(lengths, GenerationSettings(**settings), positions)
    assert text in str(raised.value)


@pytest.mark.parametrize("key", ["temperature", "repetition_penalty"])
def test_a_number_near_zero_does_not_make_logits_infinite(key: str) -> None:
    settings = generation_settings({"do_sample": True, key: 1e-320})
    assert torch.isfinite(torch.tensor([30.0, -30.0]) / getattr(settings, key)).all()
