"""Whether and how the layers of a job are compiled.

Owns the meaning of `compile: auto`: inductor on CUDA, where it works and the job has nothing that
compiled layers cannot do; eager elsewhere. All ranks decide the same.
"""

from __future__ import annotations

from functools import partial

from launcher.builders.job import Job
from launcher.config.derived import splits_backward
from launcher.errors import UserError
from launcher.parallel.compiling import DEFAULT_BACKEND, Compiler, make_repeatable, why_unusable
from launcher.train.moments import Compile

AUTO, KEY = "auto", "compile"


def compiler_of(job: Job, *, is_decoder: bool) -> Compiler | None:
    """The compiler of the layers; None: they run eagerly. Called by all ranks together.

    `is_decoder`: the layers are Slipway's, not those of a module of transformers. Raises UserError
    if the configured backend cannot compile on this machine.
    """
    value, device = job.config.compile, job.world.device
    if value is False:
        return None
    automatic = value == AUTO
    if automatic and device.type != "cuda":
        return None
    why = _why_not(job, is_decoder=is_decoder) if automatic else ""
    backend = value if isinstance(value, str) and not automatic else DEFAULT_BACKEND
    if not why and backend == DEFAULT_BACKEND:
        why = _why_unusable(job, backend)
        if why and not automatic:
            raise UserError(
                f"{KEY} = {value}: {backend} cannot compile for {device.type}: {why}",
                where=job.provenance.where(KEY),
                rule="inductor needs a C++ compiler, and triton on CUDA",
                nearest="Nearest: False",
                advice="Install them, or leave the key out: `auto` runs eagerly without them",
            )
    if why:
        job.log(f"compile: off ({AUTO}): {why}")
        return None
    if backend == DEFAULT_BACKEND:
        make_repeatable()
    job.log(f"compile: {backend}, every layer on its first run{f' ({AUTO})' if automatic else ''}")
    return Compiler(backend, automatic, job.provenance.where(KEY), job.log)


def optimizer_compiler(job: Job) -> Compile | None:
    """What compiles the update of an optimizer without a fused kernel of torch; None: it runs
    eagerly, as on the CPU, in several passes over memory. Called by all ranks together."""
    if job.world.device.type != "cuda" or job.config.compile not in (AUTO, True, DEFAULT_BACKEND):
        return None
    if _why_unusable(job, DEFAULT_BACKEND):
        return None
    compiler = Compiler(DEFAULT_BACKEND, True, log=job.log)
    return partial(compiler.compiled, dynamic=True)


def _why_not(job: Job, *, is_decoder: bool) -> str:
    """Why `auto` leaves the layers of a job on CUDA eager; empty if it compiles them."""
    if not is_decoder:
        return f"{job.spec.family} runs through its transformers module"
    if splits_backward(job.config):
        return "the pipeline schedule splits the backward pass, which a compiled layer has in one"
    return ""


def _why_unusable(job: Job, backend: str) -> str:
    """Why some rank cannot compile; empty if all can."""
    found = job.world.gather(why_unusable(backend, job.world.device))
    return next((why for why in found if why), "")
