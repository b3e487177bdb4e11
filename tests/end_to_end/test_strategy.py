"""Strategy files: every training run writes them, one process can write those of any number of
ranks, and they agree with the layout of Slipway."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from launcher.builders.job import Job
from launcher.builders.layout import model_layout
from launcher.config.command_line import parse as parse_words
from launcher.config.resolve import resolve_command_line
from launcher.layout.box import Box
from launcher.layout.layout import Layout
from launcher.mindspore.strategy import Strategy, parse
from launcher.mindspore.strategy_files import read_folder, read_strategy
from launcher.mindspore.tensor_layout import TensorLayout, boxes
from launcher.modes import world_without_group
from launcher.report.console import Console
from launcher.weights.formats.safetensors import read_header
from models.build import build_model
from models.families import DECODERS
from models.names import unstacked
from tests.parallel.parity import FAMILIES
from tests.ranks import JobResult, run_job
from tests.workshop import Workshop

ROOT = Path(__file__).parents[2]

SAMPLE = """\
model:
  model_config:
    type: LlamaConfig
    vocab_size: 512
    hidden_size: 64
    intermediate_size: 96
    num_hidden_layers: 4
    num_attention_heads: 8
    num_key_value_heads: 4

# Set only_save_strategy to True to get a distributed strategy file
only_save_strategy: True

# Configure dataset paths
train_dataset: &train_dataset
  data_loader:
    type: TextDataLoader
    dataset_dir: "/worker/dataset/wikitext_2048/"
    shuffle: True

# Configure 16-card distributed strategy (for information only)
parallel_config:
  data_parallel: 2
  model_parallel: 4
  pipeline_stage: 2
  micro_batch_num: 2
  vocab_emb_dp: True
  gradient_aggregation_group: 4
  micro_batch_interleave_num: 1
"""
"""The seed's 16 cards: data that is not there, no tokenizer, no weights."""


RULES = DECODERS["deepseek_v3"].parameters | DECODERS["mixtral"].parameters
"""With all stacks of experts whose entries have names of their own in files."""


def layout_of(name: str) -> Layout:
    """Our layout for a configuration in the current directory."""
    resolved = resolve_command_line(parse_words(["--config", name, "--run_mode", "train"]))
    job = Job(resolved.config, resolved.provenance, world_without_group(), Console(enabled=False))
    return model_layout(
        build_model(job.spec, dtype=torch.float32), job.spec, job.mesh, split=job.split,
        vocab_emb_dp=job.config.parallel_config.vocab_emb_dp,
    )  # fmt: skip


def held_by(layout: Layout, rank: int) -> dict[str, tuple[tuple[int, ...], Box]]:
    """(shape, box) of every tensor of `rank`, by the names of its file."""
    rules = {} if any("gate_up_proj" in name for name in layout.shapes) else RULES
    held = {}
    for name, placement in layout.of(rank).items():
        (box,) = placement.boxes
        names = unstacked(name, placement.shape, rules)
        if names is None:
            held[name] = placement.shape, box
            continue
        for place in range(box.offset[0], box.offset[0] + box.size[0]):
            held[names[place]] = placement.shape[1:], Box(box.offset[1:], box.size[1:])
    return held


def assert_says(strategy: Strategy, layout: Layout) -> None:
    """The boxes of a merged strategy are those of the layout, on every rank."""
    by_stage, stage_size = strategy.by_stage(), layout.mesh.world_size // layout.mesh.pp
    assert list(by_stage) == list(range(layout.mesh.pp))
    for rank in range(layout.mesh.world_size):
        stage, local_rank = divmod(rank, stage_size)
        held, said = held_by(layout, rank), by_stage[stage]
        for name, made in said.items():
            shape, box = held[name.removeprefix("adam_m.").removeprefix("adam_v.")]
            assert boxes(made, shape, local_rank) == (box,), (rank, name)


def files(folder: Path) -> dict[int, bytes]:
    """Content by rank."""
    found = folder.glob("ckpt_strategy_rank_*.ckpt")
    return {int(file.stem.rpartition("_")[2]): file.read_bytes() for file in found}


