"""Strategy files of all stages become one as MindSpore merges them; mistakes have a way out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launcher.weights
from launcher.errors import UserError
from launcher.mindspore.strategy import MERGED, Operator, Strategy, parse, serialize, strategy_file
from launcher.mindspore.strategy_files import read_folder, read_strategy
from launcher.mindspore.strategy_json import serialize_json
from launcher.mindspore.tensor_layout import TensorLayout, entry
from launcher.tools.merge_strategy import main
from launcher.weights import merge_pipeline_strategys
from tests.mindspore.golden import ALL, HERE, by_name, needs_all

CUT, REPLICATED = TensorLayout((2, 2), ((0, -1),)), TensorLayout((2, 2), ((-1, -1),))
NAME = "ckpt_strategy_rank_{}.ckpt"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with the files of two stages of four ranks."""
    folder = tmp_path / "strategy"
    folder.mkdir()
    for rank in range(8):
        stage = rank // 4
        (folder / NAME.format(rank)).write_bytes(strategy_file({f"w{stage}": CUT}, stage))
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "merged_strategy" / "dst_strategy.ckpt"


def said(source: Path, target: Path, capsys) -> str:
    """What the command answers to a mistake; nothing is written."""
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    known = target.read_bytes() if target.is_file() else None
    assert main(["--src", str(source), "--dst", str(target)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    assert (target.read_bytes() if target.is_file() else None) == known
    return err.strip()


def test_two_stages_become_one_file(source: Path, target: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert main(["--src", str(source), "--dst", str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: 2 parameters of 2 pipeline stages\n"
    merged = parse(target.read_bytes(), "merged")
    assert merged == Strategy(
        (Operator("MatMul_w0", 0), Operator("MatMul_w1", 1)), (("0-w0", CUT), ("1-w1", CUT)), MERGED
    )
    assert merged.by_stage() == {0: {"w0": CUT}, 1: {"w1": CUT}}
    assert read_strategy(target) == merged == read_strategy(source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_the_python_call_has_the_same_name(source: Path, target: Path) -> None:
    merge_pipeline_strategys(str(source), str(target))
    first = target.read_bytes()
    launcher.weights.merge_pipeline_strategys(
        src_strategy_dirs=source, dst_strategy_file=target, overwrite=True
    )
    assert target.read_bytes() == first
    with pytest.raises(AttributeError):
        launcher.weights.nothing  # noqa: B018


def test_ranks_are_taken_by_number_not_by_text(tmp_path: Path) -> None:
    for rank, name in ((10, "late"), (2, "early")):
        file = tmp_path / NAME.format(rank)
        file.write_bytes(serialize(Strategy((Operator(name, 0),), (("w", CUT),))))
    assert read_folder(tmp_path).operators[0].name == "early"


def test_json_goes_in_and_out(source: Path, tmp_path: Path) -> None:
    folder, target = tmp_path / "json", tmp_path / "merged.json"
    folder.mkdir()
    for path in source.iterdir():
        strategy = parse(path.read_bytes(), str(path))
        (folder / f"{path.stem}.json").write_bytes(serialize_json(strategy))
    assert main(["--src_strategy_dirs", str(folder), "--dst_strategy_file", str(target)]) == 0
    assert json.loads(target.read_text())["current_stage"] == 1
    assert read_strategy(target) == read_folder(source)


@pytest.mark.parametrize(
    "case",
    [pytest.param(HERE / "dp2mp2pp2_predict", id="dp2mp2pp2_predict"), *(
        pytest.param(file.with_name(file.name.removesuffix(".merged.ckpt")), id=file.name,
                     marks=needs_all)
        for file in sorted((ALL / "strategies").glob("*.merged.ckpt"))
    )],
)  # fmt: skip
def test_the_same_as_mindspores_own_merge(case: Path, target: Path) -> None:
    theirs = case.with_name(f"{case.name}.merged.ckpt")
    ours = merge_pipeline_strategys(case, target)
    assert by_name(ours) == by_name(parse(theirs.read_bytes(), "theirs"))
    # MindSpore takes the stages in the order its folder listing has; ours come in stage order.
    if parse(theirs.read_bytes(), "theirs").stage == 0 and len(ours.by_stage()) == 2:
        assert target.read_bytes() == theirs.read_bytes()


@needs_all
def test_mindspores_own_reading_of_its_merged_files() -> None:
    known = json.loads((ALL / "strategies" / "merged_layout_map.json").read_text())
    for file, parameters in known.items():
        stages = read_strategy(ALL / "strategies" / file).by_stage()
        for name, (grid, tensor_map, _, _, step, size, on) in parameters.items():
            layout = TensorLayout(tuple(grid), (tuple(tensor_map),), step, size)
            assert [stage for stage in stages if name in stages[stage]] == sorted(on)
            assert all(stages[stage][name] == layout for stage in on)


def test_a_folder_that_is_none(tmp_path: Path, target: Path, capsys) -> None:
    assert said(tmp_path / "nowhere", target, capsys) == (
        f"error: {tmp_path}/nowhere: there is no such folder: strategies are merged from a folder "
        "with the file of every pipeline stage. Give the folder, usually {output_dir}/strategy."
    )


def test_a_single_file(source: Path, target: Path, capsys) -> None:
    file = source / NAME.format(0)
    error = said(file, target, capsys)
    assert error.startswith(f"error: {file}: is a file: strategies are merged from a folder")
    assert f"Its folder is {source}." in error


def test_an_empty_folder(tmp_path: Path, target: Path, capsys) -> None:
    (tmp_path / "empty" / "rank_0").mkdir(parents=True)
    assert said(tmp_path / "empty", target, capsys) == (
        f"error: {tmp_path}/empty: holds no strategy file: strategy files end in .ckpt or .json, "
        "and subfolders are not searched. There are: rank_0. Give the folder that holds "
        "ckpt_strategy_rank_0.ckpt."
    )


def test_both_kinds_of_file(source: Path, target: Path, capsys) -> None:
    (source / "a.json").write_text("{}")
    error = said(source, target, capsys)
    assert (
        "holds ckpt_strategy_rank_0.ckpt and a.json: strategy files are all .ckpt or all" in error
    )
    assert "There are 8 .ckpt and 1 .json. Move one kind away." in error


def test_other_files_do_not_matter(source: Path, target: Path) -> None:
    (source / "README.md").write_text("notes")
    (source / ".ckpt_strategy_rank_9.ckpt").write_text("hidden")
    (source / "folder.ckpt").mkdir()
    assert main(["--src", str(source), "--dst", str(target)]) == 0


def test_weights_among_them(source: Path, target: Path, capsys) -> None:
    (source / "z.ckpt").write_bytes(b"\x0a\x07\x0a\x01w\x12\x02\x12\x00")
    error = said(source, target, capsys)
    assert f"{source}/z.ckpt: byte 0: field 1 is a length and bytes, not a number" in error
    assert "Files of weights also end in .ckpt." in error


def test_a_truncated_file(source: Path, target: Path, capsys) -> None:
    file = source / NAME.format(5)
    file.write_bytes(file.read_bytes()[:-3])
    assert f"{file}: byte " in said(source, target, capsys)


def test_a_huge_file(source: Path, target: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.mindspore.strategy_files.LARGEST_FILE", 1 << 20)
    (source / "z.ckpt").write_bytes(bytes((1 << 20) + 1))
    assert f"{source}/z.ckpt: has more than 1 MiB: a strategy file has" in said(
        source, target, capsys
    )


def test_a_file_without_content(source: Path, target: Path, capsys) -> None:
    for strategy, what in (
        (Strategy((), (("w", CUT),)), "describes no operator"),
        (Strategy((Operator("MatMul_w", 0),), ()), "describes no parameter"),
    ):
        (source / "z.ckpt").write_bytes(serialize(strategy))
        error = said(source, target, capsys)
        assert f"{source}/z.ckpt: {what}: the first operator gives the pipeline stage" in error


MERGED_NAME = "merged_ckpt_strategy.ckpt"
"""As MindFormers leaves it among the files it was merged from."""


@pytest.mark.parametrize("suffix", [".ckpt", ".json"])
def test_a_merged_file_among_them_is_left_out(
    source: Path, tmp_path: Path, target: Path, capsys, suffix: str
) -> None:
    """One of another run too: the other files count, as the original replaces it."""
    if suffix == ".json":
        for file in sorted(source.iterdir()):
            (source / f"{file.stem}.json").write_bytes(serialize_json(read_strategy(file)))
            file.unlink()
    expected = read_folder(source)
    stale = Strategy(expected.operators, (("0-w0", REPLICATED), ("1-w1", CUT)), MERGED)
    for merged in (expected, stale):
        written = serialize_json(merged) if suffix == ".json" else serialize(merged)
        (source / MERGED_NAME).with_suffix(suffix).write_bytes(written)
        assert main(["--src", str(source), "--dst", str(target), "--overwrite"]) == 0
        place = (source / MERGED_NAME).with_suffix(suffix)
        assert f"{place}: left out, 2 strategy files beside it" in capsys.readouterr().out
        assert read_strategy(target) == read_folder(source) == expected


def test_a_merged_file_alone_or_with_more_stages_is_used(source: Path, capsys) -> None:
    """The files of one machine, and what was merged of all."""
    expected = read_folder(source)
    (source / MERGED_NAME).write_bytes(serialize(expected))
    for rank in range(4, 8):
        (source / NAME.format(rank)).unlink()
    said: list[str] = []
    assert read_folder(source, said.append) == expected
    assert said == [f"{source / MERGED_NAME}: used, it has the stages of the other strategy files "
                    "and more"]  # fmt: skip
    for rank in range(4):
        (source / NAME.format(rank)).unlink()
    assert read_folder(source, said.append) == expected
    assert len(said) == 1
    (source / "older.ckpt").write_bytes(serialize(Strategy((), (("0-w0", REPLICATED),), MERGED)))
    with pytest.raises(UserError, match="holds two merged files that differ"):
        read_folder(source)


def test_a_hyphen_in_a_name(source: Path, target: Path, capsys) -> None:
    strategy = Strategy((Operator("MatMul_a-b", 0),), (("a-b", CUT),))
    (source / "z.ckpt").write_bytes(serialize(strategy))
    assert "names a parameter a-b" in (error := said(source, target, capsys))
    assert "Rename the parameter." in error


def test_a_stage_is_missing(source: Path, target: Path, capsys) -> None:
    for rank in range(4, 8):
        (source / NAME.format(rank)).write_bytes(strategy_file({"w": CUT}, 3))
    assert said(source, target, capsys) == (
        f"error: {source}: has no file of pipeline stage 1, 2: the stages are 0 to n - 1 without "
        "gaps. There are stages 0, 3. Collect the strategy files of all nodes in one folder."
    )


def test_two_runs_are_mixed(source: Path, target: Path, capsys) -> None:
    (source / NAME.format(2)).write_bytes(strategy_file({"w0": REPLICATED}, 0))
    assert said(source, target, capsys) == (
        f"error: {source}/ckpt_strategy_rank_2.ckpt: contradicts ckpt_strategy_rank_0.ckpt: both "
        "are of pipeline stage 0, and w0 has another layout: all files of a stage have the same "
        "content. "
        "ckpt_strategy_rank_0.ckpt: dev_matrix (2, 2), tensor_map ((0, -1),), shard_step 0, "
        "shard_size 0; ckpt_strategy_rank_2.ckpt: dev_matrix (2, 2), tensor_map ((-1, -1),), "
        "shard_step 0, shard_size 0. Move the files of the other run away."
    )
    (source / NAME.format(2)).write_bytes(strategy_file({"w0": CUT, "more": CUT}, 0))
    assert "more has another layout" in (error := said(source, target, capsys))
    assert "ckpt_strategy_rank_0.ckpt: not there; " in error


def test_a_stage_of_a_run_that_had_fewer(source: Path, target: Path, capsys) -> None:
    for rank in range(4):
        (source / NAME.format(rank)).write_bytes(strategy_file({"w0": CUT, "w1": CUT}, 0))
    assert said(source, target, capsys) == (
        f"error: {source}: all 1 parameters of ckpt_strategy_rank_4.ckpt (stage 1) are also in "
        "ckpt_strategy_rank_0.ckpt (stage 0): the stages of a pipeline have parameters of "
        "their own. The files are of two runs: move those of one away."
    )


def test_the_order_in_a_file_does_not_matter(source: Path, target: Path) -> None:
    for rank, names in ((0, "ab"), (1, "ba"), (2, "ab"), (3, "ab")):
        entries = dict.fromkeys(names, CUT)
        (source / NAME.format(rank)).write_bytes(strategy_file(entries, 0))
    assert merge_pipeline_strategys(source, target).by_stage()[0] == {"a": CUT, "b": CUT}


def test_stages_of_different_size(source: Path, target: Path, capsys) -> None:
    for rank in range(4, 8):
        layout = TensorLayout((8,), ((0, -1),))
        (source / NAME.format(rank)).write_bytes(strategy_file({"w": layout}, 1))
    error = said(source, target, capsys)
    assert "stage 0 has 4 ranks, stage 1 has 8: all stages have the same number of ranks" in error


def test_an_existing_file_is_kept_unless_asked(source: Path, target: Path, capsys) -> None:
    target.parent.mkdir()
    target.write_bytes(b"precious")
    assert said(source, target, capsys) == (
        f"error: {target}: exists: existing files are not replaced by default. Give "
        "another file, or --overwrite (`overwrite=True`)."
    )
    assert main(["--src", str(source), "--dst", str(target), "--overwrite"]) == 0
    assert parse(target.read_bytes(), "").current_stage == MERGED


def test_the_target_is_no_place_for_a_file(source: Path, tmp_path: Path, capsys) -> None:
    assert "is in" in (error := said(source, source / "dst.ckpt", capsys))
    assert f"Possible: {tmp_path}/merged_strategy/dst.ckpt." in error
    (tmp_path / "folder").mkdir()
    assert "is a folder" in (error := said(source, tmp_path / "folder", capsys))
    assert f"Possible: {tmp_path}/folder/dst_strategy.ckpt." in error
    (tmp_path / "file").touch()
    error = said(source, tmp_path / "file" / "dst.ckpt", capsys)
    assert "cannot be written: " in error
    assert f"Its folder is {tmp_path}/file. Give another file." in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(source: Path, tmp_path: Path, capsys) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "cannot be written: Permission denied" in said(source, locked / "dst.ckpt", capsys)


def test_a_write_that_fails_leaves_nothing(source: Path, target: Path, capsys, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "cannot be written: No space left on device" in said(source, target, capsys)
    assert list(target.parent.iterdir()) == []


def test_a_real_process(source: Path, target: Path) -> None:
    command = [sys.executable, "-m", "launcher.tools.merge_strategy", "--src", str(source)]
    result = subprocess.run([*command, "--dst", str(target)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    again = subprocess.run([*command, "--dst", str(target)], capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1


def test_torch_is_not_loaded(source: Path, target: Path) -> None:
    code = (
        "import sys; from launcher.tools.merge_strategy import main; "
        f"assert main(['--src', {str(source)!r}, '--dst', {str(target)!r}]) == 0; "
        "print({'torch', 'numpy', 'transformers', 'google.protobuf'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1:] == ["set()"], result.stderr


def test_sixteen_files_of_a_large_model(tmp_path: Path) -> None:
    mesh = {"pp": 2, "dp_shard": 4, "tp": 2}
    for stage in range(2):
        made = {f"model.layers.{stage}.{i}.w": entry((64, 32), (("tp", 0), ("dp_shard", 0)), mesh)
                for i in range(400)}  # fmt: skip
        entries = {name: layout for name, layout in made.items() if layout is not None}
        data = strategy_file(entries, stage, prefixes=("adam_m.", "adam_v."))
        for rank in range(8):
            (tmp_path / NAME.format(stage * 8 + rank)).write_bytes(data)
    with pytest.raises(UserError, match="no such folder"):
        read_folder(tmp_path / "absent")
    assert len(read_folder(tmp_path).layouts) == 2400
