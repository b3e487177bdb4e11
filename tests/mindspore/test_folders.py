"""Folders as MindSpore and the pages about it make them: a run of one rank, names without an
underscore, the numbers beside the model. What is loaded is what is in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.checkpoint.resolve import open_weights
from launcher.checkpoint.resume import choose
from launcher.errors import UserError
from launcher.layout.box import full_box
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.mindspore.strategy import strategy_file
from launcher.mindspore.tensor_layout import TensorLayout
from launcher.parallel.world import World
from launcher.tools.slice_safetensors import main as slice_main
from launcher.weights import list_checkpoints, unified_safetensors, verify
from launcher.weights.offline.convert import ckpt_to_safetensors
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.reading.load import load
from launcher.weights.reading.scalars import scalars_of
from launcher.weights.source import Source, open_complete
from tests.mindspore.golden import ALL, needs_all
from tests.tools.checkpoints import save, tensors

ALONE = World(0, 1, torch.device("cpu"))
NUMBERS = {
    "epoch_num": torch.tensor(2), "step_num": torch.tensor(6),
    "global_step": torch.tensor([6], dtype=torch.int32), "loss_scale": torch.tensor([1024.0]),
    "learning_rate": torch.tensor(0.5), "global_batch_size": torch.tensor(8),
}  # fmt: skip
VALUES = {name: tensor.item() for name, tensor in NUMBERS.items()}
WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
STATE = {"adam_m.w": torch.ones(2, 3), "adam_v.w": torch.ones(2, 3)}
IN_MEMORY = {"accu_grads.w": torch.ones(2, 3), "fi_parameter": torch.ones(2)}


def rank_file(root: Path, place: str = "rank_0/net_rank_0-2_2", marker: str = "False") -> Path:
    """A file as CheckpointMonitor leaves it."""
    path = root / f"{place}.safetensors"
    path.parent.mkdir(parents=True)
    metadata = {"format": "ms", "remove_redundancy": marker}
    save_file(WEIGHTS | STATE | NUMBERS | IN_MEMORY, path, metadata)
    return path


def loaded(source: Source, names: tuple[str, ...] = ("w", "b")) -> dict[str, torch.Tensor]:
    """The tensors that a strict load of a model that has `names` gives."""
    made = {name: torch.zeros(source.shape(name)) for name in names}
    load({n: Shard(tuple(t.shape), full_box(tuple(t.shape)), t) for n, t in made.items()}, source)
    return made


OPENERS: dict[str, Callable[[Path], Source]] = {
    "a run": lambda root: open_weights(root, ALONE, str),
    "a tool": open_any_format,
    "a resume": lambda root: choose(root, True, ALONE, str).source,  # type: ignore[union-attr]
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("place", ["rank_0/net_rank_0-2_2", "rank0/net_rank_0-2_2"])
@pytest.mark.parametrize("marker", ["False", "True"])
def test_the_file_of_a_single_rank_is_complete(
    tmp_path: Path, opener: str, place: str, marker: str
) -> None:
    """No strategy files are needed; a folder of them that is empty does no harm."""
    rank_file(tmp_path / "checkpoint", place, marker)
    (tmp_path / "strategy").mkdir()
    source = OPENERS[opener](tmp_path / "checkpoint")
    assert (source.kind, source.world_size) == ("distributed", 1)
    assert source.tensors.keys() == {*WEIGHTS, *STATE}
    assert scalars_of(source) == VALUES
    assert "one rank folder and no strategy files" in source.remarks[0]
    assert all(torch.equal(found, WEIGHTS[name]) for name, found in loaded(source).items())
    assert not verify(tmp_path / "checkpoint").faults
    (row,) = list_checkpoints(tmp_path)
    assert not row.is_damaged


def test_it_is_merged_with_its_numbers(tmp_path: Path) -> None:
    rank_file(tmp_path / "checkpoint")
    unified_safetensors(tmp_path / "checkpoint", tmp_path / "out", file_suffix="2_2")
    assert load_file(tmp_path / "out/hyper_param.safetensors").keys() == NUMBERS.keys()
    source = open_any_format(tmp_path / "out")
    assert source.tensors.keys() == {*WEIGHTS, *STATE}
    assert scalars_of(source) == VALUES


@needs_all
def test_the_genuine_one_is_resumed_from() -> None:
    said: list[str] = []
    found = choose(ALL / "monitor/checkpoint", True, ALONE, said.append)
    assert found is not None
    assert found.label == "toy-2_2"
    assert scalars_of(found.source)["step_num"] == 6


@pytest.mark.parametrize("places", [
    ("rank_1/net_rank_1-2_2",), ("rank_0/net_rank_0-2_2", "rank_1/net_rank_1-2_2"),
])  # fmt: skip
def test_files_of_several_ranks_need_their_strategy(tmp_path: Path, places) -> None:
    for place in places:
        rank_file(tmp_path, place)
    for opener in ("a run", "a tool"):
        with pytest.raises(UserError, match="does not describe its layout"):
            OPENERS[opener](tmp_path)


def test_a_rank_has_one_folder(tmp_path: Path) -> None:
    for place in ("rank_0/net_rank_0-2_2", "rank0/net_rank_0-2_2"):
        rank_file(tmp_path, place)
    with pytest.raises(UserError, match="holds rank0/ and rank_0/: a rank has one folder"):
        open_any_format(tmp_path)


def test_one_level_above_the_way_down_is_shown(tmp_path: Path) -> None:
    """The folder of logs has rank folders too, and no weights in them."""
    rank_file(tmp_path / "output/checkpoint", "rank0/net_rank_0-2_2")
    (tmp_path / "output/a_log/rank_0").mkdir(parents=True)
    for opener in (*list(OPENERS.values())[:2], verify):
        with pytest.raises(UserError) as caught:
            opener(tmp_path / "output")
        assert f"did you mean `{tmp_path / 'output/checkpoint'}`?" in str(caught.value)
        with pytest.raises(UserError, match="holds no weights"):
            opener(tmp_path / "output/a_log/rank_0")


@pytest.mark.parametrize("names", ["toy{}", "net_{}", "net_rank_{}", "checkpoint_{}"])
def test_files_that_have_the_rank_behind_their_name(tmp_path: Path, names: str) -> None:
    rows = TensorLayout((2,), ((0, -1),))
    for rank in range(2):
        path = tmp_path / f"ranks/rank_{rank}/{names.format(rank)}.safetensors"
        path.parent.mkdir(parents=True)
        save_file({"w": WEIGHTS["w"][rank : rank + 1].clone()}, path, {"format": "ms"})
    (tmp_path / "s.ckpt").write_bytes(strategy_file({"w": rows}, 0))
    for place in (tmp_path / "ranks", path):
        assert open_any_format(place, strategy=tmp_path / "s.ckpt").shape("w") == (2, 3)


def test_numbers_in_a_single_file_are_none_of_the_model(tmp_path: Path) -> None:
    """As save_checkpoint with append_dict writes it; a model may have a scale of its own name."""
    more = {"layer.loss_scale": torch.ones(1)}
    save_file(WEIGHTS | NUMBERS | more | {"accu_grads.w": torch.ones(2, 3)},
              tmp_path / "net.safetensors", {"format": "ms"})  # fmt: skip
    source = open_complete(tmp_path / "net.safetensors")
    assert scalars_of(source) == VALUES
    assert loaded(source, ("w", "b", "layer.loss_scale")).keys() == {*WEIGHTS, *more}


def test_numbers_are_sliced_loaded_and_merged_again(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    save_file(WEIGHTS, tmp_path / "full/model.safetensors", {"format": "ms"})
    others = {"adam_m.other": torch.ones(3), "seed": torch.ones(2)}
    save_file(NUMBERS | others, tmp_path / "full/hyper_param.safetensors", {"format": "ms"})
    (tmp_path / "s.ckpt").write_bytes(strategy_file({"w": TensorLayout((2,), ((0, -1),))}, 0))
    arguments = ["--unified_safetensors_dir", str(tmp_path / "full"), "--predict_strategy",
                 str(tmp_path / "s.ckpt"), "--dst_safetensors_dir"]  # fmt: skip
    assert slice_main([*arguments, str(tmp_path / "ranks")]) == 0
    for rank in range(2):
        found = load_file(tmp_path / f"ranks/rank_{rank}/net_rank_{rank}-1_1.safetensors")
        assert {name: found[name].item() for name in NUMBERS} == VALUES
        assert found["global_step"].dtype == torch.int32
        assert others.keys().isdisjoint(found)
    source = open_any_format(tmp_path / "ranks")
    assert scalars_of(source) == VALUES
    assert torch.equal(loaded(source)["w"], WEIGHTS["w"])
    shutil.rmtree(tmp_path / "ranks/rank_1")
    with pytest.raises(UserError, match="does not hold all of `w`"):
        open_any_format(tmp_path / "ranks")
    assert slice_main([*arguments, str(tmp_path / "again")]) == 0
    unified_safetensors(tmp_path / "again", tmp_path / "out")
    assert scalars_of(open_any_format(tmp_path / "out")) == VALUES


def test_one_rank_of_several_is_not_sliced_as_if_it_were_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        rank_file(tmp_path / "checkpoint", f"rank_{rank}/net_rank_{rank}-2_2")
    (tmp_path / "s.ckpt").write_bytes(strategy_file({"w": TensorLayout((2,), ((0, -1),))}, 0))
    arguments = ["--unified_safetensors_dir", str(tmp_path / "checkpoint/rank_0"),
                 "--predict_strategy", str(tmp_path / "s.ckpt"),
                 "--dst_safetensors_dir", str(tmp_path / "ranks")]  # fmt: skip
    assert slice_main(arguments) == 2
    said = capsys.readouterr().err
    assert "checkpoint/rank_0 is the folder of one rank" in said
    assert f"did you mean `{tmp_path / 'checkpoint'}`?" in said
    assert not (tmp_path / "ranks").exists()


def test_numbers_beside_the_weights_of_torch_are_converted(tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "epoch_num": 2, "step_num": 6, "loss_scale": 1024.0,
               "learning_rate": "0.5", "args": {"lr": 1}}  # fmt: skip
    torch.save(content, tmp_path / "net.ckpt")
    said: list[str] = []
    ckpt_to_safetensors(tmp_path / "net.ckpt", tmp_path / "out", log=said.append)
    assert said == [f"{tmp_path / 'net.ckpt'}: left out, no tensors: learning_rate, args"]
    source = open_complete(tmp_path / "out/net.safetensors")
    assert source.tensors.keys() == WEIGHTS.keys()
    assert scalars_of(source) == {n: VALUES[n] for n in ("epoch_num", "loss_scale", "step_num")}


def test_strategy_files_that_are_not_there_are_an_error_wherever_they_go(tmp_path: Path) -> None:
    """Where they are not needed too: of complete weights, of one file and of ranks of ours."""
    save(tmp_path / "ranks", tensors(), Mesh())
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    for path in (tmp_path / "ranks", tmp_path / "w.safetensors"):
        for look in (lambda p, s: open_any_format(p, strategy=s), verify):
            with pytest.raises(UserError, match="nowhere: there is no such path"):
                look(path, tmp_path / "nowhere")
    said: list[str] = []
    open_any_format(tmp_path / "w.safetensors", strategy=tmp_path, log=said.append)
    assert said == [f"{tmp_path}: not needed, {tmp_path}/w.safetensors holds complete weights"]
