"""From JSON lines to batches: tokens a second, against `datasets` and torch's `DataLoader`.

    python -m benchmarks.data_loading [--rounds 5] [--megabytes 8] [--write]

Both read the same documents (the standard library of Python) with one tokenizer, in one process,
and keep nothing between rounds. Three figures:

    prepare   tokenize and pack into rows of 4,096 tokens, written to disk
    step      8 shuffled rows as tensors: tokens, labels, positions, documents; ours are read
              ahead by a thread, the others by a worker process where that is faster than none
    growth    memory of this process (RssAnon), from step 1,000 to step 10,000; ours alone

`datasets` maps documents to tokens, and groups of 1,000 documents to rows, as its examples do: what
is left at the end of a group is dropped, whereas ours drops nothing.
"""

from __future__ import annotations

import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from benchmarks.measure import Spread, in_turns, parser, ratios, report, table
from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.build import build_dataset
from launcher.data.loader import Loader
from launcher.data.order import GlobalOrder
from launcher.data.rows import RowDataset

LENGTH, ROWS, STEPS = 4096, 8, 150
FEW_STEPS, MANY_STEPS = 1_000, 10_000
HEADER = (
    "work",
    "Slipway, M tokens/s",
    "datasets, M tokens/s",
    "ratio (above 1: ours is faster)",
)


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.data_loading", __doc__, rounds=5)
    arguments_parser.add_argument("--megabytes", type=int, default=8, help="of JSON lines")
    arguments = arguments_parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        body = _measured(Path(name), arguments.megabytes, arguments.rounds)
    report("Data loading", "benchmarks.data_loading", arguments, body)


def _measured(folder: Path, megabytes: int, rounds: int) -> str:
    source = write_corpus(folder / "corpus.jsonl", megabytes * 1_000_000)
    tokenizer = train_tokenizer(source)
    ours = ours_prepared(folder, source, tokenizer)
    growth = f"Growth of memory over {MANY_STEPS - FEW_STEPS:,} steps: {grown(ours):.1f} MB."
    try:
        import datasets
    except ImportError:
        return f"`datasets` is not installed: nothing to compare with.\n\n{growth}"
    datasets.disable_progress_bars()
    theirs = theirs_prepared(folder, source, tokenizer)
    prepare = in_turns(
        {
            "Slipway": lambda: rate(lambda: ours_prepared(folder, source, tokenizer)),
            "datasets": lambda: rate(lambda: theirs_prepared(folder, source, tokenizer)),
        },
        rounds,
    )
    workers = in_turns({str(n): partial(their_steps, theirs, n) for n in (0, 1)}, 1, warm_up=False)
    best = int(max(workers, key=lambda n: workers[n][0]))
    step = in_turns(
        {"Slipway": partial(our_steps, ours), "datasets": partial(their_steps, theirs, best)},
        rounds,
    )
    rows = [
        (work, *(Spread.of(values).text() for values in taken.values()),
         ratios(taken["Slipway"], taken["datasets"]).text())
        for work, taken in (("prepare", prepare), ("step", step))
    ]  # fmt: skip
    return f"{table(HEADER, rows)}\n\nThe `DataLoader` had {best} worker(s). {growth}"


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


def our_steps(dataset: RowDataset) -> float:
    """Million tokens a second of the loader of a run."""
    loader = our_loader(dataset)
    loader.step(0)
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        loader.step(step * ROWS)
    seconds = time.perf_counter() - started
    loader.close()
    return STEPS * ROWS * LENGTH / seconds / 1e6


def our_loader(dataset: RowDataset) -> Loader:
    """8 rows a step."""
    return Loader(
        dataset, GlobalOrder(len(dataset), 0, True), batch_size=ROWS, micro_steps=1,
        data_parallel=1, data_rank=0, pin_memory=False,
    )  # fmt: skip


def their_steps(dataset: Any, workers: int) -> float:
    """Million tokens a second of torch's loader."""

    def batches() -> Iterator[Any]:
        while True:
            yield from DataLoader(dataset, batch_size=ROWS, shuffle=True, drop_last=True,
                                  num_workers=workers)  # fmt: skip

    found = batches()
    next(found)
    started = time.perf_counter()
    for _ in range(STEPS):
        batch = next(found)
        assert batch["input_ids"].shape == (ROWS, LENGTH)
    return STEPS * ROWS * LENGTH / (time.perf_counter() - started) / 1e6


def grown(dataset: RowDataset) -> float:
    """MB by which the memory of this process grows between two steps of the loader."""
    loader = our_loader(dataset)
    at_first = 0
    for step in range(MANY_STEPS):
        loader.step(step * ROWS)
        if step == FEW_STEPS:
            at_first = anonymous_bytes()
    loader.close()
    return (anonymous_bytes() - at_first) / 1e6


def anonymous_bytes() -> int:
    """Memory of this process without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
