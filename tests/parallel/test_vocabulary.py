"""The loss and the embedding of a sharded vocabulary, against the unsharded one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks

ROWS, LENGTH, VOCABULARY, HIDDEN = 3, 5, 24, 8


def material(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator) * 5
    labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    labels[0, 1] = labels[2, 4] = -100
    return logits.to(dtype), labels


def sharded_losses(dtypes: list[str], chunk_elements: int) -> list[tuple[float, np.ndarray]]:
    from launcher.parallel import vocabulary, world

    here = world.start(force_cpu=True)
    vocabulary.CHUNK_ELEMENTS["cpu"] = chunk_elements
    found = []
    for name in dtypes:
        logits, labels = material(getattr(torch, name))
        own = logits.chunk(here.size, dim=-1)[here.rank].clone().requires_grad_()
        loss = vocabulary.token_loss_sum(own, labels, torch.distributed.group.WORLD)
        (loss * 0.5).backward()
        assert own.grad is not None
        assert own.grad.dtype == own.dtype
        found.append((loss.item(), own.grad.float().numpy()))
        again = own.detach().clone().requires_grad_()
        sums = vocabulary.token_loss_sum(again, labels, torch.distributed.group.WORLD, by_row=True)
        (sums.sum() * 0.5).backward()
        assert torch.equal(again.grad, own.grad)  # type: ignore[arg-type]
        for row in range(ROWS):
            alone = vocabulary.token_loss_sum(
                own.detach()[row : row + 1], labels[row : row + 1], torch.distributed.group.WORLD
            )
            assert torch.allclose(sums[row], alone)
        nothing = torch.full_like(labels, -100)
        no_log = vocabulary.token_loss_sum(own, nothing, torch.distributed.group.WORLD)
        assert no_log.item() == 0.0
    world.stop()
    return found


@pytest.mark.parametrize("chunk_elements", [20, 1 << 19])
def test_the_loss_of_sharded_logits_equals_that_of_full_ones(chunk_elements: int) -> None:
    dtypes = {"float32": 1e-6, "bfloat16": 1e-2}
    ranks = run_ranks(3, sharded_losses, list(dtypes), chunk_elements)
    for index, (name, tolerance) in enumerate(dtypes.items()):
        logits, labels = material(getattr(torch, name))
        full = logits.clone().requires_grad_()
        loss = F.cross_entropy(full.float().flatten(0, 1), labels.flatten(), reduction="sum")
        (loss * 0.5).backward()
        assert full.grad is not None
        for found, gradient in zip(ranks, full.grad.chunk(3, dim=-1), strict=True):
            total, ours = found[index]
            assert total == pytest.approx(loss.item(), rel=1e-5)
            np.testing.assert_allclose(ours, gradient.float(), atol=tolerance, rtol=tolerance)


def test_the_sum_of_sharded_embeddings_is_the_embedding() -> None:
    from launcher.parallel.vocabulary import look_up

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    total = sum(look_up(ids, part, rank) for rank, part in enumerate(weight.chunk(4)))
    expected = F.embedding(ids, weight)
    assert torch.equal(total, expected)
    (ours,) = torch.autograd.grad(total.square().sum(), weight)
    (theirs,) = torch.autograd.grad(F.embedding(ids, weight).square().sum(), weight)
    assert torch.equal(ours, theirs)
