"""The adapter that a training leaves in {output_dir}/adapter, as a directory of PEFT.

Owns that folder. It is made by rank 0 from the files of the newest save, after the last step.
Invariants: only a folder that an earlier run made is replaced, and never an input of the run; the
training is done, so that a failure here is a warning.
"""

from __future__ import annotations

from pathlib import Path

from launcher.builders.job import Job
from launcher.builders.resume import own_root
from launcher.checkpoint.catalog import Published, published
from launcher.errors import UserError
from launcher.parallel.all_ranks import capture_error
from launcher.train.run import TrainRun
from launcher.weights.offline.adapter import open_adapter, write_adapter
from launcher.weights.offline.copy_record import foreign, write_record
from launcher.weights.streaming.new_folder import folder_aside

KEY, FOLDER = "save_peft_adapter", "adapter"


def write_final_adapter(job: Job, run: TrainRun) -> None:
    """Write the adapter of the last step, if there is one and it was saved. Called by all ranks."""
    if job.spec.lora is None or not job.config.pet_config.save_peft_adapter:
        return
    if not job.world.is_main:
        return
    done = capture_error(_write, job, run)
    if done.error:
        job.log(f"warning: {job.output_dir / FOLDER} was not written: {done.error}")


def _write(job: Job, run: TrainRun) -> None:
    root = own_root(job.config)
    save = _last(root, run.global_step)
    if save is None:
        return
    target = job.output_dir / FOLDER
    if save.is_spread:
        raise UserError("rank 0 cannot read the files of all ranks", advice="Put the folders of "
                        "checkpoints together, and use launcher.tools.export_adapter")  # fmt: skip
    if reason := foreign(target, KEY):
        raise UserError(reason, advice="Use launcher.tools.export_adapter with another folder")
    place = target.resolve()
    if any(path.is_relative_to(place) for path in run.origin.inputs):
        raise UserError("the run started from it", advice="Use launcher.tools.export_adapter with "
                        "another folder")  # fmt: skip
    adapter = open_adapter(save.files[0])
    with folder_aside(target, root, overwrite=True, owned=True, option="output_dir") as folder:
        names = write_adapter(adapter, folder)
        write_record(folder, KEY)
    if adapter.warning:
        job.log(f"warning: {adapter.warning}")
    job.log(f"adapter: {len(names)} tensors in the form of PEFT in {target}")


def _last(root: Path, step: int) -> Published | None:
    """The newest save, if it is of the last step."""
    saves = published(root)
    return saves[-1] if saves and saves[-1].manifest.get("global_step") == step else None
