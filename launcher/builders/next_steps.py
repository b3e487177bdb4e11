"""The line after a training: the commands that use the model.

Owns which ones they are. Invariant: each runs as it is printed, from the same directory.
"""

from __future__ import annotations

import shlex

from launcher.builders.job import Job
from launcher.builders.resume import own_root
from launcher.config.chat_template import trains_on_conversations
from launcher.config.flat import flat

_AXES_OF_TRAINING = ("data_parallel", "context_parallel", "expert_parallel")
"""Degrees that share out the samples or experts of a training; a chat has one sample."""


def next_steps(job: Job, resolved: str) -> str:
    """How to chat with the model (or to continue a text, where it was not trained on conversations)
    and how to export it. `resolved`: the name of the file of the configuration."""
    root = shlex.quote(str(own_root(job.config)))
    config = shlex.quote(str(job.output_dir / resolved))
    export = shlex.quote(str(job.output_dir / "hf"))
    tool = "export" if job.spec.lora is None else "merge_lora"
    talks = trains_on_conversations(flat(job.config))
    how = "--interactive" if talks else "--predict_data 'The beginning of a text'"
    return (
        f"next: {_launcher(job)} run.py --config {config} --run_mode predict --load_checkpoint "
        f"{root} {how}{_reset_degrees(job)}   or: python -m launcher.tools.{tool} "
        f"--load_checkpoint {root} --output_dir {export}"
    )


def _launcher(job: Job) -> str:
    """A model that was cut into parts is run in as many: one part may be all that fits."""
    parts = job.mesh.tp * job.mesh.pp
    return "python" if parts == 1 else f"torchrun --nproc_per_node {parts}"


def _reset_degrees(job: Job) -> str:
    degrees = job.config.parallel_config
    reset = (name for name in _AXES_OF_TRAINING if getattr(degrees, name) > 1)
    return "".join(f" --parallel_config.{name} 1" for name in reset)
