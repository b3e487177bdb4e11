"""The table of data loaders: what adding one takes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import DataLoaderSection
from launcher.config.schema.field import info_of
from launcher.data.files import DataFile, find_files
from launcher.data.loaders import ALIASES, LOADERS
from launcher.data.loaders.base import DataLoader, Document
from launcher.data.loaders.text import tokenize_texts
from launcher.data.tally import Tally
from launcher.extensions import ROW_LOADERS


def test_every_type_of_the_schema_has_a_loader() -> None:
    (kind,) = (field for field in fields(DataLoaderSection) if field.name == "type")
    assert {*LOADERS, *ALIASES, *ROW_LOADERS} == set(info_of(kind).choices)
    assert set(ALIASES.values()) <= set(LOADERS)


def find_tables(section: DataLoaderSection) -> list[DataFile]:
    return find_files(section.paths, [".csv"])


def read_table(
    path: Path, section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Document]:
    with path.open() as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield Document(f"{path}:{number}", row[section.text_column])


def test_a_new_loader_is_three_functions_and_a_line(
    tmp_path: Path, build: Any, logged: list[str], monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """Cache, rows and `num_samples` come with it."""
    loader = DataLoader(find_files=find_tables, read_file=read_table, tokenize=tokenize_texts)
    monkeypatch.setitem(LOADERS, "CsvDataLoader", loader)
    (tmp_path / "a.csv").write_text("id,text\n1,the ship\n2,a slipway\n3,not read\n")
    for _ in range(2):
        dataset = build(type="CsvDataLoader", dataset_dir=str(tmp_path), num_samples=2)
    assert [line.partition(":")[0] for line in logged] == ["data"] * 2
    assert "2 documents of 1 file(s)" in logged[0]
    assert "from the cache" in logged[1]
    text = tokenizer.decode(dataset.row(0).input_ids)
    assert text.startswith("the ship<|endoftext|>a ")
