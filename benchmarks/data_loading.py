"""The data loader alone: packed rows of 4,096 tokens, 8 a step, against `datasets` + `DataLoader`.

    python -m benchmarks.data_loading [--rounds 7] [--steps 300] [--long_steps 10000] [--write]

Both read the same tokens (the quickstart's text) in a random order and hand over int64 tensors on
the CPU: input_ids, labels (shifted), position_ids, document_ids. Slipway makes the last three from
the stream of tokens when a row is read; the peer has all four stored in an Arrow file. Slipway
reads a step ahead in a thread, the peer in two worker processes. Figures:

    tokens/s   over `--steps` steps of a process, after ten uncounted ones
    growth     of the resident memory between step 1,000 and the last of `--long_steps` steps

The last line compares with a training of the quickstart's model on the same rows of 512 tokens.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.jobs import TOKENIZER, Job, quickstart_data, slipway, tokens_per_second
from benchmarks.measure import ROOT, Spread, in_turns, parser, ratios, report, table

if TYPE_CHECKING:
    from launcher.data.rows import RowDataset

SEQ_LENGTH = 4096
BATCH = 8
WARM_UP = 10
SETTLED = 1000
PAGE = 4096
OURS, PEER = "Slipway", "datasets + DataLoader"


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    made = parser("benchmarks.data_loading", __doc__, rounds=7)
    made.add_argument("--steps", type=int, default=300, help="steps of a speed")
    made.add_argument("--long_steps", type=int, default=10_000, help="steps of a growth")
    made.add_argument("--measure", nargs=2, metavar=("READER", "FOLDER"), help="one process")
    arguments = made.parse_args()
    if arguments.measure:
        reader, folder = arguments.measure
        _measure_here(reader, folder, arguments.steps)
        return
    data = quickstart_data()
    with tempfile.TemporaryDirectory() as name:
        for reader in READERS:
            next(READERS[reader](Path(name)))  # tokenize, store
        measures = {reader: partial(_tokens_per_second, reader, name, arguments.steps)
                    for reader in READERS}  # fmt: skip
        speeds = in_turns(measures, arguments.rounds)
        growth = {reader: _run(reader, name, arguments.long_steps)[1] for reader in READERS}
    job = Job(source=data / "train", batch_size=BATCH, seq_length=512, steps=12)
    training = Spread.of([tokens_per_second(slipway, job, 2) for _ in range(3)])
    ours = Spread.of(speeds[OURS])
    header = ("8 rows of 4,096", "tokens/s", f"growth over {arguments.long_steps:,} steps, MB")
    rows = [(reader, Spread.of(speeds[reader]).text(",.0f"), f"{growth[reader]:,.1f}")
            for reader in READERS]  # fmt: skip
    body = table(header, rows)
    body += f"\n\nSlipway / peer: {ratios(speeds[OURS], speeds[PEER]).text()} (aim: at least 1)."
    body += (
        f" Training: {training.text(',.0f')} tokens/s; the loader is "
        f"{ours.median / training.median:,.0f} times as fast (aim: at least 20)."
    )
    report("Data loading", "benchmarks.data_loading", arguments, body)


def _tokens_per_second(reader: str, folder: str, steps: int) -> float:
    return _run(reader, folder, steps)[0]


def _run(reader: str, folder: str, steps: int) -> tuple[float, float]:
    """(tokens per second, growth in MB) of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_loading", "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--measure", reader, folder], cwd=ROOT, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    speed, growth = map(float, done.stdout.split()[-2:])
    return speed, growth


def _measure_here(reader: str, folder: str, steps: int) -> None:
    """Print tokens per second and the growth of this process."""
    taken, started, settled = 0, 0.0, 0
    for number, tokens in enumerate(READERS[reader](Path(folder))):
        if number == WARM_UP:
            started, taken = time.perf_counter(), 0
        if number == SETTLED:
            settled = _resident()
        taken += tokens
        if number == WARM_UP + steps:
            break
    seconds = time.perf_counter() - started
    growth = (_resident() - settled) / 1e6 if settled else 0.0
    print((taken - BATCH * SEQ_LENGTH) / seconds, growth)


def _resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def _slipway(folder: Path) -> Iterator[int]:
    """Tokens of each step, without end."""
    from launcher.data.loader import Loader
    from launcher.data.order import GlobalOrder

    dataset = _dataset(folder)
    loader = Loader(
        dataset, GlobalOrder(len(dataset), seed=1), batch_size=BATCH, micro_steps=1,
        data_parallel=1, data_rank=0,
    )  # fmt: skip
    consumed = 0
    while True:
        (batch,) = loader.step(consumed).batches
        consumed += BATCH
        yield batch.input_ids.numel()


def _peer(folder: Path) -> Iterator[int]:
    """Tokens of each step, without end."""
    import datasets
    from torch.utils.data import DataLoader

    datasets.disable_progress_bars()
    stored = folder / "arrow"
    if not stored.exists():
        rows = _dataset(folder)
        names = ("input_ids", "labels", "position_ids", "document_ids")
        made = [dict(zip(names, rows.row(index), strict=True)) for index in range(len(rows))]
        datasets.Dataset.from_list(made).save_to_disk(stored)
    found = datasets.load_from_disk(stored).with_format("torch")
    while True:
        rows: Any = found
        loader = DataLoader(rows, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=2)
        for batch in loader:
            yield batch["input_ids"].numel()


def _dataset(folder: Path) -> RowDataset:
    from transformers import AutoTokenizer

    from launcher.config.schema import DataLoaderSection, DatasetSection
    from launcher.data.build import build_dataset

    source = DataLoaderSection(type="TextDataLoader", dataset_dir=str(TOKENIZER.parent / "train"))
    return build_dataset(
        DatasetSection(data_loader=source, packing=True),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        seq_length=SEQ_LENGTH,
        cache_dir=folder / "cache",
        once=lambda prepare: prepare(),
        log=lambda line: None,
    )


READERS = {OURS: _slipway, PEER: _peer}

if __name__ == "__main__":
    main()
