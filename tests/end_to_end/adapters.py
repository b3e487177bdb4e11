"""Jobs with adapters: a base as transformers saves it, and several jobs in the same processes."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from tests.ranks import run_ranks
from tests.workshop import BASE, Workshop, merged

STEPS, SAVED = 6, 3
MODEL = BASE["model"]["model_config"]
LORA = {"lora_rank": 2, "lora_alpha": 8}


def write_base(folder: Path, tokenizer: Path | None = None, *, seed: int = 0) -> Path:
    """A random Qwen3 with the sizes of the workshop, as transformers saves it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    sizes = {key: value for key, value in MODEL.items() if key != "type"}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, initializer_range=0.1))
    model.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def lora_yaml(workshop: Workshop, name: str, pet: dict[str, Any], **changes: Any) -> str:
    """A run that trains an adapter of `base/` and saves in the middle and at the end."""
    more = {
        "pretrained_model_dir": "base",
        "pet_config": pet,
        "train_dataset": {"seq_length": 16},
        "runner_config": {"batch_size": 8, "max_steps": STEPS},
        "optimizer": {"eps": 1e-3},
        "lr_schedule": {"learning_rate": 5e-2, "warmup_steps": 1},
        "callbacks": [{"type": "CheckpointMonitor", "save_checkpoint_steps": SAVED}],
    }
    base = {**BASE, "model": None}
    return workshop.yaml(name, base=merged(base, more), **changes)


def run_jobs(workshop: Workshop, world_size: int, jobs: Sequence[Sequence[str]]) -> list[str]:
    """Run jobs one after another on the same ranks: what rank 0 printed of each, or the error of
    the user that it ended with."""
    answers = run_ranks(world_size, _run_all, [list(job) for job in jobs], str(workshop.folder))
    return list(answers[0])


def _run_all(jobs: list[list[str]], folder: str) -> list[str]:
    from launcher.parallel import world as worlds

    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    texts = []
    for arguments in jobs:
        texts.append(_run(arguments, world))
        gc.collect()
    worlds.stop(world)
    return texts


def _run(arguments: list[str], world: Any) -> str:
    """`launcher.cli.main` with a world that is there already."""
    from launcher import modes
    from launcher.builders.job import Job
    from launcher.config import rules
    from launcher.config.command_line import parse
    from launcher.config.resolve import resolve_command_line
    from launcher.report.console import Console

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        found = resolve_command_line(parse(arguments))
        problems = [*found.problems, *rules.check(
            found.config, found.provenance, world=world.size, bad_keys=found.bad_keys)]  # fmt: skip
        if problems:
            return "\n".join(map(str, problems))
        job = Job(found.config, found.provenance, world, Console(enabled=world.is_main))
        modes.open_output(found.config, world)
        try:
            modes.MODES[found.config.run_mode or "train"](job)
        except UserError as error:
            return str(error)
        finally:
            modes.close_logs()
    return out.getvalue()
