"""Everything but MindSpore works without `launcher/mindspore`, with its entries or without them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.config.weight_files import MINDSPORE_CKPT
from tests.ranks import run_ranks
from tests.workshop import Workshop

ROOM = "launcher.mindspore"
NOT_INSTALLED = "Install Slipway with launcher/mindspore, or convert the files first"


class Hidden:
    """Finder of a tree without the room."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if f"{name}.".startswith(f"{ROOM}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide(*, entries: bool) -> None:
    """Forget all modules of the project, and import them without the room from now on; with
    `entries` also without its entries in `extensions`."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("launcher", "models")]:
        del sys.modules[name]
    sys.meta_path.insert(0, Hidden())  # type: ignore[arg-type]
    extensions = importlib.import_module("launcher.extensions")
    for table in vars(extensions).values():
        if entries and isinstance(table, dict):
            for key in [key for key, entry in table.items() if str(entry).startswith(ROOM)]:
                del table[key]


def answer(entries: bool, module: str, arguments: list[str], folder: str) -> tuple[int, str]:
    """Exit code and output of the command `module` in a process without the room."""
    hide(entries=entries)
    os.chdir(folder)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = importlib.import_module(module).main(arguments)
    return code, text.getvalue()


def command(entries: bool, module: str, folder: Path, *arguments: str) -> tuple[int, str]:
    return run_ranks(1, answer, entries, module, list(arguments), str(folder))[0]  # type: ignore[no-any-return]


def imported(entries: bool) -> list[str]:
    """The modules of the project that were imported without the room."""
    hide(entries=entries)
    project = importlib.import_module("launcher")
    names = [
        module.name for module in pkgutil.walk_packages(project.__path__, "launcher.")
        if not f"{module.name}.".startswith(f"{ROOM}.") and not module.name.endswith("__main__")
    ]  # fmt: skip
    for name in names:
        importlib.import_module(name)
    return names


@pytest.mark.parametrize("entries", [False, True])
def test_all_modules_are_imported(entries: bool) -> None:
    assert len(run_ranks(1, imported, entries)[0]) > 200


@pytest.mark.parametrize("entries", [False, True])
def test_train_resume_merge_and_predict(workshop: Workshop, entries: bool) -> None:
    name = workshop.yaml(
        runner_config={"max_steps": 4}, callbacks=[{"type": "CheckpointMonitor",
                                                    "save_checkpoint_steps": 2}],
    )  # fmt: skip

    def run(module: str, *arguments: str) -> str:
        code, output = command(entries, module, workshop.folder, *arguments)
        assert code == 0, output
        return output

    train = ("--config", name, "--run_mode", "train")
    run("launcher.cli", *train, "--runner_config.stop_step", "2")
    assert "step 2 of 4" in run("launcher.cli", *train, "--resume_training", "True")
    assert len(workshop.losses()) == 4
    assert not (workshop.folder / "output" / "strategy").exists()
    run("launcher.tools.verify", "output/checkpoint")
    run("launcher.tools.unified_safetensors", "--mindspore_ckpt_dir", "output/checkpoint",
        "--output_dir", "merged", "--file_suffix", "1_4",
        "--filter_out_param_prefix", "adam_")  # fmt: skip
    tensors = load_file(workshop.folder / "merged" / "model-00001-of-00001.safetensors")
    assert "model.embed_tokens.weight" in tensors
    output = run("launcher.cli", "--config", name, "--run_mode", "predict", "--load_checkpoint",
                 "merged", "--predict_data", "def main")  # fmt: skip
    assert f"{len(tensors)} tensors" in output


WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3)}


def ckpt(folder: Path) -> list[str]:
    (folder / "net.ckpt").write_bytes(MINDSPORE_CKPT)
    return ["launcher.tools.verify", "net.ckpt"]


def rank_folders(folder: Path) -> list[str]:
    for rank in range(2):
        place = folder / "ranks" / f"rank_{rank}"
        place.mkdir(parents=True)
        save_file(WEIGHTS, place / f"net_rank_{rank}-1_1.safetensors", {"format": "ms"})
    return ["launcher.tools.diff", "ranks", "ranks"]


def complete(folder: Path) -> list[str]:
    place = folder / "complete"
    place.mkdir()
    save_file(WEIGHTS, place / "part0.safetensors", {"format": "ms"})
    (place / "param_name_map.json").write_text(json.dumps({"w": "part0.safetensors"}))
    return ["launcher.tools.diff", "complete", "complete"]


def strategies(folder: Path) -> list[str]:
    return ["launcher.tools.merge_strategy", "--src", "strategy", "--dst", "merged.ckpt"]


def predict_strategy(folder: Path) -> list[str]:
    save_file(WEIGHTS, folder / "w.safetensors")
    return ["launcher.tools.slice_safetensors", "--unified_safetensors_dir", "w.safetensors",
            "--dst_safetensors_dir", "out", "--predict_strategy", "s.ckpt"]  # fmt: skip


CASES = {
    "a .ckpt file": (ckpt, "net.ckpt is in a format that needs an extension"),
    "rank files": (rank_folders, "rank files in ranks do not describe their layout"),
    "complete weights": (complete, "complete/param_name_map.json is an index of weights"),
    "strategy files": (strategies, "merge_strategy"),
    "slicing by a strategy": (predict_strategy, "--predict_strategy"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_of_mindspore_are_refused(tmp_path: Path, case: str) -> None:
    make, what = CASES[case]
    module, *arguments = make(tmp_path)
    code, output = command(False, module, tmp_path, *arguments)
    assert code in (1, 2), output
    assert what in output
    assert "this installation has no support for it: the package launcher.mindspore" in output
    assert NOT_INSTALLED in output


REMOVED: dict[str, Sequence[str]] = {
    "a .ckpt file": ("net.ckpt is not a", "Copy the file again"),
    "rank files": ("rank files in ranks do not describe their layout", NOT_INSTALLED),
    "complete weights": ("equal: 1 tensors",),
    "strategy files": ("merge_strategy: this installation has no support", NOT_INSTALLED),
    "slicing by a strategy": ("--predict_strategy: this installation", NOT_INSTALLED),
}
"""Without the entries files of MindSpore are unknown files: parts of the errors for those."""


@pytest.mark.parametrize("case", CASES)
def test_without_its_entries_they_are_unknown_files(tmp_path: Path, case: str) -> None:
    module, *arguments = CASES[case][0](tmp_path)
    code, output = command(True, module, tmp_path, *arguments)
    assert (code == 0) == (case == "complete weights"), output
    for text in REMOVED[case]:
        assert text in output


def test_only_save_strategy_needs_it(workshop: Workshop) -> None:
    name = workshop.yaml(only_save_strategy=True, run_mode="train")
    code, output = command(False, "launcher.cli", workshop.folder, "--config", name)
    assert code == 2, output
    assert "only_save_strategy: True: this installation has no support for it" in output
