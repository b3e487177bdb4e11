"""Data of several ranks: one rank per file system prepares it; all get the same rows or error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.builders.open_dataset import _check_same
from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.errors import UserError
from launcher.parallel.filesystems import ONE_FILESYSTEM, FilesystemGroups
from launcher.parallel.world import World
from tests.checkpoint.crew import together

TWO_DISKS = FilesystemGroups(((0, 1), (2, 3)))


def build_on(
    size: int,
    place: Path,
    tokenizer: Any,
    caches: list[Path],
    disks: FilesystemGroups = ONE_FILESYSTEM,
) -> list[Any]:
    """What each rank ends with: a dataset or an error. `caches`: the folder of each rank."""

    def work(world: World) -> Any:
        section = DatasetSection(
            data_loader=DataLoaderSection(dataset_dir=str(place)), packing=True
        )
        try:
            return build_dataset(
                section,
                tokenizer=tokenizer,
                seq_length=8,
                cache_dir=caches[world.rank],
                once=lambda prepare: str(disks.on_own(world, "", prepare)),
                log=lambda line: None if disks.is_leader(world) else pytest.fail(line),
            )
        except UserError as error:
            return error

    return together(size, work)


def test_every_rank_maps_the_same_rows(tmp_path: Path, corpus: Path, tokenizer: Any) -> None:
    first, *others = build_on(3, corpus, tokenizer, [tmp_path / "cache"] * 3)
    for other in others:
        assert other.fingerprint == first.fingerprint
        assert np.array_equal(other.row(3).labels, first.row(3).labels)


def test_each_disk_has_a_cache_of_its_own(tmp_path: Path, corpus: Path, tokenizer: Any) -> None:
    caches = [tmp_path / disk for disk in "aabb"]
    first, *others = build_on(4, corpus, tokenizer, caches, TWO_DISKS)
    assert {other.fingerprint for other in others} == {first.fingerprint}
    assert [len(list((tmp_path / disk).glob("*/tokens.bin"))) for disk in "ab"] == [1, 1]


def test_an_error_on_one_disk_reaches_all_and_none_waits(
    tmp_path: Path, corpus: Path, tokenizer: Any
) -> None:
    (tmp_path / "file").write_text("")
    caches = [tmp_path / "a"] * 2 + [tmp_path / "file" / "b"] * 2
    results = build_on(4, corpus, tokenizer, caches, TWO_DISKS)
    assert {type(result) for result in results} == {UserError}
    assert len({str(result) for result in results}) == 1
    assert "the data cache cannot be written (Not a directory)" in str(results[0])
    (corpus / "zz.txt").symlink_to("nowhere")
    results = build_on(3, corpus, tokenizer, [tmp_path / "cache"] * 3)
    assert all("zz.txt: cannot be read" in str(result) for result in results)


def test_a_fault_of_the_program_reaches_all_too(
    tmp_path: Path, corpus: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("launcher.data.loaders.text.tokenize_documents", broken)
    results = build_on(2, corpus, tokenizer, [tmp_path / "cache"] * 2)
    assert [str(r).split(": every")[0] for r in results] == ["rank 0: RuntimeError: a bug"] * 2


def test_other_files_on_another_machine_are_an_error(
    tmp_path: Path, corpus: Path, tokenizer: Any
) -> None:
    """The same path may have other files on each machine."""
    same = build_on(2, corpus, tokenizer, [tmp_path / "cache"] * 2)
    _check_same([dataset.content for dataset in same])
    shutil.copytree(corpus, tmp_path / "more")
    (tmp_path / "more" / "added.txt").write_text("one more document")
    other = build_on(1, tmp_path / "more", tokenizer, [tmp_path / "cache"])
    with pytest.raises(UserError, match="machine of rank 2 differs from that of rank 0"):
        _check_same([dataset.content for dataset in [*same, *other]])


def test_two_runs_at_once_end_with_one_folder(tmp_path: Path, corpus: Path, tokenizer: Any) -> None:
    each = FilesystemGroups(((0,), (1,)))  # nobody waits for the other
    first, second = build_on(2, corpus, tokenizer, [tmp_path / "cache"] * 2, each)
    assert first.fingerprint == second.fingerprint
    assert len(list((tmp_path / "cache").glob("*/tokens.bin"))) == 1
