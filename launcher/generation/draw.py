"""Random draws of tokens that are the same on every layout.

Owns the noise: the token with the largest sum of score and Gumbel noise is a sample of the softmax
of the scores (Gumbel, 1954; Maddison et al., https://arxiv.org/abs/1411.0030). Invariant: the
noise of a token is a function of (seed of the draw, token) alone. It is computed by integer
arithmetic: no generator, and nothing that depends on the device, the batch, the other tokens or how
many of them the processors have left. The index of a text is that of its prompt among all, plus
`FURTHER` for each further text of the same prompt: the first text of a prompt is the same however
many there are.

Scores differ between layouts in their last bits, as sums are added in another order. Here such a
difference changes a draw only where the two largest sums differ by less than it. (With the inverse
of the cumulative distribution every difference of an earlier token would move all later ones.)
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from models.dropout import mix

FURTHER = 1 << 32
"""See above."""
_LARGEST_NOISE, _SMALLEST_NOISE = 22.9, -3.2
"""Of 32 random bits: bounds of -log(-log(u)) for u from 2**-33 to 1 - 2**-33."""


def draw_seed(seed: int, index: int, step: int) -> int:
    """The seed of one draw, 64 bits. `index`: of the text; `step`: new tokens before it."""
    return xxhash.xxh3_64_intdigest(f"generation/{seed}/{index}/{step}".encode())


def draw(scores: Tensor, seeds: list[int]) -> Tensor:
    """One token of each row [rows] int64, from `scores` [rows, vocabulary] and a seed of 64 bits
    for each row. Tokens with a score of -inf are never drawn."""
    if scores.is_cuda:  # which would have to tell the host how many columns are within reach
        columns = torch.arange(scores.shape[1], device=scores.device)
        return (scores.double() + gumbel(seeds, columns)).argmax(-1)
    return _draw_within_reach(scores, seeds)


def _draw_within_reach(scores: Tensor, seeds: list[int]) -> Tensor:
    """The same: no noise makes up for more than this distance from the likeliest token (one more
    for the roundings of scores in 16 bits), and only a few columns get any."""
    reach = _LARGEST_NOISE - _SMALLEST_NOISE + 1
    columns = (scores > scores.amax(-1, keepdim=True) - reach).any(0).nonzero()[:, 0]
    found = (scores[:, columns].double() + gumbel(seeds, columns)).argmax(-1)
    return columns[found]


def gumbel(seeds: list[int], tokens: Tensor) -> Tensor:
    """Gumbel noise [rows, n] float64 of `tokens` [n] for each seed."""
    low, high = (
        torch.tensor([seed >> shift & 0xFFFFFFFF for seed in seeds]).to(
            tokens.device, non_blocking=True
        )
        for shift in (0, 32)
    )
    bits = mix(mix(mix(low) ^ high)[:, None] ^ mix(tokens + 1))
    uniform = (bits.double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log()
