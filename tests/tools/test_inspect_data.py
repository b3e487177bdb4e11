"""inspect_data: the numbers of a dataset against numbers that are counted here by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.megatron.writer import IndexedWriter
from launcher.report import histogram
from launcher.tools import inspect_data
from tests.data.conftest import train_tokenizer

TEXTS = ["The ship", "A slipway is a ramp for ships. " * 6, "The ship", "Ships slide. " * 3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "x.yaml").write_text(
        """
output_dir: output
model: {model_config: {type: Qwen3Config, vocab_size: 512, hidden_size: 32, num_layers: 1,
  num_heads: 2, n_kv_heads: 2, head_dim: 16, intermediate_size: 64, max_position_embeddings: 64}}
processor: {tokenizer: {pretrained_model_dir: tokenizer}}
train_dataset:
  data_loader: {type: HFDataLoader, dataset_files: texts.jsonl}
  seq_length: 16
"""
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert inspect_data.main(["--config", "x.yaml", *arguments]) == 0
    return capsys.readouterr().out


def test_numbers_of_a_padded_dataset(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer: Any = train_tokenizer()
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS]
    inputs = [min(length - 1, 16) for length in lengths]
    lost = sum(max(length - 1 - 16, 0) for length in lengths)
    said = inspect(capsys, "--samples", "4")
    assert said.count("| The ship") == 2
    assert f"rows        {len(TEXTS)} of 16 tokens" in said
    assert f"an epoch    {sum(inputs)} tokens, {sum(inputs)} of them targets" in said
    assert f"padding     {1 - sum(inputs) / (16 * len(TEXTS)):.1%}" in said
    cut = sum(length > 17 for length in lengths)
    assert f"truncated   {cut} of {len(TEXTS)} documents, {lost} tokens" in said
    assert "duplicates  1 document equal" in said
    assert (folder / "output" / inspect_data.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_samples_without_a_target_are_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three conversations in rows of 48 tokens one fits, one is cut in its answer, and of one no
    answer is left. Of a part of the rows it is not known what they have lost."""
    words = [("Ships", "Ramps"), ("Ships", "ramp " * 30), ("ramp " * 30, "Ships")]
    turns = [{"instruction": question, "output": answer} for question, answer in words]
    (folder / "chat.json").write_text(json.dumps(turns))
    source = "{name: chat, type: InstructionDataLoader, dataset_files: chat.json}"
    said = inspect(capsys, f"train_dataset.data_loader=[{source}]", "train_dataset.seq_length=48")
    assert "rows        2 of 48 tokens" in said
    assert "truncated   1 of 3 documents" in said
    assert "left out    1 of 3 documents" in said
    limited = source.replace("chat.json", "chat.json, max_samples: 1")
    said = inspect(capsys, f"train_dataset.data_loader=[{limited}]", "train_dataset.seq_length=48")
    assert "truncated   not known" in said


def test_packed_rows_lose_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = inspect(capsys, "train_dataset.packing=True", "--samples", "1")
    assert "truncated   none" in said
    assert "duplicates  1 document equal" in said
    assert said.count("sample ") == 1


def test_documents_of_files_of_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [[5, 6, 0], [7] * 40 + [0], [5, 6, 0], [], [8] * 20 + [0]]
    with IndexedWriter(folder / "m", dtype="uint16") as writer:
        writer.add_documents(np.array(tokens, dtype=np.int64) for tokens in documents)
        writer.finish()
    np.save("stream.npy", np.array(list(itertools.chain(*documents)), dtype=np.uint16))
    megatron = "{type: BlendedMegatronDatasetDataLoader, config: {data_path: m}}"
    for loader, count in (
        (megatron, 5),
        ("{type: TokenFileDataLoader, dataset_dir: stream.npy, eod_token_id: 0}", 4),
        ("{type: TokenFileDataLoader, dataset_dir: stream.npy}", 1),
    ):
        text = Path("x.yaml").read_text()
        before = text[: text.index("  data_loader:")]
        Path("x.yaml").write_text(f"{before}  data_loader: {loader}\n  seq_length: 16\n")
        said = inspect(capsys)
        assert f"documents   {count}; " in said
        assert f"longest {41 if count > 1 else 68}" in said
        assert f"duplicates  {1 if count > 1 else 0} document" in said


def test_a_layout_for_many_processes_is_inspected_by_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = inspect(capsys, "--parallel_config.data_parallel", "64")
    assert "duplicates" in said


def test_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_data.main([]) == 2
    assert "--config" in capsys.readouterr().err
    assert inspect_data.main(["--config", "x.yaml", "train_dataset.seq_lenght=16"]) == 2
    assert "train_dataset.seq_length" in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(20))
def test_bins_count_every_value_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(0, 10 ** random.integers(0, 6) + 1, random.integers(1, 500))
    bins = histogram.bins_of(values)
    assert sum(b.count for b in bins) == len(values)
    assert len(bins) <= histogram.MOST_BINS
    assert all(before.high + 1 == after.low for before, after in itertools.pairwise(bins))
    for b in bins:
        assert b.count == np.count_nonzero((values >= b.low) & (values <= b.high))
