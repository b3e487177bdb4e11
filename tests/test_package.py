"""The installed package: what the wheel ships, the command `slipway`, and declared dependencies."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from launcher.console_script import TOOLS, main

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = {"launcher", "models", "benchmarks", "tests"}


def distribution(requirement: str) -> str:
    """`PyYAML>=6` as `pyyaml`."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def imported(folders: list[str]) -> dict[str, str]:
    """Top-level package to one file that imports it."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                else:
                    continue
                found |= {name.partition(".")[0]: str(file.relative_to(ROOT)) for name in names}
    return found


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (["launcher", "models"], ["data", "remote", "tensorboard"]),
        (["tests"], ["data", "remote", "tensorboard", "dev"]),
    ],
    ids=["package", "tests"],
)
def test_every_import_is_declared(folders: list[str], extras: list[str]) -> None:
    requirements = list(PROJECT["dependencies"])
    for extra in extras:
        requirements += PROJECT["optional-dependencies"][extra]
    declared = {distribution(requirement) for requirement in requirements}
    distributions = packages_distributions()
    undeclared = {
        package: file
        for package, file in imported(folders).items()
        if package not in sys.stdlib_module_names and package not in OWN
        if not {name.lower().replace("_", "-") for name in distributions[package]} & declared
    }
    assert not undeclared


def test_newer_versions_of_torch_are_kept() -> None:
    (torch,) = [entry for entry in PROJECT["dependencies"] if distribution(entry) == "torch"]
    assert "<" not in torch
    assert "==" not in torch


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: building leaves files beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("launcher", "models", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "msrun.sh"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", str(target), str(source)], check=True,
    )  # fmt: skip
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment that has the wheel; dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps",
         "--no-index", "--disable-pip-version-check", str(wheel)], check=True,
    )  # fmt: skip
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose packages `launcher` and `models` must not be imported."""
    for name in ("launcher", "models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    (tmp_path / "strategy.yaml").write_text(
        "only_save_strategy: True\nrun_mode: train\n"
        "model: {model_config: {type: LlamaConfig, vocab_size: 64, hidden_size: 16,\n"
        "  intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2}}\n"
        "train_dataset: {seq_length: 16}\nparallel_config: {data_parallel: 2}\n"
    )
    return tmp_path


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def test_the_wheel_ships_configurations_and_the_launch_script(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("share/slipway/configs/quickstart.yaml") for name in names)
    assert any(name.endswith("scripts/msrun.sh") for name in names)
    assert "launcher/console_script.py" in names


def test_the_command_beside_folders_of_the_same_names(installed: Path, hostile: Path) -> None:
    slipway = str(installed / "slipway")
    result = run([slipway, "--config", "strategy.yaml"], hostile)
    assert result.returncode == 0, result.stderr
    assert (hostile / "output" / "strategy" / "ckpt_strategy_rank_0.ckpt").is_file()
    result = run([slipway, "verify", "nowhere"], hostile)
    assert result.returncode == 2
    assert "error: " in result.stderr
    result = run([slipway, "--config", "quickstart", "--run_mode", "train"], hostile)
    assert result.returncode == 2
    assert "configs/quickstart.yaml:" in result.stderr, "the shipped file is found"


def test_the_launch_script_of_the_wheel(installed: Path, hostile: Path) -> None:
    command = "run.py --config strategy.yaml --check_config"
    result = run(["bash", str(installed / "msrun.sh"), command, "2"], hostile)
    assert result.returncode == 0, result.stderr
    assert "strategy.yaml" in result.stdout


@pytest.mark.parametrize(("word", "nearest"), [("verfy", "verify"), ("merg", "merge")])
def test_an_unknown_tool(word: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "output"]) == 2
    shown = capsys.readouterr().err
    assert f"`{word}`" in shown
    assert f"`{nearest}`" in shown


@pytest.mark.parametrize("word", [*TOOLS, "unified_safetensors"])
def test_every_tool_explains_itself(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([word, "--help"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 0
    assert "usage: " in capsys.readouterr().out
