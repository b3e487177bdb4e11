"""The order against megatron-core itself, on random datasets, where it can be imported."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.schema import DataLoaderSection, MegatronConfigSection
from launcher.data.megatron.writer import IndexedWriter
from launcher.data.rows import NO_TARGET
from launcher.errors import UserError
from tests.data.megatron.cases import megatron_rows, open_loader

SPLITS = ("train", "valid", "test")
CASES = 60
EOD = 0


def _datasets(folder: Path, choose: random.Random) -> list[str]:
    """One to four datasets of up to 60 documents, some of them empty."""
    names = []
    for number in range(choose.randint(1, 4)):
        with IndexedWriter(folder / f"data{number}", dtype="int32") as writer:
            for _ in range(choose.randint(1, 60)):
                length = choose.choice((0, 1, 2, 5, 30, 200))
                writer.add_document([choose.randint(EOD, 50) for _ in range(length)])
            names.append(str(writer.finish()))
    return names


def _settings(folder: Path, seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    names = _datasets(folder, choose)
    weighted = choose.random() < 0.6
    words: list[str] = []
    for name in names:
        words += [str(choose.choice((1, 0.1, 3, 0.37))), name] if weighted else [name]
    known = choose.random() < 0.8 or weighted
    return {
        "data_path": words,
        "split": choose.choice(("1", "80,20", "90,5,5", "1,1,1")),
        "sizes": [choose.choice((1, 7, 60, 300)) if known else None for _ in SPLITS],
        "seed": choose.choice((1234, 0, 7)),
        "seq_length": choose.choice((2, 5, 16, 33)),
        "flags": {
            "eod_mask_loss": choose.random() < 0.5,
            "reset_position_ids": choose.random() < 0.5,
            "reset_attention_mask": choose.random() < 0.5,
            "add_extra_token_to_sequence": choose.random() < 0.8,
            "drop_last_partial_validation_sequence": choose.random() < 0.7,
        },
    }


def _theirs(settings: dict[str, Any]) -> list[Any]:
    builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    utils = pytest.importorskip("megatron.core.datasets.utils")
    ids = {"eod": EOD, "pad": 99, "vocab_size": 100, "unique_identifiers": {}}
    config = gpt.GPTDatasetConfig(
        random_seed=settings["seed"], sequence_length=settings["seq_length"],
        blend=utils.get_blend_from_list(settings["data_path"]), split=settings["split"],
        tokenizer=type("Tokenizer", (), ids)(),
        create_attention_mask=True, **settings["flags"],
    )  # fmt: skip
    make = builder.BlendedMegatronDatasetBuilder
    return list(make(gpt.GPTDataset, settings["sizes"], lambda: True, config).build())


@pytest.mark.parametrize("seed", range(CASES))
def test_random_datasets(seed: int, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core.datasets.helpers_cpp")
    settings = _settings(tmp_path, seed)
    loader = DataLoaderSection(
        type="BlendedMegatronDatasetDataLoader", sizes=settings["sizes"],
        config=MegatronConfigSection(
            data_path=settings["data_path"], split=settings["split"], seed=settings["seed"],
            eod=EOD, pad=99, **settings["flags"],
        ),
    )  # fmt: skip
    mine: list[Any] = []
    for phase in SPLITS:
        try:
            dataset = open_loader(loader, settings["seq_length"], tmp_path / "c", phase=phase)
        except UserError as error:
            mine.append(error)
        else:
            mine.append(dataset)
    if any(isinstance(found, UserError) and "sequence(s)" in str(found) for found in mine):
        return  # the original might never end
    for phase, dataset, other in zip(SPLITS, mine, _theirs(settings), strict=True):
        if other is None:
            assert isinstance(dataset, UserError), phase
            continue
        assert len(dataset) == len(other)
        for index in range(len(other)):
            _same(dataset.row(index), other[index], megatron_rows(dataset))


def _same(row: Any, item: dict[str, Any], rows: Any) -> None:
    expected = {key: np.asarray(value) for key, value in item.items()}
    is_target = row.labels != NO_TARGET
    assert row.input_ids.tolist() == expected["tokens"].tolist()
    assert is_target.tolist() == (expected["loss_mask"] > 0).tolist()
    assert row.labels[is_target].tolist() == expected["labels"][is_target].tolist()
    length = len(row.input_ids)
    positions = np.arange(length) if row.position_ids is None else row.position_ids
    assert positions.tolist() == expected["position_ids"].tolist()
    documents = np.zeros(length) if row.document_ids is None else row.document_ids
    seen = np.tril(documents[:, None] == documents[None, :])
    assert (~expected["attention_mask"][0] == seen).all()
