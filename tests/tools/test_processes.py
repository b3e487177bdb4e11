"""The offline tools as processes: small, without torch, and with complete output or none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.layout.mesh import Mesh
from launcher.mindspore.strategy import strategy_file
from launcher.mindspore.tensor_layout import TensorLayout
from tests.tools.checkpoints import content, same, save, tensors

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

REPORTING = """
import importlib, json, sys
code = importlib.import_module(f"launcher.tools.{sys.argv[1]}").main(sys.argv[2:])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps([code, "torch" in sys.modules, int(status["VmHWM"].split()[0]) << 10]))
"""
DYING = """
import importlib, itertools, os, sys
from launcher.weights.streaming.new_files import NewFiles
written, write = itertools.count(1), NewFiles.write
def deadly(self, path, view, position):
    write(self, path, view, position)
    if next(written) == 3:  # of several threads, which write at once, exactly one
        os.kill(os.getpid(), int(sys.argv[1]))
NewFiles.write = deadly
sys.exit(importlib.import_module(f"launcher.tools.{sys.argv[2]}").main(sys.argv[3:]))
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB: complete weights, the same in rank files with copies, and a strategy."""
    folder = tmp_path_factory.mktemp("large")
    named = {f"proj.{i}": torch.full((3072, 2048), i, dtype=torch.int16) for i in range(24)}
    named["row"] = torch.zeros(1, 6 * MIB, dtype=torch.int16)
    save_file(named, folder / "full.safetensors")
    save(folder / "ranks", named, Mesh(dp_replicate=2, dp_shard=2))
    layouts = {
        name: TensorLayout((2, 2), ((0, -1) if index % 2 else (-1, 0),))
        for index, name in enumerate(named)
    }
    layouts["row"] = TensorLayout((2, 2), ((-1, 1),))
    (folder / "ckpt_strategy_rank_0.ckpt").write_bytes(strategy_file(layouts, 0))
    return folder


def tools(folder: Path, out: Path) -> dict[str, list[str]]:
    """Tool to its arguments."""
    full, ranks = str(folder / "full.safetensors"), str(folder / "ranks")
    strategy = str(folder / "ckpt_strategy_rank_0.ckpt")
    return {
        "unified_safetensors": ["--mindspore_ckpt_dir", ranks, "--output_dir", str(out),
                                "--max_process_num", "64"],
        "slice_safetensors": ["--unified_safetensors_dir", full, "--dst_safetensors_dir", str(out),
                              "--predict_strategy", strategy, "--max_process_num", "64"],
        "verify": [ranks],
        "diff": [ranks, full],
    }  # fmt: skip


@pytest.mark.parametrize("tool", ["unified_safetensors", "slice_safetensors", "verify", "diff"])
def test_a_few_portions_of_memory_and_no_torch(tool: str, large: Path, tmp_path: Path) -> None:
    result = run(REPORTING, tool, *tools(large, tmp_path / "out")[tool])
    code, has_torch, peak_bytes = json.loads(result.stdout.splitlines()[-1])
    assert (code, has_torch) == (0, False), result.stderr
    assert peak_bytes < 700 * MIB


def test_a_configuration_is_sliced_without_torch(tmp_path: Path) -> None:
    """The model comes from config.json, the layout from YAML: neither needs torch."""
    save_file({"model.embed_tokens.weight": torch.ones(8, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "qwen3", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2, "intermediate_size": 4,
    }))  # fmt: skip
    (tmp_path / "run.yaml").write_text("parallel_config: {model_parallel: 2, vocab_emb_dp: false}")
    result = run(REPORTING, "slice_safetensors", "--unified_safetensors_dir", str(tmp_path),
                 "--dst_safetensors_dir", str(tmp_path.parent / f"{tmp_path.name}_out"),
                 "--config", str(tmp_path / "run.yaml"))  # fmt: skip
    assert json.loads(result.stdout.splitlines()[-1])[:2] == [0, False], result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("tool", ["unified_safetensors", "slice_safetensors"])
def test_an_end_in_the_middle_leaves_nothing_and_can_be_begun_anew(
    tool: str, number: signal.Signals, tmp_path: Path
) -> None:
    save(tmp_path / "ranks", tensors(), Mesh(dp_shard=2))
    save_file(tensors(), tmp_path / "full.safetensors")
    rows = TensorLayout((2,), ((-1, -1),))
    (tmp_path / "ckpt_strategy_rank_0.ckpt").write_bytes(strategy_file({"proj": rows}, 0))
    out = tmp_path / "out"
    arguments = [tool, *tools(tmp_path, out)[tool]]
    result = run(DYING, str(int(number)), *arguments)
    assert result.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in result.stderr
    assert not out.exists()
    assert (tmp_path / ".out.tmp").exists() == (number == signal.SIGKILL)
    assert json.loads(run(REPORTING, *arguments).stdout.splitlines()[-1])[0] == 0
    assert not (tmp_path / ".out.tmp").exists()
    if tool == "unified_safetensors":
        assert same(content(out), tensors())
