"""The sections of `python -m benchmarks.gpu`, in the order in which they run."""

from __future__ import annotations

from benchmarks.gpu.driver import Section
from benchmarks.gpu.sections import decoding, environment, exactness, files, training

SECTIONS: tuple[Section, ...] = (
    Section("environment", environment.cases),
    Section("repeat", exactness.repeat),
    Section("memory_keys", exactness.keeping_less),
    Section("documents", exactness.documents),
    Section("train_1b", training.train_1b),
    Section("train_8b", training.train_8b),
    Section("experts", training.experts),
    Section("load", files.load),
    Section("save", files.save),
    Section("decode", decoding.decode),
)
