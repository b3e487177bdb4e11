"""Files of torch become safetensors; nothing in them is run, nothing is left half done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import launcher.weights
from launcher.errors import UserError
from launcher.tools.ckpt_to_safetensors import main
from launcher.weights.source import open_complete
from tests.tools.checkpoints import content, same, tensors

WEIGHTS = {**tensors(), "transposed": torch.arange(6.0).reshape(2, 3).t(), "empty": torch.empty(0)}
FORMS: dict[str, Callable[[Path], object]] = {
    "zip": lambda path: torch.save(WEIGHTS, path),
    "before 1.6": lambda path: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
    "state_dict": lambda path: torch.save({"epoch": 3, "state_dict": WEIGHTS, "rng": []}, path),
    "parameters": lambda path: torch.save(
        {"model": {n: torch.nn.Parameter(t, requires_grad=False) for n, t in WEIGHTS.items()}}, path
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_becomes_one_with_the_same_tensors(form: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "net_rank_0-1_1.ckpt"
    FORMS[form](path)
    before = path.read_bytes()
    assert main(["--file_path", str(path), "--save_path", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert ("left out, no tensors: epoch, rng\n" in out) == (form == "state_dict")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["net_rank_0-1_1.safetensors"]
    assert same(content(tmp_path / "out"), WEIGHTS)
    assert path.read_bytes() == before


def test_beside_the_file_and_under_other_names(tmp_path: Path, capsys) -> None:
    torch.save({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "w.pt")
    (tmp_path / "names.json").write_text('{"a": "first"}')
    arguments = ["--file_path", str(tmp_path / "w.pt"), "--name_map", str(tmp_path / "names.json")]
    assert main(arguments) == 0
    assert load_file(tmp_path / "w.safetensors").keys() == {"first", "b"}
    assert main(arguments) == 2
    assert (
        "w.safetensors exists: existing files are not replaced by default"
        in capsys.readouterr().err
    )
    assert main([*arguments, "--overwrite"]) == 0
    (tmp_path / "names.json").write_text('{"bb": "c"}')
    assert main([*arguments, "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert "name_map renames `bb`, which is in no file" in said
    assert "two tensors would be named `b`" in refusal(tmp_path / "w.pt", {"a": "b"})


def refusal(path: Path, name_map: dict[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        launcher.weights.ckpt_to_safetensors(path, path.parent / "out", name_map)
    return str(caught.value)


def test_rank_folders_keep_their_tree(tmp_path: Path) -> None:
    for rank in range(2):
        for name in (f"net_rank_{rank}-1_2.ckpt", f"net_rank_{rank}-1_4.ckpt"):
            path = tmp_path / "ranks" / f"rank_{rank}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"w": torch.full((2,), float(rank))}, path)
    converted = launcher.weights.ckpt_to_safetensors(
        tmp_path / "ranks", tmp_path / "out", file_name_regex=r"-1_4\.", processes_num=2
    )
    found = sorted(str(p.relative_to(tmp_path / "out")) for p in converted.files)
    assert found == [f"rank_{r}/net_rank_{r}-1_4.safetensors" for r in range(2)]
    assert all(load_file(path)["w"][0] == rank for rank, path in enumerate(converted.files))


def test_an_indexed_folder_becomes_one_that_opens(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    torch.save({"a": torch.ones(2)}, folder / names[0])
    torch.save({"b": torch.ones(3)}, folder / names[1])
    torch.save({"c": torch.ones(3)}, folder / "stray.bin")
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    assert main(["--file_path", str(folder), "--save_path", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    assert set(open_complete(tmp_path / "out").tensors) == {"a", "b"}


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "attack": (lambda p: torch.save({"w": torch.ones(2), "x": Attack(p.parent / "mark")}, p),
               "nothing in a file is run"),
    "no tensors": (lambda p: torch.save({"epoch": 3}, p), "holds no weights"),
    "sparse": (lambda p: torch.save({"w": torch.eye(3).to_sparse()}, p), "`w` is sparse_coo"),
    "complex128": (lambda p: torch.save({"w": torch.ones(2).to(torch.complex128)}, p),
                   "`w` is complex128"),
    "mindspore": (lambda p: p.write_bytes(b"\x0a\x20" + b"abc" * 20),
                  "is not a valid .ckpt file of Mind"),
    "short": (lambda p: p.write_bytes(b"PK\x03\x04" + b"0" * 40), "cannot be read"),
    "safetensors": (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"{}"),
                    "is a safetensors file already"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_and_leaves_nothing(case: str, tmp_path: Path, capsys) -> None:
    make, said = BAD[case]
    path = tmp_path / "w.ckpt"
    make(path)
    for origin in (path, tmp_path):
        out = tmp_path.parent / f"{tmp_path.name}_out"
        assert main(["--file_path", str(origin), "--save_path", str(out)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists()
        assert not out.with_name(f".{out.name}.tmp").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["w.ckpt"]


def test_mistakes_about_folders(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    at, out = str(tmp_path / "in"), str(tmp_path / "out")
    cases = {
        "holds no file to convert: such files end in": ["--save_path", out],
        "There are: notes.txt": ["--save_path", out],
        "is a folder: its files are converted into another folder": [],
        "it is not a regular expression": ["--save_path", out, "--file_name_regex", "("],
    }
    for said, more in cases.items():
        assert main(["--file_path", at, *more]) == 2
        assert said in capsys.readouterr().err
    for name in ("w.pt", "w.ckpt"):
        torch.save({"w": torch.ones(1)}, tmp_path / "in" / name)
    assert main(["--file_path", at, "--save_path", out]) == 2
    assert "would both become w.safetensors" in capsys.readouterr().err