def test_the_sample_of_sixteen_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(SAMPLE)
    before = _cpu_seconds()
    run = _command("run.py", "--config", "plan.yaml", "--run_mode", "train")
    assert run.returncode == 0, run.stderr
    assert _cpu_seconds() - before < 10  # not the clock: the machine may be busy
    assert run.stdout == "strategy: 16 files of 2 stages written to output/strategy\n"
    written = files(Path("output/strategy"))
    assert sorted(written) == list(range(16))
    assert len(list(Path("output/strategy").iterdir())) == 16
    assert (len(set(written.values())), written[0], written[8]) == (2, written[7], written[15])

    merged = "output/merged_strategy/dst_strategy.ckpt"
    tool = _command("-m", "launcher.tools.merge_strategy", "--src", "output/strategy",
                    "--dst", merged)  # fmt: skip
    assert tool.returncode == 0, tool.stderr
    strategy, layout = read_strategy(Path(merged)), layout_of("plan.yaml")
    assert_says(strategy, layout)
    for stage, said in strategy.by_stage().items():
        weights = {name for name in said if not name.startswith("adam_")}
        assert weights == set(layout.names(stage))
        assert len(said) == 3 * len(weights)
    first = strategy.by_stage()[0]
    assert first["model.embed_tokens.weight"] == TensorLayout((8,), ((-1, -1),))
    assert first["model.layers.0.mlp.up_proj.weight"] == TensorLayout((2, 4), ((0, -1),))


def _command(*words: str) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / words[0]), *words[1:]] if words[0].endswith(".py") else list(words)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *script], capture_output=True, text=True, env=environment
    )


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plan(workshop: Workshop, family: str, world: int = 1, **changes: object) -> JobResult:
    name = workshop.yaml(
        "plan.yaml", only_save_strategy=True, model={"model_config": None}, train_dataset=None,
        processor=None, load_checkpoint="/not/here", **changes,
    )  # fmt: skip
    config = yaml.safe_load((workshop.folder / name).read_text())
    config["model"]["model_config"] = FAMILIES[family]
    (workshop.folder / name).write_text(yaml.safe_dump(config))
    return run_job(["--config", name, "--run_mode", "train"], workshop.folder, world)


SHARDED = {"enable_parallel_optimizer": True}
PLANS = {
    "one process": ("llama", {}, {}, 0),
    "replicated": ("qwen2", {"data_parallel": 4}, {}, 0),
    "sharded": ("qwen3", {"data_parallel": 4, "model_parallel": 2}, SHARDED, 0),
    "groups": ("qwen3", {"data_parallel": 4, "model_parallel": 2},
               {**SHARDED, "parallel_optimizer_config": {"optimizer_weight_shard_size": 2}}, 0),
    "context": ("llama", {"data_parallel": 2, "context_parallel": 2, "model_parallel": 2},
                SHARDED, 0),
    "tied, V": ("qwen3 tied", {"pipeline_stage": 2, "model_parallel": 2, "micro_batch_num": 4},
                {"pipeline_config": {"pipeline_scheduler": "zero_bubble_v"}}, 0),
    "tied, loop": ("qwen3 tied", {"pipeline_stage": 2, "vocab_emb_dp": False, "model_parallel": 2,
                                  "micro_batch_num": 4},
                   {**SHARDED, "pipeline_config": {"pipeline_interleave": True}}, 0),
    "whole experts": ("qwen3 moe", {"data_parallel": 2, "model_parallel": 2}, {}, 0),
    "experts of Mixtral": ("mixtral", {"model_parallel": 4}, {}, 0),
    "stacks of gpt-oss": ("gpt-oss", {"model_parallel": 4}, {}, 0),
    "shared experts": ("deepseek", {"data_parallel": 4, "expert_parallel": 2}, SHARDED, 72),
    "sharded experts": ("qwen3 moe", {"data_parallel": 2}, SHARDED, 96),
    "uneven": ("llama", {"data_parallel": 3}, SHARDED, None),
    "a thousand ranks": ("llama", {"data_parallel": 64, "model_parallel": 4, "pipeline_stage": 4,
                            "micro_batch_num": 4}, {}, 0),
}  # fmt: skip
"""Family, degrees, more of `parallel`, and how many tensors the format cannot describe."""


