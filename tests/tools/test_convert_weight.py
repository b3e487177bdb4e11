"""convert_weight: Hugging Face weights to names of MindFormers and back, as folders and files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launcher.tools import convert_weight
from launcher.weights.source import open_complete
from tests.mindspore.names import HERE, arrays, assert_same

HF = HERE / "qwen2_5" / "hf"


def converted(capsys: pytest.CaptureFixture[str], *words: str | Path, code: int = 0) -> str:
    """What a command says."""
    assert convert_weight.main([*map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_a_folder_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back = tmp_path / "ms", tmp_path / "hf"
    said = converted(capsys, "--model", "qwen2_5", "--input_path", HF, "--output_path", there,
                     "--qkv_concat", "True")  # fmt: skip
    assert "17 tensors in 1 file" in said
    assert_same(arrays(open_complete(there)), arrays(open_complete(HERE / "qwen2_5/legacy_concat")))
    names = json.loads((there / "param_name_map.json").read_text())["weight_map"]
    assert "model.layers.0.attention.w_qkv.bias" in names
    converted(capsys, "--model", "qwen2_5", "--input_path", there, "--output_path", back,
              "--reversed")  # fmt: skip
    assert_same(arrays(open_complete(back)), arrays(open_complete(HF)))
    assert (back / "config.json").read_bytes() == (HF / "config.json").read_bytes()


@pytest.mark.parametrize("extension", [".ckpt", ".safetensors"])
def test_a_single_file_and_back(
    extension: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / f"qwen{extension}", tmp_path / "hf"
    converted(capsys, "--model", "qwen2_5", "--input_path", HF, "--output_path", there,
              "--dtype", "bf16")  # fmt: skip
    assert os.listdir(tmp_path) == [there.name]
    source = open_complete(there)
    assert {source.dtype(name) for name in source.tensors} == {"BF16"}
    said = converted(capsys, "--model", "qwen2_5", "--input_path", there, "--output_path", back,
                     "--reversed", code=2)  # fmt: skip
    assert "has no config.json" in said
    converted(capsys, "--model", "qwen2_5", "--input_path", there, "--output_path", back,
              "--reversed", "--config", HF, "--dtype", "fp32")  # fmt: skip
    found, expected = arrays(open_complete(back)), arrays(open_complete(HF))
    assert found.keys() == expected.keys()
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"
    name = "model.layers.1.self_attn.k_proj.bias"  # zeros: the same in any dtype
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in expected.items()}
    assert found[name].dtype == expected[name].dtype


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "llama"], "config.json has model_type 'qwen2': llama is llama or mistral"),
        (["--model", "qwen9"], "--model qwen9: models are llama"),
        (["--model", "qwen2", "--reversed"], "has no names of MindFormers"),
        (["--model", "qwen2", "--is_lora", "True"], "--is_lora True"),
        (["--model", "qwen2", "--naming", "core"], "invalid choice: 'core'"),
    ],
)
def test_mistakes(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"
    said = converted(capsys, "--input_path", HF, "--output_path", target, *words, code=2)
    assert expected in said
    assert not target.exists()


def test_existing_outputs_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x.ckpt"
    target.write_text("mine")
    words = ["--model", "qwen2", "--input_path", HF, "--output_path", target]
    assert "exists" in converted(capsys, *words, code=2)
    assert target.read_text() == "mine"
    converted(capsys, *words, "--overwrite")
    assert len(open_complete(target).tensors) == 27
    assert os.listdir(tmp_path) == [target.name]
