"""Tokens per second and memory of data, tensor and pipeline parallel, against plain torch.

    python -m benchmarks.parallel [--axis all] [--rounds 9] [--write]

Four ranks over gloo, one thread each, train a Llama of eight million parameters in float32: the
launcher as `run.py` does it from YAML, and `peers/plain.py`, the same by hand in plain torch. Both
see the same tokens, start from the same weights and must have the same losses.

Speed: both live in the same four processes and take turns of a few steps, the order changing every
round (`peers/turns.py`); time runs from barrier to barrier and holds all that either does by
itself. Other work on the machine spoils the clock more than the seconds of processor that the four
ranks took together, so these are compared too. Memory: each alone in four processes; the peak of
resident memory without what the imports took, the largest of the ranks.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.jobs import TOKENIZER, full_rows, quickstart_data
from benchmarks.measure import ROOT, Spread, in_turns, parser, ratios, report, table

RANKS = 4
ROWS, LENGTH = 8, 256
"""A global batch."""
ROUND_STEPS = 2
MEMORY_STEPS = 4
MEMORY_ROUNDS = 5
TIMEOUT_SECONDS = 1200
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
AXES: dict[str, dict[str, Any]] = {
    "dp": {"data_parallel": RANKS},
    "tp": {"model_parallel": RANKS, "vocab_emb_dp": False},
    "pp": {"pipeline_stage": RANKS, "micro_batch_num": ROWS},
}
"""`parallel_config` of each; a pipeline has one row a micro-batch."""
LEARNING_RATE, EPSILON = 1e-3, 1e-6
HEADER = ("4 ranks", "Slipway, tokens/s", "plain torch, tokens/s",
          "ratio (above 1: Slipway is faster)", "ratio by processor time", "Slipway, MB",
          "plain torch, MB", "ratio (below 1: Slipway takes less)")  # fmt: skip


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments_parser = parser("benchmarks.parallel", __doc__, rounds=9)
    arguments_parser.add_argument("--axis", choices=(*AXES, "all"), default="all")
    arguments = arguments_parser.parse_args()
    quickstart_data()
    axes = AXES if arguments.axis == "all" else (arguments.axis,)
    before = os.getloadavg()[2]
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(axis, arguments.rounds, Path(folder, axis)) for axis in axes]
    load = f"Load over a quarter of an hour: {before:.0f} before, {os.getloadavg()[2]:.0f} after."
    report("Parallel", "benchmarks.parallel", arguments, f"{table(HEADER, rows)}\n\n{load}")


def compare(axis: str, rounds: int, folder: Path) -> tuple[str, ...]:
    """The line of one axis."""
    folder.mkdir()
    write_tokens(full_rows(folder / "rows.jsonl", count=200), folder / "tokens.npy")
    turns = speed(axis, rounds, folder)
    tokens = ROWS * LENGTH * ROUND_STEPS
    ours, theirs = ([tokens / seconds for seconds in turns[side]] for side in ("ours", "theirs"))
    faster = ratios(ours, theirs)
    thriftier = ratios(turns["theirs_cpu"], turns["ours_cpu"])
    memory = in_turns(
        {side: partial(peak_megabytes, axis, side, folder) for side in ("ours", "plain")},
        MEMORY_ROUNDS,
        warm_up=False,
    )
    print(f"{axis}: losses within {turns['worst']:.0e}; {faster.text()}", file=sys.stderr)
    return (
        axis,
        Spread.of(ours).text(",.0f"),
        Spread.of(theirs).text(",.0f"),
        faster.text(),
        thriftier.text(),
        Spread.of(memory["ours"]).text(",.0f"),
        Spread.of(memory["plain"]).text(",.0f"),
        ratios(memory["ours"], memory["plain"]).text(),
    )


def speed(axis: str, rounds: int, folder: Path) -> dict[str, Any]:
    """What `peers/turns.py` writes down, after a warm-up."""
    steps = ROUND_STEPS * (rounds + 1)
    job = write_job(axis, steps, folder)
    callback = {"type": "Turns", "job": str(job), "each": ROUND_STEPS}
    launch(write_yaml(axis, steps, folder, callback), folder)
    result: dict[str, Any] = json.loads((folder / "turns.json").read_text())
    return result


def peak_megabytes(axis: str, side: str, folder: Path) -> float:
    """The peak of a side alone, without its imports, of the rank that takes most."""
    job = write_job(axis, MEMORY_STEPS, folder)
    if side == "ours":
        callback = {"type": "Memory", "job": str(job)}
        launch(write_yaml(axis, MEMORY_STEPS, folder, callback), folder)
    else:
        run_ranks(("benchmarks/peers/plain.py", job), folder)
    measured = [json.loads((folder / f"{side}_{rank}.json").read_text()) for rank in range(RANKS)]
    return max(peak - before for before, peak in measured) * 1024 / 1e6


def write_job(axis: str, steps: int, folder: Path) -> Path:
    """The job as the peer reads it."""
    content = {
        "axis": axis, "model": MODEL, "steps": steps, "global_batch": ROWS, "micro_batches": ROWS,
        "learning_rate": LEARNING_RATE, "eps": EPSILON, "tokens": str(folder / "tokens.npy"),
        "results": str(folder),
    }  # fmt: skip
    path = folder / "job.json"
    path.write_text(json.dumps(content))
    return path


def write_yaml(axis: str, steps: int, folder: Path, callback: dict[str, Any]) -> Path:
    """The job as the launcher reads it."""
    shares = {"dp": RANKS, "tp": 1, "pp": ROWS}
    content = {
        "output_dir": str(folder / "output"),
        "model": {"model_config": {"type": "LlamaConfig", **MODEL}},
        "processor": {"tokenizer": {"pretrained_model_dir": str(TOKENIZER)}},
        "train_dataset": {
            "data_loader": {"type": "HFDataLoader", "dataset_dir": str(folder / "rows.jsonl"),
                            "shuffle": False},
            "seq_length": LENGTH,
            "packing": False,
        },
        "runner_config": {"batch_size": ROWS // shares[axis], "max_steps": steps, "epochs": 100},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": EPSILON, "weight_decay": 0.1},
        "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": LEARNING_RATE,
                        "warmup_steps": 0},
        "runner_wrapper": {"max_grad_norm": 1.0},
        "parallel_config": AXES[axis],
        "context": {"device_target": "CPU"},
        "register_path": str(ROOT / "benchmarks" / "peers" / "turns.py"),
        "callbacks": [callback],
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(json.dumps(content, indent=1))  # YAML reads JSON
    return path


def write_tokens(source: Path, target: Path) -> None:
    """The rows of a JSONL file as the peer reads them: the first tokens of each document."""
    script = """
