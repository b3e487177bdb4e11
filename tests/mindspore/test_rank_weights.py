"""Rank files and complete weights that MindSpore 2.10.0 wrote open bit for bit; strategy files that
do not fit are refused.

The golden files are a few in `fixtures/`, and all of them where a checkout has them. Runs of other
layouts are made here, by the rule of `launcher.mindspore.tensor_layout`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.mindspore.rank_weights import open_mindspore_ranks
from launcher.mindspore.strategy import MERGED, Strategy, parse, serialize, strategy_file
from launcher.mindspore.strategy_files import read_strategy
from launcher.mindspore.tensor_layout import TensorLayout, boxes
from launcher.weights.offline.merge import merge
from launcher.weights.source import Source, open_complete
from tests.mindspore.golden import ALL, needs_all
from tests.mindspore.golden import HERE as STRATEGIES
from tests.weights.content import Content, content, extras

HERE = Path(__file__).parent / "fixtures"
EXTRAS = {"epoch_num", "step_num", "global_step", "loss_scale", "learning_rate"}
GENUINE = ("moe_dp4mp2_opt_dedup", "layout_dp2sp2mp2_opt")
ALL_TREES = (
    "dp2mp2pp2", "dp2mp2pp2_dedup", "dp2mp2pp2_opt", "dp2mp2pp2_opt_dedup", "dp2mp4_vocabdp_dedup",
    "dp4mp2_opt2_dedup", "layout_dp2sp2mp2", "layout_dp2sp2mp2_opt", "moe_dp4mp2_opt",
    "moe_dp4mp2_opt_dedup", "mp2", "pp4",
)  # fmt: skip


def family(case: str) -> str:
    """The model of a golden case."""
    return next((name for name in ("moe", "layout") if case.startswith(name)), "llama")


def genuine(root: Path, strategies: Path, tree: str) -> Source:
    """A golden tree, opened."""
    folder = root / "ranks" / tree
    files = sorted(folder.glob("rank_*/*.safetensors"))
    return open_mindspore_ranks(folder, files, read_strategy(
        strategies / tree.removesuffix("_dedup")))  # fmt: skip


def full(root: Path, name: str) -> Content:
    """The whole weights a golden tree was cut from."""
    return content(open_complete(root / "full" / name / "model.safetensors"))


@pytest.mark.parametrize("tree", GENUINE)
def test_genuine_rank_files_are_the_whole_they_were_cut_from(tree: str) -> None:
    source = genuine(HERE, STRATEGIES, tree)
    assert content(source) == full(HERE, family(tree))
    assert (source.kind, source.world_size, source.mesh) == ("distributed", 8, None)
    assert source.is_deduplicated == tree.endswith("_dedup")
    assert source.extras.keys() == EXTRAS
    assert source.remarks == ()


@needs_all
@pytest.mark.parametrize("tree", ALL_TREES)
def test_every_genuine_tree(tree: str) -> None:
    source = genuine(ALL / "dist", ALL / "strategies", tree)
    assert content(source) == full(ALL / "dist", family(tree))
    assert source.extras.keys() == EXTRAS


@needs_all
@pytest.mark.parametrize("tree", [tree for tree in ALL_TREES if "pp" in tree])
def test_a_merged_strategy_file_says_the_same_as_its_folder(tree: str) -> None:
    case = tree.removesuffix("_dedup")
    merged = ALL / "strategies" / f"{case}.merged.ckpt"
    folder = ALL / "dist" / "ranks" / tree
    files = list(folder.glob("rank_*/*.safetensors"))
    source = open_mindspore_ranks(folder, files, read_strategy(merged))
    assert content(source) == content(genuine(ALL / "dist", ALL / "strategies", tree))


@needs_all
@pytest.mark.parametrize("stage", [0, 1])
def test_the_strategy_of_one_stage_is_not_that_of_a_run_of_two(stage: int) -> None:
    folder = ALL / "dist" / "ranks" / "dp2mp2pp2"
    file = ALL / "strategies" / "dp2mp2pp2" / f"ckpt_strategy_rank_{stage * 4}.ckpt"
    with pytest.raises(UserError, match=("rank 7", "describe pipeline stage 1: ")[stage]):
        open_mindspore_ranks(folder, list(folder.glob("rank_*/*.safetensors")), read_strategy(file))


@needs_all
def test_the_strategy_of_a_prediction_does_not_know_the_optimizer() -> None:
    folder = ALL / "dist" / "ranks" / "mp2"
    with pytest.raises(UserError) as caught:
        open_mindspore_ranks(
            folder,
            list(folder.glob("rank_*/*.safetensors")),
            read_strategy(ALL / "strategies" / "mp2_predict"),
        )
    assert "do not have `adam_m.lm_head.weight`" in str(caught.value)
    assert "its optimizer state" in str(caught.value)


# --- merged, by us and by MindSpore -----------------------------------------------------------


def test_a_merge_gives_what_mindspore_gives(tmp_path) -> None:
    strategy = STRATEGIES / "moe_dp4mp2_opt"
    merge(HERE / "ranks" / GENUINE[0], tmp_path / "ours", suffix="1_2", strategy=strategy,
          form="mindspore")  # fmt: skip
    theirs, ours = open_complete(HERE / "unified" / "moe_dp4mp2_opt"), open_complete(
        tmp_path / "ours")  # fmt: skip
    assert content(ours) == content(theirs) == full(HERE, "moe")
    assert extras(ours) == extras(theirs)
    assert ours.extras.keys() == EXTRAS


def no_index(folder: Path) -> None:
    (folder / "param_name_map.json").unlink()


def flat_index(folder: Path) -> None:
    index = folder / "param_name_map.json"
    index.write_text(json.dumps(json.loads(index.read_bytes())["weight_map"]))


def two_parts_without_index(folder: Path) -> None:
    no_index(folder)
    save_file({"more": torch.ones(2)}, folder / "part1.safetensors")


@pytest.mark.parametrize("change", [no_index, flat_index, two_parts_without_index])
def test_what_mindspore_puts_beside_complete_weights_is_no_weight(tmp_path, change) -> None:
    folder = tmp_path / "unified"
    shutil.copytree(HERE / "unified" / "moe_dp4mp2_opt", folder)
    change(folder)
    source = open_complete(folder)
    assert source.tensors.keys() - {"more"} == full(HERE, "moe").keys()
    assert source.extras.keys() == EXTRAS
    assert {file.name for file in source.headers} >= {"hyper_param.safetensors"}


@needs_all
@pytest.mark.parametrize("case", ["dp2mp2pp2", "filter_adam", "rename", "three_parts"])
def test_complete_weights_of_mindspore(case: str) -> None:
    source = open_complete(ALL / "dist" / "unified" / case)
    expected = full(ALL / "dist", "llama")
    if case in ("filter_adam", "rename"):
        expected = {n: tensor for n, tensor in expected.items() if not n.startswith("adam")}
    if case == "rename":
        expected = {re.sub(r"^model\.", "transformer.", n): t for n, t in expected.items()}
    assert content(source) == expected
    assert source.extras.keys() >= EXTRAS
    assert not any(name.startswith("accu_grads") for name in source.extras)


# --- runs made here ---------------------------------------------------------------------------

DP2_MP2 = (2, 2)
"""A grid of 4 ranks: rows of copies, columns of parts."""


def layout(*dims: int, grid: tuple[int, ...] = DP2_MP2) -> TensorLayout:
    """The layout of a tensor whose dims are cut by these grid axes; -1: not cut."""
    return TensorLayout(grid, (dims,))


Stages = Mapping[int, Mapping[str, TensorLayout]]


class Run:
    """A run of MindSpore: tensors, how each stage cuts them, and a folder for its rank files."""

    def __init__(self, folder: Path, stages: Stages, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.folder, self.stages = folder, stages
        self.tensors = {
            name: torch.randn([8, 4][: len(item.positions)], generator=generator)
            for stage in stages.values()
            for name, item in sorted(stage.items())
        }

    @property
    def strategy(self) -> Strategy:
        """Its strategy, read back from the bytes of a merged file."""
        parts = [
            parse(strategy_file(stage, index), "made here") for index, stage in self.stages.items()
        ]
        named = [
            (f"{index}-{name}", item)
            for index, part in zip(self.stages, parts, strict=True)
            for name, item in part.layouts
        ]
        operators = tuple(operator for part in parts for operator in part.operators)
        return parse(serialize(Strategy(operators, tuple(named), MERGED)), "made here")

    def save(self, step: int = 6, **more: torch.Tensor) -> list[Path]:
        """Write the file of each rank, with `more` in all of them."""
        return [file for stage in self.stages for file in self.save_stage(stage, step, **more)]

    def save_stage(self, stage: int, step: int = 6, **other: torch.Tensor) -> list[Path]:
        """Write the files of one stage. `other` is whole, and cut where the stage cuts it."""
        layouts = self.stages[stage]
        ranks = next(iter(layouts.values())).ranks
        first = stage * ranks
        counters = {"epoch_num": torch.tensor(1), "step_num": torch.tensor(step)}
        files = []
        for local in range(ranks):
            tensors = {**{name: self.tensors[name] for name in layouts}, **other, **counters}
            held = {name: self._part(layouts.get(name), whole, local)
                    for name, whole in tensors.items()}  # fmt: skip
            name = f"rank_{first + local}"
            path = self.folder / name / f"toy_{name}-1_2.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(held, path, {"format": "ms"})
            files.append(path)
        return files

    def _part(self, item: TensorLayout | None, whole: torch.Tensor, local: int) -> torch.Tensor:
        if item is None:
            return whole
        box = boxes(item, tuple(whole.shape), local)[0]
        cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
        return whole[cut].clone()

    def open(self, files: list[Path] | None = None, strategy: Strategy | None = None) -> Source:
        """Its files, or those given, opened with its strategy or another one."""
        return open_mindspore_ranks(self.folder, files or self.save(), strategy or self.strategy)


ONE_STAGE = {0: {"w": layout(0, -1), "norm": layout(-1)}}
TWO_STAGES = {
    0: {"w": layout(0, -1), "embed": layout(-1, 0)},
    1: {"v": layout(-1, 0), "embed": layout(-1, 0)},
}


def assert_equal(source: Source, tensors: Mapping[str, torch.Tensor]) -> None:
    assert {name: value[2] for name, value in content(source).items()} == {
        name: tensor.numpy().tobytes() for name, tensor in tensors.items()
    }


def test_copies_stand_in_for_lost_ranks(tmp_path) -> None:
    run = Run(tmp_path, ONE_STAGE)
    source = run.open(run.save()[2:])
    assert_equal(source, run.tensors)
    assert source.remarks == (
        f"{tmp_path}: ranks 0, 1 have no valid file; their parts are read from the ranks that hold "
        "the same",
    )


def test_a_tensor_of_two_stages_is_that_of_the_first_one_that_has_it_whole(tmp_path) -> None:
    run, later = Run(tmp_path, TWO_STAGES), Run(tmp_path, TWO_STAGES, seed=1)
    files = later.save()[4:] + run.save()[:4]
    run.save_stage(1, embed=later.tensors["embed"])
    assert_equal(run.open(files), run.tensors)
    only_embed = Run(tmp_path, {0: {"embed": layout(-1, 0)}, 1: TWO_STAGES[1]}).strategy
    expected = {"embed": later.tensors["embed"], "v": run.tensors["v"]}
    assert_equal(run.open(files[:4], only_embed), expected)


def test_gradients_under_way_and_state_in_memory_are_left_out(tmp_path) -> None:
    run = Run(tmp_path, {0: {**ONE_STAGE[0], "accu_grads.w": layout(0, -1)}})
    more = {"zeros_k_pe": torch.ones(2, 3, 4), "loss_scale": torch.ones(1)}
    source = run.open(run.save(**more))
    assert source.tensors.keys() == {"w", "norm"}
    assert source.extras.keys() == {"epoch_num", "step_num", "loss_scale"}


def test_state_of_a_kind_that_no_file_has_was_not_saved(tmp_path) -> None:
    run = Run(tmp_path, ONE_STAGE)
    known = Run(tmp_path, {0: {**ONE_STAGE[0], "adam_m.w": layout(0, -1)}}).strategy
    assert_equal(run.open(run.save()[:2], known), run.tensors)


# --- what does not fit ------------------------------------------------------------------------

Opened = Callable[[Path], object]


def lost_part(folder: Path) -> object:
    run = Run(folder, ONE_STAGE)
    return run.open([run.save()[0], run.save()[2]])


def lost_stage(folder: Path) -> object:
    run = Run(folder, TWO_STAGES)
    return run.open(run.save()[:4])


def too_many_ranks(folder: Path) -> object:
    run = Run(folder, TWO_STAGES)
    return run.open(strategy=Run(folder, ONE_STAGE).strategy)


def only_stage_1(folder: Path) -> object:
    return Run(folder, ONE_STAGE).open(strategy=Run(folder, {1: ONE_STAGE[0]}).strategy)


def uneven_stages(folder: Path) -> object:
    stages = {0: {"w": layout(0, -1)}, 1: {"v": layout(0, -1, grid=(2,))}}
    return Run(folder, ONE_STAGE).open(strategy=Run(folder, stages).strategy)


def stages_swapped(folder: Path) -> object:
    swapped = {0: {"v": layout(-1, 0)}, 1: {"w": layout(0, -1)}}
    run = Run(folder, {0: {"w": layout(0, -1)}, 1: {"v": layout(-1, 0)}})
    return run.open(strategy=Run(folder, swapped).strategy)


def other_dims(folder: Path) -> object:
    other = {0: {"w": layout(0), "norm": layout(-1)}}
    return Run(folder, ONE_STAGE).open(strategy=Run(folder, other).strategy)


def other_grid(folder: Path) -> object:
    """Four parts are taken for two, each with a copy."""
    run = Run(folder, {0: {"w": layout(0, -1, grid=(4,))}})
    return run.open(strategy=Run(folder, {0: {"w": layout(0, -1)}}).strategy)


def more_ranks_than_files(folder: Path) -> object:
    eight = {0: {"w": layout(0, -1, grid=(8,)), "norm": layout(-1, grid=(8,))}}
    return Run(folder, ONE_STAGE).open(strategy=Run(folder, eight).strategy)


def unknown_matrix(folder: Path) -> object:
    run = Run(folder, ONE_STAGE)
    return run.open(run.save(**{"adam_m.w": torch.ones(4, 4)}))


def two_steps(folder: Path) -> object:
    run = Run(folder, ONE_STAGE)
    later = run.save(step=12)[3].read_bytes()
    files = run.save(step=6)
    files[3].write_bytes(later)
    return run.open(files)


def two_shapes(folder: Path) -> object:
    run = Run(folder, ONE_STAGE)
    files = run.save()
    save_file({"w": torch.ones(3, 4), "norm": run.tensors["norm"]}, files[3])
    return run.open(files)


def one_rank_twice(folder: Path) -> object:
    run = Run(folder, ONE_STAGE)
    files = run.save()
    second = Path(shutil.copy(files[0], files[0].with_name("toy_rank_0_1-1_2.safetensors")))
    return run.open([*files, second])


def no_rank_folder(folder: Path) -> object:
    run = Run(folder, ONE_STAGE)
    return run.open([Path(shutil.copy(run.save()[0], folder / "toy.safetensors"))])


def no_layouts(folder: Path) -> object:
    return Run(folder, ONE_STAGE).open(strategy=Strategy((), ()))


GIVE = "Give the strategy files of the run that wrote the rank files, of all pipeline stages."
MISFITS: tuple[tuple[Opened, str], ...] = (
    (lost_part, "{f} does not hold all of `w` (16 of 32 elements): ranks 1, 3 have no valid file "
                "in {f}, and no other rank holds their parts. The strategy files describe "
     "4 ranks, 2 have a file. Copy the missing rank folders, or choose another checkpoint."),
    (lost_stage, "{f}: no file holds `v`: the strategy files list them; of 8 ranks the file is "
                 "missing of 4, 5, 6, 7. Copy the missing rank folders. " + GIVE),
    (too_many_ranks, "{f}: {f}/rank_7/toy_rank_7-1_2.safetensors is of rank 7: the strategy files "
     "describe 4 ranks, from 0 on. " + GIVE),
    (only_stage_1, "{f}: the strategy files describe pipeline stage 1: the stages of a run are 0 "
     "to n - 1 without gaps. " + GIVE),
    (uneven_stages, "{f}: the strategy files describe stages of 2 and of 4 ranks: all stages of a "
                    "run have the same number of ranks. " + GIVE),
    (stages_swapped, "{f}: {f}/rank_0/toy_rank_0-1_2.safetensors holds `w`: the strategy files "
     "have it in pipeline stage 1, which is ranks 4 to 7. " + GIVE),
    (other_dims, "{f}: `w` has shape [4, 4] in {f}/rank_0/toy_rank_0-1_2.safetensors: the layout "
     "is of a tensor of 1 dims, the shape is [4, 4]: the strategy files must be of the run that "
     "wrote the rank files. " + GIVE),
    (other_grid, "{f}: `w` differs in {f}/rank_0/toy_rank_0-1_2.safetensors and "
     "{f}/rank_2/toy_rank_2-1_2.safetensors: by the strategy files these ranks hold replicas of "
     "one shard. " + GIVE),
    (more_ranks_than_files, "{f} does not hold all of `w` (64 of 128 elements): ranks 4, 5, 6, 7 "
     "have no valid file in {f}, and no other rank holds their parts. The strategy files "
     "describe 8 ranks, 4 have a file. Copy the missing rank folders, or choose another "
     "checkpoint."),
    (unknown_matrix, "{f}: the strategy files do not have `adam_m.w`: they list every matrix of "
                     "the run that wrote the rank files, and its optimizer state. " + GIVE),
    (two_steps, "{f}: {f}/rank_0/toy_rank_0-1_2.safetensors has step_num 6, "
     "{f}/rank_3/toy_rank_3-1_2.safetensors has 12: the files of one save are of one step. Move "
     "the files of the other run or step away."),
    (two_shapes, "{f}: `w` is F32 [8, 4] in {f}/rank_0/toy_rank_0-1_2.safetensors, F32 [6, 4] in "
     "{f}/rank_3/toy_rank_3-1_2.safetensors: shape and dtype of a tensor are the same on all "
     "ranks of a save."),
    (one_rank_twice, "{f}/rank_0/toy_rank_0_1-1_2.safetensors and toy_rank_0-1_2.safetensors are "
     "of one rank: a save has one file for each rank, in rank_<number>/. Move the files of the "
     "other run away."),
    (no_rank_folder, "{f}/toy.safetensors is not in a rank folder: a save has one file for each "
                     "rank, in rank_<number>/. Move the files of the other run away."),
    (no_layouts, "{f}: the strategy files describe no pipeline stage: the stages of a run are 0 "
     "to n - 1 without gaps. " + GIVE),
)  # fmt: skip


@pytest.mark.parametrize(("open_it", "text"), MISFITS, ids=[f.__name__ for f, _ in MISFITS])
def test_what_does_not_fit_is_refused(tmp_path, open_it: Opened, text: str) -> None:
    with pytest.raises(UserError) as caught:
        open_it(tmp_path)
    assert text.format(f=tmp_path) in str(caught.value)


def test_damaged_rank_files_in_mindspores_own_format_are_refused(tmp_path) -> None:
    run = Run(tmp_path, ONE_STAGE)
    files = run.save()
    files[1].write_bytes(b"\x0a\x20\x0a\x01w\x12\x1b\x08\x02" + bytes(20))
    with pytest.raises(UserError, match=r"is not a valid \.ckpt file of MindSpore"):
        run.open(files)
