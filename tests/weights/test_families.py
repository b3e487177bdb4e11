"""Every family from disk to logits and back, on any layout, held against transformers.

Real ranks load a directory as a job does, compute logits, and write their rank files; the merge of
these is the directory again, bit for bit.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launcher.weights.joined import together
from launcher.weights.offline.export import write_complete
from launcher.weights.ranks.distributed import open_rank_files
from models.build import hf_directory_files
from models.families import model_spec
from tests.ranks import run_ranks
from tests.weights.directories import (
    DENSE,
    EXPERTS,
    MODULES,
    make,
    make_in_4_bits,
    make_in_8_bits,
)
from tests.workshop import BASE, VOCABULARY, Workshop, merged

FP8 = "deepseek_v3 fp8"
MXFP4 = "gpt_oss mxfp4"
QUANTISED = (FP8, MXFP4)


@dataclass(frozen=True)
class Case:
    """A family on a layout."""

    family: str
    dp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    sharded: bool = False

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def folder(self) -> str:
        """Of its weights, in the workshop."""
        return self.family.replace(" ", " made/")

    @property
    def plain(self) -> str:
        """Of the same weights, not in 8 bits."""
        base, _, is_quantised = self.family.partition(" ")
        return f"{base} made/plain" if is_quantised else self.family

    def yaml(self) -> dict[str, Any]:
        pipeline = {"micro_batch_num": self.pp} if self.pp > 1 else {}
        return merged(BASE, {
            "pretrained_model_dir": self.folder,
            "model": {"model_config": None},
            "train_dataset": {"packing": False},
            "callbacks": [],
            "parallel_config": {
                "data_parallel": self.dp, "model_parallel": self.tp, "pipeline_stage": self.pp,
                "expert_parallel": self.ep, **pipeline,
            },
            "parallel": {"enable_parallel_optimizer": self.sharded},
        })  # fmt: skip

    def __str__(self) -> str:
        axes = {"dp": self.dp, "tp": self.tp, "pp": self.pp, "ep": self.ep}
        text = " ".join(f"{axis}{size}" for axis, size in axes.items() if size > 1)
        return f"{self.family}: {text}" + " sharded" * self.sharded


QUICK = [
    Case("llama", dp=2, tp=2, sharded=True),
    Case("mistral", tp=2, pp=2),
    Case("qwen2", dp=2, pp=2, sharded=True),
    Case("qwen2.5", tp=4),
    Case("qwen3", dp=4, sharded=True),
    Case("qwen3_moe", dp=2, tp=2, ep=2, sharded=True),
    Case("mixtral", dp=2, pp=2, ep=2),
    Case("glm", dp=2, tp=2, sharded=True),
    Case("glm4", tp=2, pp=2),
    Case("glm4_moe", dp=2, tp=2, ep=2, sharded=True),
    Case("gpt_oss", dp=2, tp=2, ep=2, sharded=True),
    Case("gpt_oss", tp=2, pp=2),
    Case(FP8, dp=2, tp=2, ep=2, sharded=True),
    Case(FP8, tp=2, pp=2),
    Case(MXFP4, dp=2, tp=2, ep=2, sharded=True),
    Case(MXFP4, tp=4),
    *(Case(family, dp=4, sharded=True) for family in MODULES),
]

_LAYOUTS: list[dict[str, Any]] = [
    {"dp": 4}, {"dp": 4, "sharded": True}, {"tp": 4}, {"dp": 2, "tp": 2, "sharded": True},
    {"tp": 2, "pp": 2}, {"dp": 2, "pp": 2, "sharded": True}, {"dp": 3, "sharded": True}, {"pp": 3},
]  # fmt: skip
_EXPERT_LAYOUTS: list[dict[str, Any]] = [
    {"dp": 4, "ep": 4}, {"dp": 4, "ep": 2, "sharded": True}, {"dp": 2, "tp": 2, "ep": 2},
    {"dp": 2, "tp": 2, "ep": 2, "sharded": True}, {"dp": 2, "pp": 2, "ep": 2, "sharded": True},
]  # fmt: skip
LONG = [Case(f, **layout) for f in (*DENSE, *EXPERTS, *QUANTISED) for layout in _LAYOUTS]
LONG += [Case(f, **layout) for f in (*EXPERTS, *QUANTISED) for layout in _EXPERT_LAYOUTS]
LONG += [Case(f, dp=n, sharded=s) for f in MODULES for n in (2, 3) for s in (True, False)]


def test_a_family_a_layout(workshop: Workshop) -> None:
    check(workshop, QUICK)


@pytest.mark.long
@pytest.mark.parametrize("family", [*DENSE, *EXPERTS, *QUANTISED, *MODULES])
def test_families_on_all_layouts(workshop: Workshop, family: str) -> None:
    check(workshop, [case for case in LONG if case.family == family])


def check(workshop: Workshop, cases: list[Case]) -> None:
    """Logits of every rank, and the merge of all rank files, are those of transformers."""
    for family in dict.fromkeys(case.family for case in cases):
        _make(workshop.folder, family)
    for size in sorted({case.ranks for case in cases}):
        mine = [case for case in cases if case.ranks == size]
        found = run_ranks(size, _ranks_main, str(workshop.folder), mine)
        for index, case in enumerate(mine):
            _check_logits(case, workshop.folder, [result[index] for result in found])
            _check_export(case, workshop.folder)


def _make(folder: Path, family: str) -> None:
    base = family.split()[0]
    if family == MXFP4:  # whose blocks are of 32 numbers
        origin = make(base, folder / f"{base} wide", intermediate_size=96)
        make_in_4_bits(origin, folder / f"{base} made")
        return
    origin = make(base, folder / base)
    if family == FP8:
        make_in_8_bits(origin, folder / f"{base} made")


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))


Logits = tuple[int, np.ndarray]
"""(first column, [rows, length, columns]) of the vocabulary, where the model ends."""


def _ranks_main(folder: str, cases: list[Case]) -> list[Logits | None]:
    from launcher.parallel import world as worlds

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    results = []
    for case in cases:
        results.append(_run(case, world))
        gc.collect()
    worlds.stop()
    return results


def _run(case: Case, world: Any) -> Logits | None:
    """Load as a job does; logits; the rank file."""
    from launcher.builders.job import Job
    from launcher.builders.load_weights import find_weights, load_or_init
    from launcher.builders.model import build_parallel
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.parallel.apply import shards
    from launcher.report.console import Console
    from launcher.weights.ranks.rank_file import write_rank_file
    from launcher.weights.tensor_mapping import mapped
    from models.build import mappings_of

    name = f"{case} {world.rank}.yaml"
    Path(name).write_text(yaml.safe_dump(case.yaml()))
    resolved = resolve_command_line(parse(["--config", name, "--run_mode", "train"]))
    assert not resolved.problems, resolved.problems
    job = Job(resolved.config, resolved.provenance, world, Console(enabled=False))
    built = build_parallel(job, training=True)
    load_or_init(job, built.parts, built.layout, find_weights(job))
    held = shards(built.parts.named_tensors(), built.layout, world.rank)
    file = Path(str(case), f"rank_{world.rank}", f"m_rank_{world.rank}-1_1.safetensors")
    file.parent.mkdir(parents=True)
    write_rank_file(
        file, mapped(held, mappings_of(built.parts.modules[-1])), mesh=job.mesh, rank=world.rank
    )
    return _logits(job, built)


def _logits(job: Any, built: Any) -> Logits | None:
    from launcher.train.compute import MicroBatch

    seen: list[torch.Tensor] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor, *, by_row: bool) -> torch.Tensor:
        seen.append(logits.float())
        return logits.new_zeros(())

    built.parts.train(False)
    with torch.no_grad():
        replace(built.compute, loss=loss).evaluate(MicroBatch(_ids(), _ids(), {}))
    if not seen:
        return None
    logits = torch.cat(seen)
    columns = logits.shape[-1]
    first = job.mesh.coordinates(job.world.rank)["tp"] * columns if columns < VOCABULARY else 0
    return first, logits.numpy()


def _check_logits(case: Case, folder: Path, found: list[Logits | None]) -> None:
    module = AutoModelForCausalLM.from_pretrained(folder / case.plain, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = module(_ids()).logits
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    for first, values in filter(None, found):
        logits = torch.from_numpy(values)
        columns = slice(first, first + logits.shape[-1])
        seen[columns] = True
        worst = (logits - expected[..., columns]).abs().max() / expected.abs().max()
        assert worst < 1e-5, f"{case}: logits differ by {worst:.1e} of the largest"
    assert seen.all(), case


def _check_export(case: Case, folder: Path) -> None:
    files = sorted((folder / str(case)).glob("rank_*/*.safetensors"))
    assert len(files) == case.ranks
    out = folder / str(case) / "merged"
    out.mkdir()
    spec = model_spec({}, json.loads((folder / case.folder / "config.json").read_text()))
    write_complete(together(open_rank_files(folder / str(case), files), spec.hf_config), out)
    for name, content in hf_directory_files(spec, None, dtype=torch.float32).items():
        (out / name).write_bytes(content)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    held = load_file(out / "model-00001-of-00001.safetensors")
    original = load_file(folder / case.plain / "model.safetensors")
    assert set(held) == set(original), case
    for name, tensor in original.items():
        assert held[name].dtype == tensor.dtype, f"{case}: {name}"
        assert torch.equal(held[name], tensor), f"{case}: {name}"
    _, reported = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not reported["missing_keys"], case
    assert not reported["unexpected_keys"], case
