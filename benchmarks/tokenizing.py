"""From JSON lines to packed rows on disk: tokens a second, against `datasets`.

    python -m benchmarks.tokenizing [--rounds 5] [--megabytes 8] [--write]

Both read the same documents (the standard library of Python) with one tokenizer whose threads use
all processors, and keep nothing between rounds. Slipway writes one stream of tokens, which is cut
into rows of 4,096 when it is read. `datasets` maps documents to tokens and groups of 1,000
documents to rows, with labels, positions and documents, as its examples do; it drops what is left
at the end of a group.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import Spread, in_turns, parser, ratios, report, table
from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.data.rows import RowDataset

LENGTH = 4096


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.tokenizing", __doc__, rounds=5)
    arguments_parser.add_argument("--megabytes", type=int, default=8, help="of JSON lines")
    arguments = arguments_parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        body = _measured(Path(name), arguments.megabytes, arguments.rounds)
    report("Tokenizing", "benchmarks.tokenizing", arguments, body)


def _measured(folder: Path, megabytes: int, rounds: int) -> str:
    source = write_corpus(folder / "corpus.jsonl", megabytes * 1_000_000)
    tokenizer = train_tokenizer(source)
    measures = {"Slipway": lambda: rate(partial(ours_prepared, folder, source, tokenizer))}
    try:
        import datasets
    except ImportError:
        print("`datasets` is not installed: nothing to compare with", file=sys.stderr)
    else:
        datasets.disable_progress_bars()
        measures["datasets"] = lambda: rate(partial(theirs_prepared, folder, source, tokenizer))
    taken = in_turns(measures, rounds)
    figures = [Spread.of(values).text() for values in taken.values()]
    header = [f"{name}, M tokens/s" for name in taken]
    if "datasets" in taken:
        figures.append(ratios(taken["Slipway"], taken["datasets"]).text())
        header.append("ratio (above 1: Slipway is faster)")
    return table(["data", *header], [[f"{megabytes} MB of JSON lines", *figures]])


def write_corpus(path: Path, size: int) -> Path:
    """JSON lines of about `size` bytes."""
    written = 0
    with path.open("w") as file:
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            text = source.read_text(errors="replace")
            for begin in range(0, len(text), 6000):
                written += file.write(json.dumps({"text": text[begin : begin + 6000]}) + "\n")
            if written > size:
                break
    return path


def train_tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 8,192 tokens, trained on some of the documents."""
    with source.open() as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(300), file, strict=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def rate(work: Callable[[], Any]) -> float:
    """Million tokens a second of work that makes rows."""
    started = time.perf_counter()
    made = work()
    return len(made) * LENGTH / (time.perf_counter() - started) / 1e6


def ours_prepared(folder: Path, source: Path, tokenizer: Any) -> RowDataset:
    """The rows of Slipway, from nothing."""
    cache = Path(tempfile.mkdtemp(dir=folder))
    loader = DataLoaderSection(type="HFDataLoader", dataset_files=[str(source)])
    return build_dataset(
        DatasetSection(data_loader=loader, packing=True), tokenizer=tokenizer, seq_length=LENGTH,
        cache_dir=cache, once=lambda prepare: prepare(), log=lambda line: None,
        workers=os.cpu_count() or 1,
    )  # fmt: skip


def theirs_prepared(folder: Path, source: Path, tokenizer: Any) -> Any:
    """The rows of `datasets`, from nothing."""
    import datasets

    cache = tempfile.mkdtemp(dir=folder)
    eos = tokenizer.eos_token_id

    def tokenized(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        found = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [[*ids, eos] for ids in found]}

    def grouped(batch: dict[str, list[Any]]) -> dict[str, Any]:
        lengths = [len(ids) for ids in batch["input_ids"]]
        tokens = np.fromiter((t for ids in batch["input_ids"] for t in ids), np.int32)
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        documents = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        labels = np.append(tokens[1:], -100)
        labels[np.append(documents[1:], -1) != documents] = -100
        rows = len(tokens) // LENGTH
        columns = {"input_ids": tokens, "labels": labels, "position_ids": positions,
                   "document_ids": documents}  # fmt: skip
        return {
            name: list(values[: rows * LENGTH].reshape(rows, LENGTH))
            for name, values in columns.items()
        }

    texts = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
    ids = texts.map(tokenized, batched=True, remove_columns=["text"])
    return ids.map(grouped, batched=True, batch_size=1000).with_format("torch")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
