"""Steps: the same samples however many ranks and micro steps share them, from any position."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.loader import Batch, Loader, StepData, evaluation_batches
from launcher.data.order import GlobalOrder
from launcher.data.rows import RowDataset

from .conftest import Build


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def dataset(request: pytest.FixtureRequest, build: Build, corpus: Path) -> RowDataset:
    for number in range(20):
        (corpus / f"more{number}.txt").write_text("The ship slides. " * (number % 4 + 1))
    return build(dataset_dir=str(corpus), seq_length=8, packing=request.param)


def loader_of(dataset: RowDataset, **settings: Any) -> Loader:
    shape = {"batch_size": 2, "micro_steps": 2, "data_parallel": 1, "data_rank": 0} | settings
    order = GlobalOrder(len(dataset), seed=5)
    return Loader(dataset, order, **shape)


def same(left: StepData, right: StepData) -> bool:
    def tensors(batch: Batch) -> list[torch.Tensor | None]:
        return [
            batch.input_ids,
            batch.labels,
            batch.position_ids,
            batch.document_ids,
            batch.sample_ids,
        ]

    counts = [
        (step.target_tokens, step.input_tokens, step.first_sample, step.samples, len(step.batches))
        for step in (left, right)
    ]
    pairs = [
        pair
        for one, other in zip(left.batches, right.batches, strict=True)
        for pair in zip(tensors(one), tensors(other), strict=True)
    ]
    return counts[0] == counts[1] and all(
        (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
        for a, b in pairs
    )


@pytest.mark.parametrize(
    ("data_parallel", "micro_steps", "batch_size"),
    [(1, 1, 8), (1, 8, 1), (1, 2, 4), (2, 1, 4), (2, 4, 1), (4, 1, 2), (4, 2, 1), (8, 1, 1)],
)
def test_a_global_batch_does_not_depend_on_who_shares_it(
    dataset: RowDataset, data_parallel: int, micro_steps: int, batch_size: int
) -> None:
    whole = loader_of(dataset, batch_size=8, micro_steps=1).step(16)
    steps = [
        loader_of(
            dataset,
            batch_size=batch_size,
            micro_steps=micro_steps,
            data_parallel=data_parallel,
            data_rank=rank,
        ).step(16)
        for rank in range(data_parallel)
    ]
    batches = [step.batches[m] for m in range(micro_steps) for step in steps]
    assert all(len(batch.sample_ids) == batch_size for batch in batches)
    for name in ("input_ids", "labels", "sample_ids"):
        together = torch.cat([getattr(batch, name) for batch in batches])
        assert torch.equal(together, getattr(whole.batches[0], name))
    assert {step.target_tokens for step in steps} == {whole.target_tokens}
    assert {step.input_tokens for step in steps} == {whole.input_tokens}


def test_counts_are_those_of_the_global_batch(dataset: RowDataset) -> None:
    step = loader_of(dataset, batch_size=3, micro_steps=4).step(7)
    labels = torch.cat([batch.labels for batch in step.batches])
    assert step.target_tokens == int((labels != -100).sum())
    assert (step.first_sample, step.samples) == (7, 12)
    rows = GlobalOrder(len(dataset), 5).rows(np.arange(7, 19))
    assert step.input_tokens == int(dataset.counts(rows).tokens.sum())


def test_seeking_is_the_same_as_running_through(dataset: RowDataset) -> None:
    """Over two epoch borders, forwards, backwards and with reading ahead."""
    steps = 2 * len(dataset) // 4 + 3
    sequential = [loader_of(dataset, prefetch=False).step(4 * n) for n in range(steps)]
    ahead = loader_of(dataset, prefetch=True)
    running = [ahead.step(4 * n) for n in range(steps)]
    assert all(map(same, sequential, running))
    for number in (steps - 1, 0, steps // 2, steps // 2, 1, 2):
        assert same(sequential[number], ahead.step(4 * number))
    ahead.close()
    assert same(sequential[1], ahead.step(4))


def test_epochs_run_on_without_a_gap(dataset: RowDataset) -> None:
    rows = len(dataset)
    loader = loader_of(dataset, batch_size=1, micro_steps=1, prefetch=False)
    steps = [loader.step(n) for n in range(3 * rows)]
    assert [int(step.batches[0].sample_ids[0]) for step in steps] == list(range(3 * rows))
    targets = [step.target_tokens for step in steps]
    epochs = [targets[e * rows : (e + 1) * rows] for e in range(3)]
    of_rows = dataset.counts(np.arange(rows)).targets
    assert all(sorted(epoch) == sorted(of_rows.tolist()) for epoch in epochs)
    across = loader_of(dataset, batch_size=4, micro_steps=1).step(rows - 2)
    assert across.batches[0].sample_ids.tolist() == [rows - 2, rows - 1, rows, rows + 1]
    alone = [steps[n].batches[0].input_ids[0] for n in range(rows - 2, rows + 2)]
    assert torch.equal(across.batches[0].input_ids, torch.stack(alone))


def test_shapes_and_types(dataset: RowDataset) -> None:
    loader = loader_of(dataset, batch_size=3, micro_steps=2, data_parallel=2, data_rank=1)
    assert loader.global_batch == 12
    step = loader.step(0)
    assert len(step.batches) == 2
    for batch in step.batches:
        for name in ("input_ids", "labels", "position_ids", "document_ids"):
            tensor = getattr(batch, name)
            if tensor is None:
                assert not dataset.packed
                continue
            assert tensor.shape == (3, 8)
            assert tensor.dtype == torch.int64
        assert batch.sample_ids.dtype == torch.int64
        assert (batch.document_ids is not None) == dataset.packed
    assert step.batches[0].sample_ids.tolist() == [3, 4, 5]
    assert step.batches[1].sample_ids.tolist() == [9, 10, 11]


def test_an_error_of_prefetching_is_raised_by_the_next_step(
    dataset: RowDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(dataset)
    read = loader._read

    def failing(consumed_samples: int) -> StepData:
        if consumed_samples == 4:
            raise OSError("the disk is gone")
        return read(consumed_samples)

    monkeypatch.setattr(loader, "_read", failing)
    loader.step(0)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.step(4)
    assert loader.step(8).first_sample == 8


@pytest.mark.parametrize("data_parallel", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_evaluation_has_every_row_once_and_the_same_number_of_batches(
    dataset: RowDataset, data_parallel: int, batch_size: int
) -> None:
    ranks = [
        list(evaluation_batches(dataset, batch_size, data_parallel, rank))
        for rank in range(data_parallel)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    everything = [batch for batches in ranks for batch in batches]
    assert all(batch.input_ids.shape == (batch_size, 8) for batch in everything)
    ids = torch.cat([batch.sample_ids for batch in everything])
    assert sorted(ids[ids >= 0].tolist()) == list(range(len(dataset)))
    labels = torch.cat([batch.labels for batch in everything])
    assert (labels[ids < 0] == -100).all()
    assert int((labels != -100).sum()) == dataset.total_targets()


def test_wrong_arguments(dataset: RowDataset) -> None:
    with pytest.raises(ValueError, match="data rank 2 of 2"):
        loader_of(dataset, data_parallel=2, data_rank=2)
    with pytest.raises(ValueError, match="an order of 3 rows"):
        Loader(
            dataset, GlobalOrder(3, 0), batch_size=1, micro_steps=1, data_parallel=1, data_rank=0
        )
