"""Two checkpoints of any layout and format: equal, or a table of differences."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import launcher.weights
from launcher.layout.mesh import Mesh
from launcher.tools.diff import main
from tests.tools.checkpoints import save, tensors


def complete(path: Path, named: dict[str, torch.Tensor]) -> str:
    save_file({name: tensor.clone() for name, tensor in named.items()}, path)
    return str(path)


def test_layouts_and_formats_are_no_difference(tmp_path: Path, capsys) -> None:
    save(tmp_path / "ranks", tensors(), Mesh(dp_shard=3, tp=2))
    save(tmp_path / "two", tensors(), Mesh(dp_replicate=2))
    turned = tensors()["proj"].t().contiguous().t()  # the same numbers, by columns in the file
    torch.save({"epoch": 3, "state_dict": {**tensors(), "proj": turned}}, tmp_path / "w.pt")
    full = complete(tmp_path / "w.safetensors", tensors())
    sides = [str(tmp_path / "ranks"), str(tmp_path / "two"), full, str(tmp_path / "w.pt"),
             str(tmp_path / "two" / "rank_1" / "CKP_rank_1-1_1.safetensors")]  # fmt: skip
    for side in sides:
        assert main([side, full]) == 0
        assert capsys.readouterr().out.endswith("equal: 11 tensors are equal\n")


def test_the_table_says_what_differs(tmp_path: Path, capsys) -> None:
    one, two = tensors(optimizer=False), tensors(optimizer=False)
    two["embed"] = two["embed"].clone()
    two["embed"][3, 1] += 0.5
    two["proj"] = two["proj"].clone()
    two["proj"][0, 0] = float("nan")
    two["counts"] = two["counts"].reshape(2, 3)
    two["scalar"] = two["scalar"].bfloat16()
    two["final_norm"] = two.pop("norm")
    one["old"], two["new"] = torch.ones(2), torch.zeros(2)
    a, b = complete(tmp_path / "a.safetensors", one), complete(tmp_path / "b.safetensors", two)
    assert main([a, b]) == 1
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [re.split(r"  +", line.strip()) for line in lines] == [
        ["tensor", "largest"],
        ["counts", "shape differs", "[3, 2] | [2, 3]"],
        ["old", "only in A"],
        ["new", "only in B"],
        ["scalar", "dtype differs", f"{abs(one['scalar'] - two['scalar'].float()).item():.3g}",
         "F32 | BF16"],
        ["proj", "differs", "nan", "1 of 48 elements"],
        ["embed", "differs", "0.5", "1 of 52 elements"],
        ["norm", "renamed", "is final_norm in B"],
        ["7 differ: 0 tensors are equal"],
    ]  # fmt: skip


NUMBERS = {
    "bf16": (torch.bfloat16, 1.5, 1.25, 0.25),
    "fp16": (torch.float16, 2.0, 1.0, 1.0),
    "fp64": (torch.float64, 3.0, -3.0, 6.0),
    "int64": (torch.int64, 5, -7, 12.0),
    "bool": (torch.bool, True, False, 1.0),
    "complex": (torch.complex64, 3 + 4j, 0, 5.0),
    "fp8": (torch.float8_e4m3fn, 1.0, 2.0, None),
    "zeros": (torch.float32, 0.0, -0.0, 0.0),
    "infinite": (torch.float32, float("inf"), 1.0, float("inf")),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_differences_are_those_of_numbers(case: str, tmp_path: Path) -> None:
    dtype, one, two, largest = NUMBERS[case]
    paths = [
        complete(tmp_path / f"{i}.safetensors", {"w": torch.full((3, 2), value).to(dtype)})
        for i, value in enumerate((one, two))
    ]
    (row,) = launcher.weights.diff(*paths).rows
    assert (row.kind, row.detail, row.largest) == ("differs", "6 of 6 elements", largest)
    assert launcher.weights.diff(paths[0], paths[0]).is_equal


def test_twenty_rows_at_most_and_a_prefix_is_left_out(tmp_path: Path, capsys) -> None:
    many = {f"adam_m.{i}": torch.ones(1) for i in range(30)}
    a = complete(tmp_path / "a.safetensors", {**many, "w": torch.ones(1)})
    b = complete(tmp_path / "b.safetensors", {"w": torch.ones(1)})
    assert main([a, b]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len([line for line in out if "only in A" in line]) == 20
    assert "  ... and 10 more" in out
    assert main([a, b, "--filter_out_param_prefix", "adam_"]) == 0
    assert launcher.weights.diff(a, b, filter_out_param_prefix="adam_").equal == 1


def test_of_several_saves_one_is_chosen(tmp_path: Path, capsys) -> None:
    for step in (1, 2):
        save(tmp_path / "ranks", tensors(step), Mesh(), f"CKP_rank_{{}}-1_{step}")
    full = complete(tmp_path / "w.safetensors", tensors(2))
    assert main([str(tmp_path / "ranks"), full]) == 2
    assert "holds 2 saves: one of them is read. There are: CKP-1_1, CKP" in capsys.readouterr().err
    assert main([str(tmp_path / "ranks"), full, "--file_suffix", "1_2"]) == 0
