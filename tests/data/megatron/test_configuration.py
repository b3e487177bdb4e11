"""Wrong sections of the loaders of tokens are found before anything heavy is imported."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config import rules
from launcher.config.provenance import KeyProblem
from launcher.config.resolve import resolve
from launcher.config.suggest import nearest_key
from launcher.errors import Problem
from tests.config.workspace import RIGHT, build
from tests.data.megatron.cases import GOLDEN

MEGATRON = "BlendedMegatronDatasetDataLoader"
LOADER = "train_dataset.data_loader"
CONFIG = f"{LOADER}.config"
_HEAD, _, _TAIL = RIGHT.partition("    type: TextDataLoader\n    dataset_dir: corpus\n")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("a_int32", "c_int32"):
        for ending in (".bin", ".idx"):
            shutil.copyfile(GOLDEN / f"{name}{ending}", tmp_path / f"{name}{ending}")
    return tmp_path


def found(text: str, add: str = "", *words: str, packing: bool = False) -> list[Problem]:
    """The problems of a configuration whose data loader is `text`."""
    lines = "".join(f"    {line}\n" for line in text.splitlines())
    tail = _TAIL if packing else _TAIL.replace("  packing: True\n", "")
    Path("x.yaml").write_text(_HEAD + lines + tail + add)
    result = resolve("x.yaml", "train", {}, words)
    rest = rules.check(result.config, result.provenance, world=1, bad_keys=result.bad_keys)
    return [*result.problems, *rest]


RIGHT_SECTIONS = (
    "config: {data_path: a_int32}",
    "config: {data_path: [a_int32, c_int32, a_int32]}",
    "config: {data_path: [a_int32, c_int32], split: '90,5,5'}\nsizes: [10, null, 0]",
    "config: {data_path: [0.3, a_int32, 0.7, c_int32], split: [90, 10]}\nsizes: [10, 0, 0]",
    "config: {data_path: ['1', a_int32], seq_length: 64, eod: 1}\nsizes: [10, 0, 0]",
    "config: {train_data_path: a_int32.bin, valid_data_path: [c_int32]}",
    "config: {data_path: a_int32, reset_attention_mask: True, eod: 0}",
    "config: {data_path: a_int32, reset_position_ids: True, eod: -1}\ndatasets_type: GPTDataset",
    "config: {data_path: a_int32, s3_cache_path: null, mmap_bin_files: True}\nshuffle: True",
)


@pytest.mark.parametrize("text", RIGHT_SECTIONS)
def test_right_sections(text: str, place: Path) -> None:
    assert found(f"type: {MEGATRON}\n{text}") == []


WRONG: dict[str, tuple[str, str, str]] = {
    # name: (section, key, part of the problem)
    "no files": ("config: {seed: 1}", f"{CONFIG}.data_path", "no files for train"),
    "other files": (
        "dataset_dir: corpus\nconfig: {data_path: a_int32}", f"{LOADER}.dataset_dir",
        "config.data_path",
    ),
    "missing prefix": ("config: {data_path: a_int23}", f"{CONFIG}.data_path", "`a_int32`"),
    "missing prefix of a blend": (
        "config: {data_path: [1, a_int32, 1, b_int32]}\nsizes: [1, 0, 0]", f"{CONFIG}.data_path",
        "`c_int32`",
    ),
    "mixed weights": (
        "config: {data_path: [0.5, a_int32, c_int32, a_int32]}", f"{CONFIG}.data_path",
        "either every dataset",
    ),
    "negative weight": (
        "config: {data_path: [0.5, a_int32, -1, c_int32]}\nsizes: [1, 0, 0]",
        f"{CONFIG}.data_path", "at least 0",
    ),
    "two sources": (
        "config: {data_path: a_int32, train_data_path: c_int32}", f"{CONFIG}.train_data_path",
        "data_path and split",
    ),
    "row length": (
        "config: {data_path: a_int32, seq_length: 32}", f"{CONFIG}.seq_length",
        "differs from train_dataset.seq_length = 64",
    ),
    "two sizes": (
        "config: {data_path: a_int32}\nsizes: [5, 1]", f"{LOADER}.sizes", "Nearest: [5, 1, 0]",
    ),
    "negative size": (
        "config: {data_path: a_int32}\nsizes: [-5, 1, 0]", f"{LOADER}.sizes", "Nearest: [0, 1, 0]",
    ),
    "weights without size": (
        "config: {data_path: [1, a_int32]}", f"{LOADER}.sizes", "no samples of train",
    ),
    "split without numbers": (
        "config: {data_path: a_int32, split: all}", f"{CONFIG}.split", "'90, 8, 2'",
    ),
    "split of four": (
        "config: {data_path: a_int32, split: '1,1,1,1'}", f"{CONFIG}.split", "'90, 8, 2'",
    ),
    "no share": (
        "config: {data_path: a_int32, split: '0,1'}", f"{CONFIG}.split", "train split has no share",
    ),
    "no end token": (
        "config: {data_path: a_int32, reset_attention_mask: True}",
        f"{CONFIG}.reset_attention_mask", "config.eod",
    ),
    "end token of no loss": (
        "config: {data_path: a_int32, eod_mask_loss: True}", f"{CONFIG}.eod_mask_loss",
        "config.eod",
    ),
    "unknown key": (
        "config: {data_path: a_int32, reset_positon_ids: True}", "", "reset_position_ids",
    ),
    "kind": ("datasets_type: BERTDataset\nconfig: {data_path: a_int32}", f"{LOADER}.datasets_type",
             "GPTDataset"),
    "phase": ("phase: eval\nconfig: {data_path: a_int32}", f"{LOADER}.phase", "valid"),
    "remote cache": (
        "config: {data_path: a_int32, s3_cache_path: s3://x}", f"{CONFIG}.s3_cache_path",
        "local directory",
    ),
    "argument of another": (
        "text_column: body\nconfig: {data_path: a_int32}", f"{LOADER}.text_column", "HFDataLoader",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sections(name: str, place: Path) -> None:
    text, key, part = WRONG[name]
    problems = found(f"type: {MEGATRON}\n{text}")
    assert len(problems) == 1, problems
    assert part in str(problems[0])
    assert problems[0].where.startswith("x.yaml:")
    if key and isinstance(problems[0], KeyProblem):
        assert problems[0].key == key


def test_the_end_token_of_the_model_is_named(place: Path) -> None:
    text = f"type: {MEGATRON}\nconfig: {{data_path: a_int32, reset_position_ids: True}}"
    problems = found(text, "pretrained_model_dir: qwen\n")
    (Path("qwen") / "config.json").read_text()
    assert any("config.eod" in str(problem) for problem in problems)


def test_packing_is_a_matter_of_its_own_keys(place: Path) -> None:
    text = f"type: {MEGATRON}\nconfig: {{data_path: a_int32, eod: 0"
    problems = found(f"{text}}}", packing=True)
    assert [problem.key for problem in problems if isinstance(problem, KeyProblem)] == [
        "train_dataset.packing"
    ]
    assert found(f"{text}, reset_attention_mask: True}}", packing=True) == []


def test_damage_is_found_with_file_and_byte(place: Path) -> None:
    (place / "a_int32.idx").write_bytes((place / "a_int32.idx").read_bytes()[:-1])
    (problem,) = found(f"type: {MEGATRON}\nconfig: {{data_path: a_int32}}")
    assert "a_int32.idx: byte 501" in problem.what


def test_a_copy_that_was_interrupted_is_found_before_the_run(place: Path) -> None:
    (place / "a_int32.bin").write_bytes((place / "a_int32.bin").read_bytes()[:-40])
    (problem,) = found(f"type: {MEGATRON}\nconfig: {{data_path: a_int32}}")
    assert "a_int32.bin: byte" in problem.what


@pytest.mark.parametrize("kind", [f"{MEGATRON}\nconfig:\n  data_path: a_int32",
                                  "TokenFileDataLoader\ndataset_dir: x.u16"])  # fmt: skip
def test_keys_of_one_loader_are_not_those_of_another(kind: str, place: Path) -> None:
    (place / "x.u16").write_bytes(bytes(8))
    others: dict[str, Any] = {MEGATRON: "token_dtype: uint16"}
    text = others.get(kind.split("\n")[0], "sizes: [1, 1, 1]")
    (problem,) = found(f"type: {kind}\n{text}")
    assert "not an argument of" in problem.rule


def test_files_are_named_in_data_path(place: Path) -> None:
    (problem,) = found(f"type: {MEGATRON}\ndataset_dir: a\nconfig: {{data_path: a_int32}}")
    assert "config.data_path" in problem.nearest
    text = f"type: {MEGATRON}\nsizes: [9, 0, 0]\nconfig: {{data_path: '0.3 a_int32, 0.7 b'}}"
    (problem,) = found(text)
    assert "[0.3, a_int32, 0.7, b]" in problem.nearest


def test_row_length_of_the_loader_is_that_of_the_data_set(place: Path) -> None:
    text = f"type: {MEGATRON}\nconfig: {{data_path: a_int32, seq_length: 32}}"
    assert found(text, "", "train_dataset.seq_length=32") == []
    Path("x.yaml").write_text(Path("x.yaml").read_text().replace("  seq_length: 64\n", ""))
    result = resolve("x.yaml", "train", {}, [])
    assert result.config.train_dataset is not None
    assert result.config.train_dataset.seq_length == 32


TOKEN_FILES: dict[str, tuple[str, str]] = {
    "no files": ("", "no files"),
    "missing": ("dataset_dir: z.u16", "no such file"),
    "type": ("dataset_dir: x.bin", "token_dtype: uint16"),
    "odd": ("dataset_dir: odd.u32", "byte 8"),
    "unknown type": ("dataset_dir: x.bin\ntoken_dtype: float32", "uint16"),
    "empty folder": ("dataset_dir: corpus", "no file ending in"),
    "streams and rows": ("dataset_files: [x.u16, rows.npy]", "rows.npy"),
    "rows of another length": ("dataset_dir: rows.npy", "seq_length: 31"),
    "two end tokens": ("dataset_files: [x.u16, y.u32]", "eod_token_id"),
}


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_token_files(name: str, place: Path) -> None:
    text, part = TOKEN_FILES[name]
    (place / "x.bin").write_bytes(bytes(8))
    (place / "x.u16").write_bytes(bytes(8))
    (place / "odd.u32").write_bytes(bytes(10))
    (place / "y.u32").write_bytes(bytes(8))
    (place / "y.u32.json").write_text('{"eod": 3}')
    np.save(place / "rows.npy", np.zeros((2, 32), dtype=np.uint16))
    (problem,) = found(f"type: TokenFileDataLoader\n{text}")
    assert part in str(problem)
    assert found("type: TokenFileDataLoader\ndataset_dir: x.bin\ntoken_dtype: uint16") == []


def test_the_rules_import_nothing_heavy() -> None:
    code = (
        "import sys; import launcher.data.megatron.checks, launcher.data.token_files.checks; "
        "print([name for name in ('numpy', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(("word", "key"), [("eod_token_id", "eod"), ("pad_token_id", "pad")])
def test_keys_of_other_loaders_are_known_by_their_name_here(word: str, key: str) -> None:
    assert nearest_key(word, CONFIG) == f"{CONFIG}.{key}"
