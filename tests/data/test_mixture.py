"""Mixtures of real files: the same samples on any number of ranks, from any position."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.builders.mixture import Mixture, open_mixture
from launcher.builders.mixture_resume import continued, to_json
from launcher.config.mixture import source_names
from launcher.config.provenance import Provenance
from launcher.config.schema import DatasetSection, MixtureSourceSection
from launcher.config.schema.data import MegatronConfigSection
from launcher.data.blend import LARGEST_PERIOD
from launcher.data.build import build_dataset
from launcher.data.joined import joined
from launcher.data.loader import Batch, Loader, StepData, evaluation_batches
from launcher.data.mixture import (
    MixtureOrder,
    Portion,
    SourceOrder,
    mixture_order,
    shares,
    source_seed,
)
from launcher.data.rows import RowDataset
from launcher.errors import UserError
from tests.data.megatron.cases import GOLDEN
from tests.data.mindrecord_writer import token_rows, write_mindrecord

Lines = Sequence[dict[str, Any]]


def _lines(path: Path, records: Lines) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _text(folder: Path) -> dict[str, Any]:
    (folder / "text").mkdir()
    for n in range(12):
        (folder / "text" / f"{n}.txt").write_text(
            "The ship slides down the slipway. " * (n % 5 + 1)
        )
    return {"type": "TextDataLoader", "dataset_dir": str(folder / "text")}


def _column(folder: Path) -> dict[str, Any]:
    records = [{"body": f"A ramp for ships, number {n}. " * (n % 3 + 1)} for n in range(17)]
    path = _lines(folder / "column.jsonl", records)
    return {"type": "HFDataLoader", "dataset_files": path, "text_column": "body"}


def _instruction(folder: Path) -> dict[str, Any]:
    records = [
        {"instruction": f"{n}?", "output": "It is a ramp. " * (n % 2 + 1)} for n in range(23)
    ]
    path = _lines(folder / "instruction.jsonl", records)
    return {"type": "InstructionDataLoader", "dataset_files": path}


def _parquet(folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [f"What is a slipway {n}? " * (n % 4 + 1) for n in range(31)]
    pq.write_table(pa.table({"text": texts}), folder / "texts.parquet")
    return {"type": "HFDataLoader", "dataset_files": str(folder / "texts.parquet")}


def _mindrecord(folder: Path) -> dict[str, Any]:
    rows = [[[n % 90 + 5] * 20 + list(range(13))] for n in range(19)]
    path = folder / "rows.mindrecord"
    write_mindrecord(path, {"input_ids": ("int32", [-1])}, token_rows(rows, "input_ids"))
    return {"type": "MindDataset", "dataset_dir": str(path)}


def _megatron(folder: Path) -> dict[str, Any]:
    config = MegatronConfigSection(data_path=str(GOLDEN / "a_int32"))
    return {"type": "BlendedMegatronDatasetDataLoader", "config": config}


def _token_file(folder: Path) -> dict[str, Any]:
    np.save(folder / "tokens.npy", np.arange(5, 405, dtype=np.uint16))
    return {"type": "TokenFileDataLoader", "dataset_files": str(folder / "tokens.npy")}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "text": _text,
    "column": _column,
    "instruction": _instruction,
    "parquet": _parquet,
    "mindrecord": _mindrecord,
    "megatron": _megatron,
    "tokens": _token_file,
}
"""Kind of source -> what writes its files: the keys of an entry. Each loader that is added to
`data_loader.type` adds a row."""
WEIGHTS = dict(zip(KINDS, (0.3, 0.2, 0.15, 0.1, 0.1, 0.1, 0.05), strict=True))
NAMES = tuple(sorted(KINDS))
Open = Callable[..., Mixture]


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The keys of an entry of each kind, without a share."""
    folder = tmp_path_factory.mktemp("sources")
    return {name: {"name": name, **write(folder)} for name, write in KINDS.items()}