import json, sys
import numpy as np
from transformers import AutoTokenizer
source, target, tokenizer, length = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(source)]
encoded = AutoTokenizer.from_pretrained(tokenizer)(texts, add_special_tokens=False)["input_ids"]
np.save(target, np.array([ids[: int(length) + 1] for ids in encoded], dtype=np.int32))
"""
    words = (sys.executable, "-c", script, source, target, TOKENIZER, str(LENGTH))
    subprocess.run([str(word) for word in words], check=True)


def launch(config: Path, folder: Path) -> None:
    """Train with the launcher on four ranks."""
    run_ranks(("run.py", "--config", config, "--run_mode", "train"), folder)


def run_ranks(words: Sequence[str | Path], folder: Path) -> None:
    """A Python script on four ranks. Raises RuntimeError with what the first that failed said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"log_{rank}.txt" for rank in range(RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with log.open("w") as output:
            processes.append(subprocess.Popen(
                [sys.executable, *(str(word) for word in words)],
                cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            ))  # fmt: skip
    failed = _first_that_fails(processes)
    if failed is not None:
        tail = "\n".join(logs[failed].read_text().splitlines()[-20:])
        raise RuntimeError(f"rank {failed} failed:\n{tail}")


def _first_that_fails(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all, or for the first that fails, or for too long; the others are ended then."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    try:
        while any(process.poll() is None for process in processes):
            codes = [process.poll() for process in processes]
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        unfinished = [rank for rank, code in enumerate(codes) if code is None]
        return next(iter(failed + unfinished), None)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


if __name__ == "__main__":
    main()
