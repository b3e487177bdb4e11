"""Metadata of a run, saved for a resume to compare with its own.

Owns its keys in the state file. Progress (steps, samples) is in `launcher.train.state`.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from launcher.builders.data import TrainingData
from launcher.builders.job import Job
from launcher.builders.mixture_resume import MIXTURE, to_json
from launcher.config.flat import flat
from launcher.data.chat_rendering import ChatSettings
from launcher.data.mixture import MixtureOrder
from launcher.train.scaling import LossScaling

CHAT = "chat"
"""How conversations were rendered, for predict; left out where nothing about it is configured."""
_NOT_OF_THE_MODEL = {"transformers_version", "_name_or_path"}


def run_metadata(
    job: Job, data: TrainingData, global_batch: int, scaling: LossScaling | None
) -> dict[str, Any]:
    """The metadata of a training run, as JSON values."""
    return {
        "seed": job.config.seed,
        "global_batch_size": global_batch,
        "data": _data(data),
        "optimizer": job.config.optimizer.type,
        "schedule": job.config.lr_schedule.type,
        "loss_scaling": scaling.kind if scaling is not None else None,
        "configuration": flat(job.config),
        **({CHAT: job.chat.to_json()} if job.chat != ChatSettings() else {}),
        "model": _model(job),
        "versions": versions(job.world.device),
    }


def _data(data: TrainingData) -> dict[str, Any]:
    dataset, order = data.dataset, data.order
    common = {
        "seq_length": dataset.seq_length,
        "packing": dataset.packed,
        "order_seed": order.seed,
    }
    if isinstance(order, MixtureOrder):
        return {**common, MIXTURE: to_json(order)}
    return {
        "fingerprint": dataset.fingerprint,
        "rows": None if dataset.is_endless else len(dataset),
        **common,
        "shuffle": order.shuffle,
        **dataset.settings,
    }


def _model(job: Job) -> dict[str, Any]:
    """The configuration of the model after a round trip through JSON, without versions of code."""
    content: dict[str, Any] = json.loads(json.dumps(job.spec.hf_config))
    return {key: value for key, value in content.items() if key not in _NOT_OF_THE_MODEL}


def versions(device: torch.device) -> dict[str, str]:
    """The software and the device: with the same ones a run is bitwise reproducible."""
    found = {name: _version(name) for name in ("slipway", "torch", "transformers")}
    return {**found, "python": platform.python_version(), "device": _device_text(device)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device_text(device: torch.device) -> str:
    """The kind of device, and on a CPU what the order of floating-point sums depends on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    kind = torch.backends.cpu.get_cpu_capability()
    return f"CPU ({kind}, {threads} {'thread' if threads == 1 else 'threads'})"