@pytest.fixture(scope="module")
def open_sources(entries, tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Open:
    """open_sources(seed=5, packing=True, log=..., kind={more keys}, ...)."""
    cache = tmp_path_factory.mktemp("cache")

    def opened(*, seed: int = 5, packing: bool = True, log: Any = str, **more: Any) -> Mixture:
        def dataset_of(section: DatasetSection, log: Any) -> RowDataset:
            return build_dataset(
                section, tokenizer=tokenizer, seq_length=32, cache_dir=cache,
                once=lambda prepare: prepare(), log=log,
            )  # fmt: skip

        wanted = more or {name: {"weight": weight} for name, weight in WEIGHTS.items()}
        sources = [MixtureSourceSection(**entries[n], **keys) for n, keys in wanted.items()]
        section = DatasetSection(data_loader=sources, packing=packing)
        return open_mixture(section, seed, log, dataset_of)

    return opened


def rows_of(mixture: Mixture) -> RowDataset:
    return joined(mixture.datasets, 32)


def loader_of(
    mixture: Mixture, order: MixtureOrder, world: int = 1, rank: int = 0, batch: int = 8
) -> Loader:
    micro_steps = 8 // batch // world
    return Loader(
        rows_of(mixture), order, batch_size=batch, micro_steps=micro_steps, data_parallel=world,
        data_rank=rank, prefetch=False,
    )  # fmt: skip


def together(steps: Sequence[StepData]) -> list[list[Any]]:
    """The samples of one step of all ranks in their order: id, source and all that a row has."""
    batches: list[Batch] = [
        step.batches[micro] for micro in range(len(steps[0].batches)) for step in steps
    ]
    found = []
    for batch in batches:
        assert batch.sources is not None
        assert (batch.sources.sum(1) == 1).all()
        tensors = [batch.sample_ids, batch.sources.int().argmax(1), batch.input_ids, batch.labels]
        tensors += [t for t in (batch.position_ids, batch.document_ids) if t is not None]
        found += list(zip(*(tensor.tolist() for tensor in tensors), strict=True))
    return [list(sample) for sample in found]


def on_ranks(mixture: Mixture, order: MixtureOrder, world: int, batch: int, at: int) -> Any:
    return together(
        [loader_of(mixture, order, world, rank, batch).step(at) for rank in range(world)]
    )


def resumed(order: MixtureOrder, saved: MixtureOrder, position: int) -> MixtureOrder:
    """As a resumed run continues, from a state file."""
    state = json.loads(json.dumps(to_json(saved)))
    return continued(order, state, position, Provenance())[0]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_any_number_of_ranks_sees_the_samples_of_one(open_sources: Open, packing: bool) -> None:
    """Stopped after any step, resumed on another number of ranks."""
    mixture = open_sources(packing=packing)
    layouts = [(1, 8), (2, 4), (4, 2), (2, 2), (4, 1), (1, 1)]
    steps = 2 * len(rows_of(mixture)) // 8
    alone = [together([loader_of(mixture, mixture.order()).step(8 * n)]) for n in range(steps)]
    order = mixture.order()
    for number, expected in enumerate(alone):
        order = resumed(mixture.order(), order, 8 * number)
        world, batch = layouts[number % len(layouts)]
        assert on_ranks(mixture, order, world, batch, 8 * number) == expected
    ids = [sample[0] for step in alone for sample in step]
    assert ids == list(range(8 * steps))


def test_shares_hold_and_every_source_is_visited_in_passes(open_sources: Open) -> None:
    mixture = open_sources()
    order, dataset = mixture.order(), rows_of(mixture)
    samples = np.arange(1000)
    rows = order.rows(samples)
    sources = dataset.source_of(rows)
    starts = np.cumsum([0, *(source.rows for source in dataset.sources)])
    for index, source in enumerate(dataset.sources):
        taken = np.cumsum(sources == index)
        share = Fraction(str(WEIGHTS[source.name]))
        assert all(abs(int(n) - share * (g + 1)) < 1 for g, n in enumerate(taken))
        own = rows[sources == index] - starts[index]
        for begin in range(0, len(own) - source.rows + 1, source.rows):
            assert sorted(own[begin : begin + source.rows]) == list(range(source.rows))
    assert [order.row(g) for g in (0, 7, 999)] == rows[[0, 7, 999]].tolist()


def test_counts_are_those_of_the_rows(open_sources: Open) -> None:
    mixture = open_sources()
    step = loader_of(mixture, mixture.order()).step(16)
    (batch,) = step.batches
    assert step.sources is not None
    assert batch.sources is not None
    targets = (batch.labels != -100).sum(1)
    assert step.sources.samples == batch.sources.sum(0).tolist()
    assert step.sources.targets == (targets[:, None] * batch.sources).sum(0).tolist()
    assert step.target_tokens == sum(step.sources.targets)


def test_evaluation_has_every_row_once_with_its_source(open_sources: Open) -> None:
    dataset = rows_of(open_sources())
    counted = torch.zeros(len(NAMES), dtype=torch.int64)
    for rank in range(3):
        for batch in evaluation_batches(dataset, 2, 3, rank):
            assert batch.sources is not None
            assert (batch.sources.sum(1) == (batch.sample_ids >= 0)).all()
            counted += batch.sources.sum(0)
    assert counted.tolist() == [source.rows for source in dataset.sources]


def test_a_seek_is_fast_and_small() -> None:
    """To sample 10^9 of sources of so many rows, whose shares have the longest period."""
    sources = [SourceOrder(f"s{n}", 10**9 + n * n, str(n), n, True) for n in range(6)]
    order = mixture_order(sources, {s.name: Portion(s.rows) for s in sources}, 1)
    assert sum(order.segment.weights.values()) == LARGEST_PERIOD
    order.rows(np.arange(8))
    tracemalloc.start()
    began = time.perf_counter()
    found = order.rows(10**9 + np.arange(8))
    seconds = time.perf_counter() - began
    assert tracemalloc.get_traced_memory()[1] < 2e8
    tracemalloc.stop()
    assert found.tolist() == [order.row(10**9 + n) for n in range(8)]
    print(f"seek: {1e3 * seconds:.2f} ms")


@pytest.mark.parametrize(
    ("portions", "expected", "epoch"),
    [
        ([Portion(100), Portion(300)], ["1/4", "3/4"], 400),
        ([Portion(100, epochs=3), Portion(300)], ["1/2", "1/2"], 600),
        ([Portion(100, epochs=0.5), Portion(150)], ["1/4", "3/4"], 200),
        ([Portion(10, 0.3), Portion(90, 0.7)], ["3/10", "7/10"], 100),
        ([Portion(10, 6), Portion(90, 2)], ["3/4", "1/4"], 100),
        ([Portion(10, 0.5), Portion(30), Portion(10)], ["1/2", "3/8", "1/8"], 80),
        ([Portion(10, 0.1), Portion(45, epochs=2)], ["1/10", "9/10"], 100),
        ([Portion(7)], ["1"], 7),
        ([Portion(7, 0.2)], ["1"], 7),
    ],
)
def test_shares_of_weights_epochs_and_sizes(portions, expected, epoch: int) -> None:
    found, samples = shares(portions)
    assert found == [Fraction(share) for share in expected]
    assert samples == epoch


def test_weights_that_leave_nothing() -> None:
    with pytest.raises(ValueError, match="add up to 1"):
        shares([Portion(10, 0.5), Portion(10, 0.5), Portion(10)])


@given(st.integers(0, 2**64), st.text(min_size=1, max_size=9))
def test_seeds_of_sources(seed: int, name: str) -> None:
    assert source_seed(seed, name) == source_seed(seed, name)
    assert source_seed(seed, name) != source_seed(seed + 1, name)
    assert source_seed(seed, name) != source_seed(seed, name + "x")


def test_the_order_of_the_list_decides_nothing(open_sources: Open) -> None:
    keys = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    one, other = open_sources(**keys), open_sources(**dict(reversed(keys.items())))
    assert rows_of(one).content == rows_of(other).content
    assert one.order() == other.order()


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"name": "own", "dataset_dir": "data/wiki.jsonl"}, "own"),
        ({"dataset_dir": "data/wiki.jsonl"}, "wiki"),
        ({"dataset_dir": "/data/wiki/*.txt"}, "wiki"),
        ({"dataset_files": ["data/a b.txt", "c"]}, "a_b"),
        ({"dataset_dir": "../.."}, "source0"),
        ({"path": "data", "subset": "english"}, "english"),
        ({"config": MegatronConfigSection(data_path=["0.3", "data/code", "0.7", "b"])}, "code"),
        ({"config": MegatronConfigSection(train_data_path="data/code_text")}, "code_text"),
    ],
)
def test_names_of_sources(keys: dict[str, Any], name: str) -> None:
    assert source_names([MixtureSourceSection(**keys)]) == [name]