@pytest.mark.parametrize("case", PLANS)
def test_plans_of_one_process(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    family, degrees, parallel, missing = PLANS[case]
    result = plan(workshop, family, parallel_config=degrees, parallel=parallel)
    assert result.code == 0, result.stderr
    monkeypatch.chdir(workshop.folder)
    layout = layout_of("plan.yaml")
    ranks, stages = layout.mesh.world_size, layout.mesh.pp
    words = f"{ranks:,} file{'s' * (ranks > 1)} of {stages} stage{'s' * (stages > 1)}"
    *warnings, last = result.stdout.splitlines()
    assert last == f"strategy: {words} written to output/strategy"
    assert sorted(files(Path("output/strategy"))) == list(range(ranks))
    merged = read_folder(Path("output/strategy"))
    assert_says(merged, layout)
    said = {name for stage in merged.by_stage().values() for name in stage}
    left_out = {name for rank in range(ranks) for name in held_by(layout, rank)} - said
    if missing is not None:
        assert len(left_out) == missing
    warning = f"warning: the strategy files leave out {len(left_out)} of "
    assert [line[: len(warning)] for line in warnings] == [warning] * bool(left_out)


def test_tensors_that_the_format_cannot_describe_are_logged_once(workshop: Workshop) -> None:
    result = plan(workshop, "qwen3 moe", parallel_config={"data_parallel": 2}, parallel=SHARDED)
    assert result.stdout == (
        "warning: the strategy files leave out 96 of 135 tensors, such as "
        "model.layers.0.mlp.experts.0.gate_proj.weight: the format knows neither pieces of unequal "
        "size nor experts that only some ranks hold\n"
        "strategy: 2 files of 1 stage written to output/strategy\n"
    )


def test_buffers_have_no_state_of_the_optimizer(workshop: Workshop) -> None:
    assert plan(workshop, "deepseek", parallel_config={"model_parallel": 2}).code == 0
    said = read_folder(workshop.folder / "output/strategy").by_stage()[0]
    buffers = {name for name in said if name.endswith("e_score_correction_bias")}
    assert len(buffers) == 3
    weights = {name for name in said if not name.startswith("adam_")}
    assert set(said) == weights | {f"adam_{m}.{n}" for m in "mv" for n in weights - buffers}


def test_in_a_launched_job_each_rank_writes_its_own(workshop: Workshop) -> None:
    result = plan(workshop, "llama", 4, parallel_config={"data_parallel": 2, "model_parallel": 2})
    assert result.codes == [0] * 4, result.stderr
    assert result.stdout == (
        "strategy: 4 files of 1 stage written to output/strategy, one by each process\n"
    )
    written = files(workshop.folder / "output/strategy")
    assert sorted(written) == [0, 1, 2, 3]
    assert len(set(written.values())) == 1


RECORDER = """
from pathlib import Path
from launcher.train.callbacks import Callback

class Recorder(Callback):
    def on_train_begin(self, run):
        file = Path(f"output/strategy/ckpt_strategy_rank_{run.world.rank}.ckpt")
        Path(f"seen_{run.world.rank}").write_bytes(file.read_bytes())
"""


def test_a_training_run_writes_them_before_it_begins(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop.folder)
    folder = Path("output/strategy")
    folder.mkdir(parents=True)
    for rank in (0, 9):
        (folder / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(b"of another run")
    Path("mine.py").write_text(RECORDER)
    name = workshop.yaml(
        register_path="mine.py", callbacks=[{"type": "Recorder"}, {"type": "CheckpointMonitor"}],
        runner_config={"max_steps": 1, "batch_size": 2},
        parallel_config={"data_parallel": 2, "model_parallel": 2}, parallel=SHARDED,
    )  # fmt: skip
    result = run_job(["--config", name, "--run_mode", "train"], workshop.folder, 4)
    assert result.code == 0, result.stderr
    assert (
        "warning: output/strategy holds 1 file of another run, such as ckpt_strategy_rank_9.ckpt: "
        "move them away before the strategies are merged"
    ) in result.stdout
    (folder / "ckpt_strategy_rank_9.ckpt").unlink()
    written = files(folder)
    for rank in range(4):
        assert written[rank] == Path(f"seen_{rank}").read_bytes() == written[0]
    assert_says(read_folder(folder), layout_of(name))
    said = parse(written[0], "rank 0").by_stage()[0]
    for rank in range(4):
        (file,) = Path(f"output/checkpoint/rank_{rank}").glob("*.safetensors")
        assert said.keys() == read_header(file).entries.keys()


def test_a_run_of_one_process_writes_one(workshop: Workshop) -> None:
    name = workshop.yaml(runner_config={"max_steps": 1}, callbacks=[])
    result = run_job(["--config", name, "--run_mode", "train"], workshop.folder)
    assert result.code == 0, result.stderr
    assert "strategy" not in result.stdout
    folder = workshop.folder / "output/strategy"
    assert sorted(files(folder)) == [0]
    assert {made.dev_matrix for _, made in read_folder(folder).layouts} == {(1,)}


def test_predict_has_no_strategy(workshop: Workshop) -> None:
    name = workshop.yaml(only_save_strategy=True)
    result = run_job(
        ["--config", name, "--run_mode", "predict", "--predict_data", "def"], workshop.folder
    )
    assert result.code == 2
    assert "only_save_strategy = True: not supported with run_mode predict" in result.stderr


def test_a_folder_that_cannot_be_made(workshop: Workshop) -> None:
    (workshop.folder / "output").mkdir()
    (workshop.folder / "output/strategy").write_text("a file")
    result = plan(workshop, "llama")
    assert result.code == 2
    assert result.stderr.startswith("error: output/strategy: ")
    assert (workshop.folder / "output/strategy").read_text() == "a file"
