"""Draws of tokens: their distribution, and what they do not depend on."""

from __future__ import annotations

import torch

from launcher.generation.draw import draw, draw_seed, gumbel
from tests.host_waits import no_host_waits

VOCABULARY = 40
SCORES = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2)) * 2


def seeds(count: int, *, first: int = 0) -> list[int]:
    return [draw_seed(7, index, 0) for index in range(first, first + count)]


def test_draws_follow_the_softmax() -> None:
    count = 40_000
    tokens = draw(SCORES.expand(count, -1), seeds(count))
    observed = torch.bincount(tokens, minlength=VOCABULARY).double()
    expected = SCORES.double().softmax(-1) * count
    kept = expected >= 5  # as for any test of this kind
    statistic = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_draws_of_a_prompt_are_independent_from_step_to_step() -> None:
    pairs = [(draw_seed(7, index, 0), draw_seed(7, index, 1)) for index in range(20_000)]
    flat = torch.zeros(len(pairs), 2)
    first, second = (draw(flat, [pair[at] for pair in pairs]) for at in (0, 1))
    joint = torch.bincount(first * 2 + second, minlength=4).double() / len(pairs)
    assert (joint - 0.25).abs().max() < 0.02


def test_a_draw_does_not_depend_on_the_batch_or_on_tokens_that_are_not_drawn() -> None:
    count = 500
    scores = SCORES + torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(3))
    tokens = draw(scores, seeds(count))
    assert torch.equal(draw(scores[100:], seeds(400, first=100)), tokens[100:])
    left = scores.masked_fill(torch.rand(scores.shape) < 0.5, float("-inf"))
    left.scatter_(1, tokens[:, None], scores.gather(1, tokens[:, None]))
    assert torch.equal(draw(left, seeds(count)), tokens)


def test_a_draw_withstands_other_last_bits() -> None:
    count = 20_000
    scores = torch.randn(count, 200, generator=torch.Generator().manual_seed(4))
    nudged = scores * (1 + 1e-6 * torch.randn(scores.shape))
    changed = (draw(scores, seeds(count)) != draw(nudged, seeds(count))).sum()
    assert changed <= 3


def test_noise_is_bounded_so_that_unlikely_tokens_can_be_left_out() -> None:
    noise = gumbel(seeds(2000), torch.arange(1000))
    assert noise.min() > -3.2
    assert noise.max() < 22.9
    far = torch.tensor([[0.0, -26.5, float("-inf")]]).expand(1000, -1)
    assert not draw(far, seeds(1000)).any()


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


def test_a_gpu_draws_the_same_tokens_without_a_wait() -> None:
    scores = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 20
    scores[:, 7] = -torch.inf
    expected = draw(scores, seeds(200))
    with no_host_waits([scores]):
        found = draw(scores.as_subclass(OnCuda), seeds(200))
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    assert len(set(expected.tolist())) > 20