def test_max_samples_are_the_same_rows_in_every_epoch(open_sources: Open) -> None:
    keys = {"text": {"max_samples": 3}, "column": {"max_samples": 4, "shuffle": False}}
    full, some = open_sources(text={}, column={}), open_sources(**keys)
    assert [len(some.datasets[name]) for name in ("column", "text")] == [4, 3]
    tokens = {
        name: [row.input_ids.tolist() for row in map(full.datasets[name].row, range(4))]
        for name in keys
    }
    found = [some.datasets["column"].row(n).input_ids.tolist() for n in range(4)]
    assert found == tokens["column"]
    assert some.datasets["text"].content != full.datasets["text"].content
    assert open_sources(**keys).datasets["text"].content == some.datasets["text"].content
    assert open_sources(**keys, seed=6).datasets["text"].content != some.datasets["text"].content
    logged: list[str] = []
    limited = open_sources(text={"max_samples": 10**6}, log=logged.append).datasets["text"]
    assert limited.content == full.datasets["text"].content
    assert "fewer than max_samples" in logged[-1]
    counts = some.datasets["text"].counts(np.arange(3))
    rows = [some.datasets["text"].row(n) for n in range(3)]
    assert counts.targets.tolist() == [int((row.labels != -100).sum()) for row in rows]
    assert some.order().size == 7


def test_log_lines_begin_with_the_name(open_sources: Open) -> None:
    logged: list[str] = []
    mixture = open_sources(log=logged.append, text={"epochs": 2}, column={})
    assert {line.removeprefix("warning: ").split(":")[0] for line in logged} == {"text", "column"}
    order = mixture.order()
    described = list(mixture.description(order))
    assert len(described) == 3
    assert "2 passes an epoch" in next(line for line in described if "  text:" in line)


def test_rows_of_another_length_name_the_source(open_sources: Open) -> None:
    with pytest.raises(UserError, match="source `column`: its rows have 32 tokens") as caught:
        joined(open_sources().datasets, 64)
    assert caught.value.problems[0].nearest == "Nearest: seq_length: 32"


def test_an_unusable_source_is_named(open_sources: Open) -> None:
    with pytest.raises(UserError, match=r"source `text`: .*nothing"):
        open_sources(text={"suffixes": [".nothing"]})
