"""The order of samples of Megatron's datasets: building it, and seeking in it.

    python -m benchmarks.megatron_index [--rounds 5] [--write]

Build: one dataset of 10^9 tokens (10^6 documents in a genuine `.idx`, the `.bin` a sparse file),
from an empty cache to the first row, with our loader and with Megatron-core's GPTDataset where
`megatron.core` can be imported (PYTHONPATH may name an unpacked wheel, which has its compiled
helper). Each build is a process of its own; imports are not counted. Both orders must be equal.

Seek: sample 10^9 of an order of 4 * 10^12 tokens, of which the parts that are read are genuine.
Time from the open maps to the row, and memory of the process, of which the imports alone are the
base.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, Spread, in_turns, parser, ratios, report, table
from launcher.data.array_folder import NewArray, open_array_folder, write_arrays
from launcher.data.megatron.header import HEADER, MAGIC, VERSION
from launcher.data.megatron.indexed import open_indexed
from launcher.data.megatron.order import OrderSettings, SampleOrder, build_order
from launcher.data.megatron.rows import MegatronRows, Part, RowRules

SEQ_LENGTH, SEED = 4096, 1234
DOCUMENTS, TOKENS = 10**6, 10**9
EPOCHS = {"1 epoch": 244_000, "3 epochs": 700_000}
FAR_DOCUMENTS, FAR_LENGTH = 10**7, 409_700
FAR_SAMPLE = 10**9
OURS, THEIRS = "Slipway", "megatron-core"


def main() -> None:
    """Measure, print, and keep the result when asked to; or be one of the measured processes."""
    if sys.argv[1:2] == ["worker"]:
        print(json.dumps(WORKERS[sys.argv[2]](*sys.argv[3:])))
        return
    arguments = parser("benchmarks.megatron_index", __doc__, rounds=5).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        body = _building(folder, arguments.rounds) + "\n\n" + _seeking(folder, arguments.rounds)
    report("Index of Megatron's datasets", "benchmarks.megatron_index", arguments, body)


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _building(folder: Path, rounds: int) -> str:
    prefix = folder / "corpus"
    lengths = np.random.default_rng(0).lognormal(6.4, 1.0, DOCUMENTS)
    _write_index(prefix, np.maximum(lengths * (TOKENS / lengths.sum()), 1).astype(np.int32))
    sides = [OURS, *([THEIRS] if importlib.util.find_spec("megatron") else [])]
    lines = []
    for name, samples in EPOCHS.items():
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        measures = {
            side: partial(_build, side, prefix, samples, folder / "cache", found[side])
            for side in sides
        }
        seconds = in_turns(measures, rounds)
        digests = {entry["digest"] for entries in found.values() for entry in entries}
        assert len(digests) == 1, "the orders differ"
        lines.append((
            name,
            *(Spread.of(seconds[side]).text() if side in sides else "not installed"
              for side in (OURS, THEIRS)),
            ratios(seconds[OURS], seconds[THEIRS]).text() if THEIRS in sides else "",
            _processor_ratio(found) if THEIRS in sides else "",
            *(Spread.of([entry["megabytes"] for entry in found[side]]).text(",.0f")
              if side in sides else "" for side in (OURS, THEIRS)),
        ))  # fmt: skip
    return table(
        (f"{TOKENS:,} tokens, {DOCUMENTS:,} documents", f"{OURS}, seconds", f"{THEIRS}, seconds",
         "ratio (below 1: Slipway is faster)", "ratio by processor time", f"{OURS}, MB",
         f"{THEIRS}, MB"),
        lines,
    )  # fmt: skip


def _processor_ratio(found: dict[str, list[dict[str, Any]]]) -> str:
    ours, theirs = ([entry["processor"] for entry in found[side][1:]] for side in (OURS, THEIRS))
    return ratios(ours, theirs).text()


def _build(
    side: str, prefix: Path, samples: int, cache: Path, found: list[dict[str, Any]]
) -> float:
    subprocess.run(["rm", "-rf", str(cache)], check=True)
    found.append(_worker(side, str(prefix), str(samples), str(cache)))
    return float(found[-1]["seconds"])


def _seeking(folder: Path, rounds: int) -> str:
    prefix = folder / "far"
    _write_index(prefix, np.full(FAR_DOCUMENTS, FAR_LENGTH, dtype=np.int32))
    samples = FAR_DOCUMENTS * FAR_LENGTH // SEQ_LENGTH
    write_arrays(_new(folder / "order"), partial(_fill_far, samples))
    found = [_worker("seek", str(prefix), str(folder / "order")) for _ in range(rounds)]

    def spread(key: str, form: str = ",.2f") -> str:
        return Spread.of([entry[key] for entry in found]).text(form)

    return table(
        (f"sample {FAR_SAMPLE:,} of {samples:,}", "", "aim"),
        [
            ("first row, ms", spread("first_ms"), "under 10"),
            ("another row, ms", spread("other_ms"), "under 10"),
            ("opening the maps, ms", spread("open_ms"), ""),
            ("memory of the process, MB", spread("megabytes", ",.0f"), "under 200"),
            ("of which the imports, MB", spread("base_megabytes", ",.0f"), ""),
        ],
    )


def _fill_far(samples: int, new_array: NewArray) -> dict[str, Any]:
    documents = new_array("documents", np.int32, FAR_DOCUMENTS)
    documents[:] = np.arange(FAR_DOCUMENTS)
    ends = new_array("ends", np.int64, FAR_DOCUMENTS)
    ends[:] = np.arange(1, FAR_DOCUMENTS + 1) * FAR_LENGTH
    shuffle = new_array("shuffle", np.uint32, samples)  # zeros take no room on disk
    shuffle[FAR_SAMPLE], shuffle[FAR_SAMPLE - 777] = 123_456_789, 987_654_321
    return {}


def _write_index(prefix: Path, lengths: np.ndarray[Any, np.dtype[np.int32]]) -> None:
    """A genuine `.idx`, and a `.bin` of uint16 zeros without blocks on disk."""
    count = len(lengths)
    ends = np.cumsum(lengths.astype(np.int64)) * 2
    with prefix.with_suffix(".idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, count, count + 1))
        lengths.tofile(file)
        (ends - lengths.astype(np.int64) * 2).tofile(file)
        np.arange(count + 1, dtype=np.int64).tofile(file)
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(int(ends[-1]))


def _worker(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.megatron_index", "worker", *words]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True,
                          check=False)  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ours(prefix: str, samples: str, cache: str) -> dict[str, Any]:
    """The order of one dataset in the cache, as the loader makes it: the index checked too."""
    np.random.RandomState(0).shuffle(np.arange(2))  # numpy imports its random numbers late
    folder, started = Path(cache, "order"), (time.perf_counter(), time.process_time())

    def fill(new_array: NewArray) -> dict[str, Any]:
        data = open_indexed(prefix)  # checked
        settings = OrderSettings(first=0, stop=len(data), seq_length=SEQ_LENGTH, seed=SEED,
                                 samples=int(samples))  # fmt: skip
        build_order(data.lengths, settings, new_array)
        return {}

    write_arrays(_new(folder), fill)
    rows = _open(prefix, folder)
    rows.row(0)
    seconds = _since(started)
    order = rows.parts[0].order
    return _measured(seconds, order.documents, order.shuffle)


def _theirs(prefix: str, samples: str, cache: str) -> dict[str, Any]:
    """GPTDataset with a cache."""
    gpt, indexed, utils = (
        importlib.import_module(f"megatron.core.datasets.{name}")
        for name in ("gpt_dataset", "indexed_dataset", "utils")
    )
    started = time.perf_counter(), time.process_time()
    data = indexed.IndexedDataset(prefix, mmap=True)
    ids = {"eod": 65535, "pad": 65534, "vocab_size": 65536, "unique_identifiers": {}}
    tokenizer = type("Tokenizer", (), ids)()
    config = gpt.GPTDatasetConfig(
        random_seed=SEED, sequence_length=SEQ_LENGTH, split="1", path_to_cache=cache,
        tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    dataset = gpt.GPTDataset(data, prefix, np.arange(len(data.sequence_lengths), dtype=np.int32),
                             int(samples), utils.Split.train, config)  # fmt: skip
    dataset[0]
    seconds = _since(started)
    return _measured(seconds, dataset.document_index, dataset.shuffle_index)


def _since(started: tuple[float, float]) -> dict[str, float]:
    """Seconds and processor seconds since then."""
    return {
        "seconds": time.perf_counter() - started[0],
        "processor": time.process_time() - started[1],
    }


def _measured(seconds: dict[str, float], documents: Any, shuffle: Any) -> dict[str, Any]:
    from xxhash import xxh3_128

    megabytes = _peak_megabytes()
    digest = xxh3_128(np.asarray(documents).tobytes() + np.asarray(shuffle).tobytes()).hexdigest()
    return {**seconds, "digest": digest, "megabytes": megabytes}


def _seek(prefix: str, folder: str) -> dict[str, Any]:
    base, started = _peak_megabytes(), time.perf_counter()
    rows = _open(prefix, Path(folder))
    opened = time.perf_counter()
    rows.row(FAR_SAMPLE)
    first = time.perf_counter()
    rows.row(FAR_SAMPLE - 777)
    other = time.perf_counter()
    return {
        "open_ms": 1e3 * (opened - started), "first_ms": 1e3 * (first - opened),
        "other_ms": 1e3 * (other - first), "megabytes": _peak_megabytes(),
        "base_megabytes": base,
    }  # fmt: skip


def _open(prefix: str, folder: Path) -> MegatronRows:
    arrays = open_array_folder(folder, verify=False).arrays
    order = SampleOrder(documents=arrays["documents"], ends=arrays["ends"],
                        shuffle=arrays["shuffle"], seq_length=SEQ_LENGTH, extra_token=True,
                        )  # fmt: skip
    part = Part(data=open_indexed(prefix, check=False), order=order)
    return MegatronRows([part], None, RowRules(seq_length=SEQ_LENGTH))


def _peak_megabytes() -> float:
    """The peak of this program; ru_maxrss would be at least that of the process that forked it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


WORKERS: dict[str, Callable[..., dict[str, Any]]] = {
    OURS: _ours,
    THEIRS: _theirs,
    "seek": _seek,
}

if __name__ == "__main__":
    main()
