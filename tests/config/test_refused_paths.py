"""Paths that the system refuses to look at: without rights, too long, in a loop of links."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.config.workspace import RIGHT, build
from tests.ranks import run_ranks

KEYS = (
    "load_checkpoint", "pretrained_model_dir", "processor.tokenizer.pretrained_model_dir",
    "train_dataset.data_loader.dataset_dir", "output_dir", "register_path", "input_data",
    "src_strategy_path_or_dir",
)  # fmt: skip
PATHS = {
    "rights": ("locked/in/x", "Permission denied"),
    "length": ("x" * 300, "File name too long"),
    "loop": ("loop/x", ""),
    "below a file": ("run.yaml/x", ""),
}
NOBODY = 65534


def command_lines(path: str) -> list[tuple[str, list[str]]]:
    """(what is named, arguments of run.py)."""
    lines = [("--config", ["--config", path, "--run_mode", "train"])]
    for key in KEYS:
        mode = "predict" if key == "input_data" else "finetune"
        lines.append((key, ["--config", "run.yaml", "--run_mode", mode, f"--{key}", path]))
    Path("base.yaml").write_text(f"base_config: {path}\n{RIGHT}")
    return [*lines, ("base_config", ["--config", "base.yaml", "--run_mode", "train"])]


def call(main: Any, arguments: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue() + err.getvalue()


def work(folder: str) -> dict[str, tuple[int, str]]:
    """What every command line answers, as a user without the rights of root."""
    from launcher import cli

    os.chdir(folder)
    # Modules that are imported late are read before the rights go.
    call(cli.main, ["--config", "run.yaml", "--run_mode", "train", "--check_config", "seed=2",
                    "--train_dataset.data_loader.dataset_dir", "none*"])  # fmt: skip
    call(cli.main, ["--config", "run.yaml", "--run_mode", "predict", "--check_config"])
    tools = {
        "unified_safetensors": ["--output_dir", "o", "--mindspore_ckpt_dir"],
        "ckpt_to_safetensors": ["--save_path", "o", "--file_path"],
        "list_checkpoints": [], "verify": [], "diff": ["corpus"],
    }  # fmt: skip
    mains = {name: importlib.import_module(f"launcher.tools.{name}").main for name in tools}
    for name, arguments in tools.items():
        call(mains[name], [*arguments, "corpus"])
    if os.geteuid() == 0:
        os.seteuid(NOBODY)
    found = {}
    for kind, (path, _) in PATHS.items():
        for what, line in command_lines(path):
            found[f"{kind}: {what}"] = call(cli.main, [*line, "--check_config"])
        for name, arguments in tools.items():
            found[f"{kind}: {name}"] = call(mains[name], [*arguments, path])
    return found


@pytest.fixture
def folder() -> Iterator[Path]:
    """One whose parents anybody may look into, unlike those of `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_refused_paths_are_errors_with_a_place(folder: Path) -> None:
    build(folder)
    (folder / "run.yaml").write_text(RIGHT)
    (folder / "locked/in").mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o777 if path.is_dir() else 0o666)
    (folder / "locked").chmod(0o000)
    [found] = run_ranks(1, work, str(folder))
    (folder / "locked").chmod(0o700)
    for case, (code, text) in found.items():
        kind, _, what = case.partition(": ")
        if what in ("input_data", "output_dir") and kind != "rights":
            continue  # what names no file is a prompt; the folder is made when the run begins
        assert code in (1, 2), (case, code, text)
        assert "Traceback" not in text, case
        if what in (*KEYS, "--config", "base_config"):
            assert PATHS[kind][1] in text, (case, text)
        if what in KEYS and kind == "rights":
            assert f"error: command line: --{what}: {what}: " in text, (case, text)


@pytest.mark.parametrize("kind", ["tool", "cli"])
def test_a_fault_of_the_system_that_names_no_path_is_no_mistake_of_the_user(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.tools.command import answer

    def broken(_: Any) -> int:
        raise OSError(5, "Input/output error", "file" if kind == "cli" else None)

    if kind == "tool":
        with pytest.raises(OSError, match="Input/output"):
            answer(broken)
    else:
        assert answer(broken) == 2


@pytest.mark.parametrize("key", KEYS)
def test_a_nul_character_is_named_with_its_key(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RIGHT)
    line = ["--config", "run.yaml", "--run_mode", "train", f"--{key}", "\0x"]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert importlib.import_module("launcher.cli").main(line) == 2
    assert "NUL character" in errors.getvalue()
    assert key in errors.getvalue()
