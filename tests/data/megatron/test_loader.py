"""The loader: documents and targets of rows, the cache of orders, ranks, and resuming."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.schema import DataLoaderSection, MegatronConfigSection
from launcher.data.loader import Loader, evaluation_batches
from launcher.data.megatron.writer import IndexedWriter
from launcher.data.order import GlobalOrder
from launcher.data.progress import Progress
from launcher.data.rows import NO_TARGET, RowDataset
from launcher.errors import UserError
from tests.data.megatron.cases import GOLDEN, case, megatron_rows, open_loader

LENGTH = 16
EOD = 0
A, C = str(GOLDEN / "a_int32"), str(GOLDEN / "c_int32")


def section(sizes: list[int | None] | None = None, **config: Any) -> DataLoaderSection:
    config = {"data_path": A, "eod": EOD} | config
    return DataLoaderSection(
        type="BlendedMegatronDatasetDataLoader",
        sizes=sizes,
        config=MegatronConfigSection(**config),
    )


BLEND = section([50, 5, 0], data_path=["0.3", A, "0.7", C], split="80,20,0", eod_mask_loss=True)


def test_an_unset_shuffle_is_the_order_of_megatron() -> None:
    assert not section().is_shuffled
    assert replace(section(), shuffle=True).is_shuffled
    assert DataLoaderSection().is_shuffled


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("attention", [False, True])
def test_each_reset_is_there_by_itself(positions: bool, attention: bool, tmp_path: Path) -> None:
    loader = section(reset_position_ids=positions, reset_attention_mask=attention)
    dataset = open_loader(loader, LENGTH, tmp_path)
    assert dataset.packed == attention
    index = next(i for i in range(len(dataset)) if EOD in dataset.row(i).input_ids[:-1])
    row = dataset.row(index)
    ends = row.input_ids == EOD
    documents = np.concatenate([[0], np.cumsum(ends)[:-1]])
    assert (row.document_ids is not None) == attention
    if row.document_ids is not None:
        assert row.document_ids.tolist() == documents.tolist()
    restarted = [int(np.count_nonzero(documents[:t] == documents[t])) for t in range(LENGTH)]
    if row.position_ids is not None:
        expected = restarted if positions else list(range(LENGTH))
        assert row.position_ids.tolist() == expected
    assert (row.position_ids is not None) == (positions or attention)
    # What follows an end token is a target, as in the original, unless eod_mask_loss is on.
    assert (row.labels != NO_TARGET).all()


def test_without_an_end_token_nothing_is_reset(tmp_path: Path) -> None:
    loader = section(eod=-1, reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    row = open_loader(loader, LENGTH, tmp_path).row(0)
    assert row.position_ids is not None
    assert row.document_ids is not None
    assert row.position_ids.tolist() == list(range(LENGTH))
    assert not row.document_ids.any()


def test_counts_read_only_the_rows_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = open_loader(section(eod_mask_loss=True), LENGTH, tmp_path)
    plain = open_loader(section(), LENGTH, tmp_path)
    read: list[int] = []
    for dataset in (masked, plain):
        rows = megatron_rows(dataset)
        original = rows._inputs_and_labels
        monkeypatch.setattr(
            rows, "_inputs_and_labels",
            lambda index, original=original: (read.append(index), original(index))[1],
        )  # fmt: skip
    masked.counts(np.array([5, 2]))
    assert read == [5, 2]
    assert plain.counts(np.arange(8)).targets.tolist() == [LENGTH] * 8
    assert read == [5, 2]


def test_evaluation_reads_the_valid_split_and_a_phase_is_kept(tmp_path: Path) -> None:
    loader = section(split="80,10,10", reset_position_ids=True)
    lengths = {}
    for phase in ("train", "valid", "test"):
        dataset = open_loader(loader, LENGTH, tmp_path, phase=phase)
        chosen = open_loader(replace(loader, phase=phase), LENGTH, tmp_path)
        lengths[phase] = megatron_rows(dataset).parts[0].order.documents.tolist()
        assert megatron_rows(chosen).parts[0].order.documents.tolist() == lengths[phase]
        assert chosen.fingerprint == dataset.fingerprint
    assert sorted(chain.from_iterable(lengths.values())) == list(range(23))


def test_a_whole_file_is_read_where_there_is_no_split(tmp_path: Path) -> None:
    for phase in ("train", "valid"):
        dataset = open_loader(section(), LENGTH, tmp_path, phase=phase)
        assert sorted(megatron_rows(dataset).parts[0].order.documents.tolist()) == list(range(23))


ENDLESS = [
    pytest.param(section([10, 5, 0], split="1,0.001"), "valid", "0 sequence(s)", id="no sequence"),
    pytest.param(section([10, 0, 0], split="1,0,0"), "valid", "0 sequence(s)", id="no share"),
    pytest.param(section(data_path=str(GOLDEN / "e_uint8")), "train", "13 token(s)", id="too few"),
    pytest.param(section(data_path=["1", A]), "train", "sizes", id="weights without sizes"),
    pytest.param(
        section([9, 0, 0], data_path=["1", A], split="8,2,0"), "valid", "no samples", id="no size"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("loader", "phase", "part"), ENDLESS)
def test_what_has_no_samples_is_an_error(
    loader: DataLoaderSection, phase: str, part: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        open_loader(loader, LENGTH, tmp_path, phase=phase)
    assert part in str(caught.value)
    assert not list(tmp_path.glob(".*")), "nothing is left of what was begun"


def test_an_empty_file_has_no_samples(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "empty", dtype="uint16") as writer:
        writer.add_document([])
        writer.finish()
    with pytest.raises(UserError, match=r"empty\.idx"):
        open_loader(section([5, 0, 0], data_path=str(tmp_path / "empty")), 4, tmp_path / "cache")


class TestCache:
    """Orders are built once, and again where anything that decides them has changed."""

    def opened(self, place: Path, loader: DataLoaderSection = BLEND) -> tuple[RowDataset, str]:
        """The rows, and what was logged of them."""
        log: list[str] = []
        dataset = open_loader(loader, LENGTH, place / "cache", log=log)
        return dataset, "\n".join(log)

    def test_it_is_used_again(self, tmp_path: Path) -> None:
        first, made = self.opened(tmp_path)
        times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}
        second, again = self.opened(tmp_path)
        assert "from the cache" in again
        assert "from the cache" not in made
        assert first.fingerprint == second.fingerprint
        assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*")}

    @pytest.mark.parametrize("name", ["documents.npy", "ends.npy", "shuffle.npy", "arrays.json"])
    @pytest.mark.parametrize("how", ["flipped", "cut", "absent"])
    def test_what_is_damaged_is_made_again(self, name: str, how: str, tmp_path: Path) -> None:
        first, _ = self.opened(tmp_path)
        labels = [first.row(index).labels.tolist() for index in range(len(first))]
        file = sorted((tmp_path / "cache").glob(f"*/{name}"))[0]
        content = bytearray(file.read_bytes())
        content[len(content) - 3] ^= 1
        if how == "absent":
            file.unlink()
        else:
            file.write_bytes(content if how == "flipped" else content[:-3])
        second, log = self.opened(tmp_path)
        assert "damaged" in log
        assert [second.row(index).labels.tolist() for index in range(len(second))] == labels
        assert "from the cache" in self.opened(tmp_path)[1]

    def test_other_files_are_another_order(self, tmp_path: Path) -> None:
        def write(documents: list[list[int]]) -> str:
            with IndexedWriter(tmp_path / "x", dtype="uint16") as writer:
                writer.add_documents(documents)
                return str(writer.finish())

        numbers = np.arange(1, 200).tolist()
        prefix = write([numbers[:90], numbers[90:]])
        first, _ = self.opened(tmp_path, section(data_path=prefix))
        write([numbers[:100], numbers[100:], [7] * 80])
        second, log = self.opened(tmp_path, section(data_path=prefix))
        assert "from the cache" not in log
        assert first.fingerprint != second.fingerprint
        assert len(second) > len(first)

    def test_a_folder_of_its_own(self, tmp_path: Path) -> None:
        loader = section(path_to_cache=str(tmp_path / "own"))
        self.opened(tmp_path, loader)
        assert not (tmp_path / "cache").exists()
        assert "from the cache" in self.opened(tmp_path, loader)[1]

    def test_threads_make_the_same(self, tmp_path: Path) -> None:
        assert BLEND.config is not None
        threads = replace(BLEND, config=replace(BLEND.config, num_dataset_builder_threads=4))
        first, _ = self.opened(tmp_path / "one")
        second, _ = self.opened(tmp_path / "four", threads)
        assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 7}, {"split": "90,10,0"}, {"eod_mask_loss": False}, {"pad": 5}, {"eod": 9},
        {"reset_position_ids": True}, {"add_extra_token_to_sequence": False},
        {"data_path": ["0.4", A, "0.6", C]}, {"data_path": ["0.3", C, "0.7", A]},
    ],
    ids=str,
)  # fmt: skip
def test_the_fingerprint_knows_every_setting(changed: dict[str, Any], tmp_path: Path) -> None:
    assert BLEND.config is not None
    other = replace(BLEND, config=replace(BLEND.config, **changed))
    found = {open_loader(loader, LENGTH, tmp_path).fingerprint for loader in (BLEND, other)}
    assert len(found) == 2


def test_the_fingerprint_does_not_know_the_place(tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / f"moved{ending}").write_bytes(Path(A + ending).read_bytes())
    here = open_loader(section(), LENGTH, tmp_path / "one")
    moved = open_loader(section(data_path=str(tmp_path / "moved")), LENGTH, tmp_path / "two")
    assert here.fingerprint == moved.fingerprint


STEPS = 9
"""Of 8 samples: a second time through the blend of 51."""


def _samples(dataset: RowDataset, ranks: int, begin: int) -> list[list[int]]:
    """The inputs of all samples of a run from step `begin`, in their order."""
    order = GlobalOrder(len(dataset), 5, shuffle=BLEND.is_shuffled)
    loaders = [
        Loader(dataset, order, batch_size=8 // ranks // 2, micro_steps=2, data_parallel=ranks,
               data_rank=rank)
        for rank in range(ranks)
    ]  # fmt: skip
    found: dict[int, list[int]] = {}
    for step in range(begin, STEPS):
        for loader in loaders:
            for batch in loader.step(step * 8).batches:
                ids = batch.sample_ids.tolist()
                found |= dict(zip(ids, batch.input_ids.tolist(), strict=True))
    for loader in loaders:
        loader.close()
    return [found[sample] for sample in sorted(found)]


def test_a_resumed_run_sees_the_samples_of_megatron_on_any_ranks(tmp_path: Path) -> None:
    dataset = open_loader(BLEND, LENGTH, tmp_path)
    items = [dataset.row(i % len(dataset)).input_ids.tolist() for i in range(STEPS * 8)]
    assert len(dataset) < STEPS * 8
    for ranks in (1, 2):
        for begin in (0, 3, 7):
            assert _samples(dataset, ranks, begin) == items[begin * 8 :]


def test_every_row_is_evaluated_once(tmp_path: Path) -> None:
    golden = case("order_valid_keep_partial")
    dataset = open_loader(golden.section(), LENGTH, tmp_path, phase="valid")
    targets = 0
    for rank in range(2):
        for batch in evaluation_batches(dataset, 3, 2, rank):
            targets += int((batch.labels != NO_TARGET).sum())
    masks = golden.content["splits"]["valid"]["loss_mask"]
    assert targets == dataset.total_targets() == sum(map(sum, masks))


def test_arrays_larger_than_memory_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = section([200, 0, 0], data_path=["0.3", A, "0.7", C], seed=7)
    small = open_loader(loader, LENGTH, tmp_path / "small")
    monkeypatch.setattr("launcher.data.array_folder.IN_MEMORY", 0)
    monkeypatch.setattr("launcher.data.megatron.order.COPIED_UP_TO", 0)
    monkeypatch.setattr("launcher.data.megatron.order.GATHERED_AT_ONCE", 5)
    large = open_loader(loader, LENGTH, tmp_path / "large")
    files = sorted(path.relative_to(tmp_path / "small") for path in tmp_path.rglob("small/*/*"))
    assert len(files) == 2 * 5 + 4
    for file in files:
        assert (tmp_path / "small" / file).read_bytes() == (tmp_path / "large" / file).read_bytes()
    assert small.fingerprint == large.fingerprint


def test_what_a_killed_preparation_left_is_removed(tmp_path: Path) -> None:
    loader = section([200, 0, 0], data_path=["0.3", A, "0.7", C])
    open_loader(loader, LENGTH, tmp_path)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3
    for folder in folders:
        folder.rename(folder.with_name(f".{folder.name}.1234.tmp"))
    open_loader(loader, LENGTH, tmp_path)
    assert sorted(tmp_path.iterdir()) == folders


def test_preparation_reports_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.data.progress.FIRST_SECONDS", -1.0)
    monkeypatch.setattr("launcher.data.progress.REPORT_SECONDS", -1.0)
    seen = list[Progress]()
    loader = section([200, 0, 0], data_path=["0.3", A, "0.7", C])
    open_loader(loader, LENGTH, tmp_path, on_progress=seen.append)
    fractions = [progress.fraction or 0.0 for progress in seen]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < fractions[-1] == 1


def test_an_end_token_that_ends_nothing_is_said(tmp_path: Path) -> None:
    for eod, count in ((EOD, 0), (12345, 1)):
        log = list[str]()
        open_loader(section(reset_attention_mask=True, eod=eod), LENGTH, tmp_path, log=log)
        assert sum(f"token {eod} of data_loader.config.eod" in line for line in log) == count
    log = list[str]()
    open_loader(section(eod=12345), LENGTH, tmp_path, log=log)
    assert not any("warning" in line for line in log), "nothing depends on it"
