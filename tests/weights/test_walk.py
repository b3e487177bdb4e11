"""The walk from `find_weights` to the bytes of an ordinary Hugging Face folder, file by file.

What counts is every file of `launcher/` in which a function is entered, in any thread, but for
`BELOW`: what needs no knowledge of weights on disk (arithmetic of boxes, threads, collectives), and
how bytes get into memory.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import launcher
from launcher.builders.job import Job
from launcher.builders.load_weights import find_weights
from launcher.config.command_line import parse
from launcher.config.resolve import resolve_command_line
from launcher.layout.box import Box
from launcher.layout.shard import Shard
from launcher.modes import world_without_group
from launcher.report.console import Console
from launcher.weights.reading.load import load
from tests.workshop import BASE, merged

ROOT = Path(launcher.__file__).parent
OPEN = {
    "builders/load_weights.py",  # which path
    "checkpoint/resolve.py",  # policy of all ranks
    "weights/source.py",  # detect
    "weights/complete.py",  # validate: which files
    "weights/forms.py",  # and their index
    "weights/formats/__init__.py",  # validate: their headers
    "weights/formats/safetensors.py",
}
LOAD = {
    "weights/source.py",
    "weights/reading/load.py",  # what fits the model
    "weights/reading/plan.py",  # plan
    "weights/reading/read.py",  # read
}
BELOW = (
    "extensions.py", "streams.py", "layout/", "parallel/", "report/", "config/", "builders/job.py",
    "weights/gc_pause.py", "weights/threads.py",
    "weights/reading/strided_copy.py", "weights/reading/tensor_bytes.py",
    "weights/reading/transfer.py", "weights/reading/pages.py", "weights/reading/window.py",
)  # fmt: skip


@contextmanager
def traced() -> Iterator[set[str]]:
    """The files of `launcher/` in which functions are entered, but for `BELOW`."""
    entered: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name != "<module>" and file.is_relative_to(ROOT):
            name = file.relative_to(ROOT).as_posix()
            if not name.startswith(BELOW):
                entered.add(name)

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield entered
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]


def job_of(folder: Path, **changes: Any) -> Job:
    file = folder / "run.yaml"
    base = merged(BASE, {"model": {"model_config": None}, "callbacks": [], **changes})
    file.write_text(yaml.safe_dump(base))
    resolved = resolve_command_line(parse(["--config", str(file), "--run_mode", "finetune"]))
    assert not resolved.problems, resolved.problems
    job = Job(resolved.config, resolved.provenance, world_without_group(), Console(enabled=False))
    assert job.spec.decoder is not None  # from config.json, read before weights are looked for
    return job


def sharded(folder: Path) -> LlamaForCausalLM:
    """A model in a folder of several files and an index."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    ))  # fmt: skip
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len([*folder.glob("*.safetensors")]) > 1
    return model


KEYS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "load_checkpoint": lambda folder: {
        "load_checkpoint": str(folder), "pretrained_model_dir": str(folder)
    },
    "pretrained_model_dir": lambda folder: {"pretrained_model_dir": str(folder)},
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_ten_files_from_a_folder_to_the_tensors(tmp_path: Path, key: str) -> None:
    model = sharded(tmp_path / "model")
    job = job_of(tmp_path, **KEYS[key](tmp_path / "model"))
    with traced() as opening:
        weights = find_weights(job)
    assert weights is not None
    source = weights.source
    assert source is not None
    assert opening == OPEN

    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    half = {
        name: Shard(shape, Box((0,) * len(shape), (shape[0] // 2, *shape[1:])),
                    torch.empty(shape[0] // 2, *shape[1:]))
        for name, shape in expected.items()
    }  # fmt: skip
    with traced() as loading:
        load(half, source, expected=expected)
    assert loading == LOAD
    assert len(OPEN | LOAD) <= 10
    for name, tensor in model.state_dict().items():
        assert torch.equal(half[name].tensor, tensor[: tensor.shape[0] // 2]), name
