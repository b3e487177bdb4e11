"""Sections of MindFormers' configurations in the keys of this launcher, one rule at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli
from launcher.config.printing import to_yaml
from launcher.config.resolve import Resolved, read_tree
from launcher.config.yaml_reader import read_text

LEGACY = "trainer: {model_name: x}\n"
EAGER = "training: {}\nmodel: {model_type: qwen3, num_hidden_layers: 4}\n"


def read(text: str) -> Resolved:
    return read_tree(read_text(text, "x.yaml"))


def value_of(resolved: Resolved, key: str) -> Any:
    value: Any = resolved.config
    for name in key.split("."):
        if isinstance(value, dict):
            value = value.get(name)
        else:
            value = value[int(name)] if isinstance(value, list) else getattr(value, name)
    return value


EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "words for null": (
        'optimizer: {learning_rate: "None"}\nmetric: {type: "null"}\ninput_data: "None"\n',
        {"optimizer.learning_rate": None, "input_data": "None"},
    ),
    "nothing given": ('output_dir: ""\nload_ckpt_format: ""\n', {"output_dir": "./output",
                                                                 "load_ckpt_format": None}),
    "a leftover of a template": (
        LEGACY + "run_mode: train\nload_checkpoint: ''\nauto_trans_ckpt: True\n",
        {"auto_trans_ckpt": None},
    ),
    "an assertion": ("run_mode: train\nauto_trans_ckpt: True\n", {"auto_trans_ckpt": True}),
    "one process": (
        "use_parallel: False\nparallel_config: {data_parallel: 2, model_parallel: 4}\n",
        {"parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1},
    ),
    "data parallel alone": (
        "parallel: {parallel_mode: 0}\nparallel_config: {data_parallel: 2, model_parallel: 4}\n",
        {"parallel_config.data_parallel": 2, "parallel_config.model_parallel": 1},
    ),
    "MANUAL_PARALLEL": (
        "parallel: {parallel_mode: MANUAL_PARALLEL}\nparallel_config: {model_parallel: 4}\n",
        {"parallel_config.model_parallel": 4},
    ),
    "more shards than ranks": (
        "parallel_config: {data_parallel: 2}\nparallel: {enable_parallel_optimizer: True, "
        "parallel_optimizer_config: {optimizer_weight_shard_size: 8}}\n",
        {"parallel.parallel_optimizer_config.optimizer_weight_shard_size": -1},
    ),
    "experts over tensor-parallel ranks": (
        LEGACY + "parallel_config: {data_parallel: 2, model_parallel: 4, expert_parallel: 8}\n",
        {"parallel_config.expert_parallel": 2},
    ),
    "a schedule over pieces of a sequence": (
        "parallel_config: {pipeline_stage: 2, seq_split_num: 4}\nparallel: {pipeline_config: "
        "{pipeline_interleave: True, pipeline_scheduler: seqpipe}}\n",
        {"parallel.pipeline_config.pipeline_scheduler": "1f1b",
         "parallel.pipeline_config.pipeline_interleave": False},
    ),
    "an interleaved one": (
        "model: {model_config: {pp_interleave_num: 2}}\nparallel_config: {pipeline_stage: 2}\n"
        "parallel: {pipeline_config: {pipeline_interleave: True, pipeline_scheduler: seqvpp}}\n",
        {"parallel.pipeline_config.pipeline_interleave": True},
    ),
    "layers of several stages on one": (
        "recompute_config: {recompute: [3, 2], select_recompute: {mul: [4, 4], silu: [0, 0], "
        "norm: True}, select_recompute_exclude: [[1, 0], [0, 0]]}\n",
        {"recompute_config.recompute": True, "recompute_config.select_recompute.mul": True,
         "recompute_config.select_recompute.silu": False,
         "recompute_config.select_recompute_exclude": True},
    ),
    "layers of the one stage": (
        "recompute_config: {recompute: [3], select_recompute: [norm, mul]}\n",
        {"recompute_config.recompute": [3], "recompute_config.select_recompute": ["norm", "mul"]},
    ),
    "layers of their stages": (
        "parallel_config: {pipeline_stage: 2}\nrecompute_config: {recompute: [3, 2]}\n",
        {"recompute_config.recompute": [3, 2]},
    ),
    "accumulation of a pipeline": (
        LEGACY + "parallel_config: {pipeline_stage: 2}\n"
        "runner_config: {gradient_accumulation_steps: 8}\n",
        {"runner_config.gradient_accumulation_steps": 1},
    ),
    "AdamW under another name": (
        "optimizer: {type: FP32StateAdamWeightDecay, beta1: 0.8, beta2: 0.9, swap: True}\n",
        {"optimizer.type": "AdamW", "optimizer.betas": [0.8, 0.9], "swap_config.optimizer": True},
    ),
    "one beta": ("optimizer: {beta2: 0.9}\n", {"optimizer.betas": [0.9, 0.9]}),
    "polynomial": ("lr_schedule: {type: polynomial, power: 2}\n",
                   {"lr_schedule.type": "PolynomialWithWarmUpLR", "lr_schedule.power": 2.0}),
    "a constant rate with an end": ("lr_schedule: {type: ConstantWarmUpLR, lr_end: 1.e-6}\n",
                                    {"lr_schedule.lr_end": None}),
    "a loss scale that never changes": (
        "runner_wrapper: {scale_sense: {type: DynamicLossScaleUpdateCell, loss_scale_value: "
        "65535, scale_factor: 1, scale_window: 1000}}\n",
        {"runner_wrapper.scale_sense": {"type": "FixedLossScaleUpdateCell",
                                        "loss_scale_value": 65535}},
    ),
    "float16 weights": (
        LEGACY + "run_mode: train\nmodel: {model_config: {type: Qwen3Config, "
        "params_dtype: float16}}\n",
        {"model.model_config.params_dtype": "float32"},
    ),
    "float16 weights that are not trained": (
        LEGACY + "run_mode: predict\nmodel: {model_config: {type: Qwen3Config, "
        "params_dtype: float16}}\n",
        {"model.model_config.params_dtype": "float16"},
    ),
    "what predict does not read": (
        "run_mode: predict\ntrain_dataset: {data_loader: {type: TFRecordDataset}}\n"
        "optimizer: {type: Lamb}\ncallbacks: [{type: TopkBiasBalanceCallback}]\n",
        {"train_dataset": None, "optimizer.type": "AdamW", "callbacks": []},
    ),
    "evaluation data that are not read": (
        "run_mode: train\ndo_eval: False\neval_dataset: {data_loader: {type: TFRecordDataset}}\n",
        {"eval_dataset": None},
    ),
    "a loader for evaluation that is known": (
        "run_mode: train\neval_dataset: {data_loader: {dataset_dir: x}}\n",
        {"eval_dataset.data_loader.dataset_dir": "x"},
    ),
    "the alias of a data set": (
        "run_mode: train\ntrain_dataset: &data {data_loader: {dataset_dir: x}}\n"
        "train_dataset_task: {dataset_config: *data}\n",
        {"train_dataset.data_loader.dataset_dir": "x", "train_dataset_task.dataset_config": None},
    ),
    "defaults of the eager style": (
        EAGER,
        {"run_mode": "train", "seed": 42, "runner_config.max_steps": 1000,
         "optimizer.betas": [0.9, 0.95], "optimizer.weight_decay": 0.01,
         "lr_schedule.type": "ConstantWarmUpLR", "lr_schedule.learning_rate": 1e-5,
         "parallel.enable_parallel_optimizer": True, "callbacks.0.prefix": "checkpoint",
         "callbacks.0.save_checkpoint_steps": 1000, "callbacks.0.keep_checkpoint_max": 5,
         "model.model_config.num_hidden_layers": 4},
    ),
    "accumulation": (
        "training: {local_batch_size: 2, global_batch_size: 24, max_norm: 0}\n"
        "parallelism: {data_parallel_shard: 3}\n",
        {"runner_config.batch_size": 2, "runner_config.gradient_accumulation_steps": 4,
         "parallel_config.data_parallel": 3, "runner_wrapper.use_clip_grad": False},
    ),
    "micro-batches": (
        "training: {local_batch_size: 4, global_batch_size: 16}\nparallelism: {pipeline_parallel: "
        "2, data_parallel_shard: 2, pipeline_parallel_microbatch_size: 2, "
        "pipeline_parallel_interleave_num: 2, pipeline_parallel_layers_per_stage: "
        "['0-1,5', '2-4,6-7'], context_parallel: 2, context_parallel_method: hybrid, "
        "ulysses_degree_in_cp: 2}\n",
        {"runner_config.batch_size": 2, "parallel_config.micro_batch_num": 4,
         "parallel.pipeline_config.pipeline_scheduler": "interleaved_1f1b",
         "model.model_config.pp_interleave_num": 2,
         "parallel.pipeline_config.stage_layers": [2, 3, 1, 2],
         "parallel_config.context_parallel_algo": "hybrid_cp",
         "parallel_config.ulysses_degree_in_cp": 2},
    ),
    "the first layers": (EAGER + "recompute: {mode: full, full_recompute_layer: ['0-1', '2']}\n",
                         {"recompute_config.recompute": [3]}),
    "all layers": (EAGER + "recompute: {mode: full, full_recompute_layer: ['0-7']}\n",
                   {"recompute_config.recompute": True}),
    "other layers": (EAGER + "recompute: {mode: full, full_recompute_layer: ['1-2']}\n",
                     {"recompute_config.recompute": True}),
    "modules": (EAGER + "recompute: {mode: select, select_module: {layers.*.mlp.*: ['0-9']}}\n",
                {"recompute_config.select_recompute": ["mlp"]}),
    "a profile": (EAGER + "profiler: {enable_profiling: True, start_step: 2, end_step: 4, "
                  "output_path: null, profiler_rank: 0, profiler_level: 2, profile_cpu: True}\n",
                  {"profile": True, "profile_start_step": 2, "profile_stop_step": 4,
                   "profile_output": None, "profile_rank_ids": [0], "profile_level": 2}),
    "a resumed run": (EAGER + "checkpoint: {load_path: a}\n",
                      {"load_checkpoint": "a", "resume_training": True}),
    "a run from weights": (EAGER + "checkpoint: {load_path: a, no_load_optim: True}\n",
                           {"load_checkpoint": "a", "resume_training": False}),
    "nothing saved": (EAGER + "checkpoint: {enable_save: False, prefix: null}\n",
                      {"callbacks": [], "final_checkpoint": False}),
    "weights alone": (EAGER + "checkpoint: {no_save_optim: True, save_path: a, prefix: null}\n",
                      {"callbacks.0.save_optimizer": False, "callbacks.0.directory": "a",
                       "callbacks.0.prefix": "checkpoint"}),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_keys_become_keys(name: str) -> None:
    text, expected = EQUAL[name]
    resolved = read(text)
    assert not resolved.problems, resolved.problems
    assert {key: value_of(resolved, key) for key in expected} == expected


REFUSED = {
    "a loader, once": (
        "run_mode: train\ntrain_dataset: &data {data_loader: {type: TFRecordDataset, "
        "schema: a.json, handler: [{type: take, n: 2}]}}\n"
        "train_dataset_task: {dataset_config: *data}\n",
        ["train_dataset.data_loader.type = 'TFRecordDataset': not built yet"],
    ),
    "evaluation data that are read": (
        "run_mode: train\ndo_eval: True\neval_dataset: {data_loader: {type: TFRecordDataset}}\n",
        ["eval_dataset.data_loader.type = 'TFRecordDataset': not built yet"],
    ),
    "a callback of training": (
        "run_mode: train\ncallbacks: [{type: TopkBiasBalanceCallback}]\n",
        ["callbacks.0.type = 'TopkBiasBalanceCallback': not built yet"],
    ),
    "a metric that is asked for": (
        "run_mode: eval\nmetric: {type: EmF1Metric}\n",
        ["metric.type = 'EmF1Metric': not built yet"],
    ),
    "strictness": (
        "training: {step: 2}\nparallelism: {tensor_paralel: 2}\n",
        ["training.step = 2: there is no such key in `training`. did you mean `steps`?",
         "parallelism.tensor_paralel = 2: there is no such key in `parallelism`. "
         "did you mean `tensor_parallel`?"],
    ),
    "sections that are none": (
        EAGER + "parallelism: 3\nlr_scheduler: x\nprofiler: [1]\n",
        ["parallelism = 3: must be a section", "lr_scheduler = 'x': must be a section",
         "profiler = [1]: must be a section"],
    ),
    "the style, which is no section": (
        "training: 3\nrecompute: {mode: full}\n", ["training = 3: must be a section"],
    ),
    "values of another type": (
        "training: {local_batch_size: x, deterministic: 3}\ncheckpoint: {no_save_optim: y}\n"
        "parallelism: {data_parallel_shard: [1], pipeline_parallel_interleave_num: 0}\n"
        "recompute: {mode: select, select_module: mlp}\n",
        ["training.local_batch_size = 'x': must be an integer of at least 1",
         "training.deterministic = 3: must be true or false",
         "checkpoint.no_save_optim = 'y': must be true or false",
         "parallelism.pipeline_parallel_interleave_num = 0: must be an integer of at least 1",
         "parallelism.data_parallel_shard = [1]: must be a number of ranks",
         "recompute.select_module = 'mlp': must be a section"],
    ),
    "keys as they are written": (
        "training: {steps: x, max_norm: y}\nmodel: {model_type: qwen3}\n"
        "checkpoint: {save_max: z}\n",
        ["training.steps = 'x': must be", "checkpoint.save_max = 'z': must be",
         "training.max_norm = 'y': must be"],
    ),
    "a problem that hides no key of the model": (
        "run_mode: eval\nmetric: {type: EmF1Metric}\nmoe_config: 3\nmodel: {model_config: "
        "{type: LlamaConfig, batch_size: 2, qkv_has_bias: True}, arch: {type: x}}\n",
        ["metric.type = 'EmF1Metric'", "moe_config = 3: must be a section"],
    ),
    "no rank for experts": (
        LEGACY + "parallel_config: {expert_parallel: 0}\n",
        ["parallel_config.expert_parallel = 0: must be at least 1"],
    ),
    "a switch that is none": (
        "optimizer: {swap: 3}\n", ["optimizer.swap = 3: must be true or false"],
    ),
    "rows that are repeated": (
        "train_dataset: {repeat: 3}\n",
        ["train_dataset.repeat = 3: not built yet. Multiply runner_config.epochs by it"],
    ),
    "a batch that does not divide": (
        "training: {local_batch_size: 2, global_batch_size: 5}\n",
        ["training.global_batch_size = 5: global_batch_size (5) must be a multiple of "
         "local_batch_size (2) x data-parallel ranks (1). Nearest: 4"],
    ),
    "a batch that grows": (
        "training: {rampup_batch_size: [1, 1, 8]}\n",
        ["training.rampup_batch_size = [1, 1, 8]: a batch that grows during the run: not built"],
    ),
    "ranges": (
        EAGER + "parallelism: {pipeline_parallel: 2, pipeline_parallel_layers_per_stage: ['3-1']}\n"
        "recompute: {mode: full, full_recompute_layer: ['a']}\n",
        ["training = {}: global_batch_size", "parallelism.pipeline_parallel_layers_per_stage",
         "recompute.full_recompute_layer = ['a']: must be a list of layers"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_asks_for_more_is_refused(name: str) -> None:
    text, expected = REFUSED[name]
    found = [str(problem) for problem in read(text).problems]
    if name == "ranges":
        expected = expected[1:]
    assert len(found) == len(expected), found
    for line, part in zip(found, expected, strict=True):
        assert part in line


@pytest.mark.parametrize("neutral", ["False", "0", "null", '"None"', '""', "[]", "{}"])
def test_a_neutral_value_asks_for_nothing(neutral: str) -> None:
    text = f"push_to_hub: {neutral}\ngrouped_lr_schedule: {{grouped: {neutral}}}\n"
    resolved = read(text + f"generation_config: {{token_healing: {neutral}}}\n")
    assert not resolved.problems
    assert not resolved.config.generation_config.token_healing


def test_false_is_not_neutral_where_true_is() -> None:
    assert read("calculate_per_token_loss: False\n").problems
    assert not read("calculate_per_token_loss: null\n").problems


@pytest.mark.parametrize(("world", "ranks"), [("8", 4), ("2", 1)])
def test_automatic_data_parallel(world: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPWAY_WORLD_SIZE", world)
    resolved = read("parallel_config: {data_parallel: auto, model_parallel: 2}\n")
    assert (resolved.problems, resolved.config.parallel_config.data_parallel) == ((), ranks)
    eager = read("training: {global_batch_size: 8}\nparallelism: {tensor_parallel: 2}\n")
    assert eager.config.parallel_config.data_parallel == ranks
    assert eager.config.runner_config.gradient_accumulation_steps == 8 // ranks


def test_the_command_line_wins_in_the_eager_style(tmp_path: Path) -> None:
    from launcher.config.resolve import resolve

    (tmp_path / "x.yaml").write_text(EAGER.replace("{}", "{steps: 9}", 1))
    flags = {"training.steps": 2, "seed": 5}
    words = ["optimizer.weight_decay=0.5", "parallelism.sequence_parallel=true"]
    config = resolve(str(tmp_path / "x.yaml"), flags=flags, overrides=words).config
    assert (config.runner_config.max_steps, config.seed) == (2, 5)
    assert config.optimizer.weight_decay == 0.5
    assert config.parallel_config.use_seq_parallel


def test_a_migrated_file_tells_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "use_legacy: True\nrun_mode: finetune\nload_checkpoint: ''\npretrained_model_dir: /x/y\n"
    text += "generation: {top_k: 3}\nlr_schedule: {type: polynomial, learning_rate: 1.e-3}\n"
    Path("x.yaml").write_text(text)
    assert cli.main(["--config", "x.yaml", "--migrate", "--runner_config.epochs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        "run_mode: finetune  # kept",
        "pretrained_model_dir: /x/y  # needs you: no such directory",
        'load_checkpoint: ""  # needs you: finetune requires weights',
        "  top_k: 3  # renamed: generation.top_k",
        "  epochs: 2  # kept: command line: --runner_config.epochs",
        "  type: PolynomialWithWarmUpLR  # replaced: it was polynomial",
        "# use_legacy: true  # no effect here: old and new configurations are read in the same way",
    ):
        assert line in lines, lines
    Path("x.yaml").write_text(text + "epoks: 2\n")
    assert cli.main(["--config", "x.yaml", "--migrate"]) == 2
    found = capsys.readouterr()
    assert "unknown key `epoks`" in found.err
    assert "run_mode: finetune  # kept" in found.out.splitlines()
    assert cli.main(["--help"]) == 0
    assert "--migrate" in capsys.readouterr().out


def test_a_migrated_model_has_the_spelling_of_config_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(
        "training: {steps: 2, rampup_batch_size: [1, 1, 8]}\nmodel: {model_type: deepseek_v3, "
        "num_layers: 2, theta: 100.0, param_init_type: float32, mscale_all_dim: 1, "
        "rotary_scaling_factor: 2, position_embedding_type: yarn, "
        "moe_router_enable_expert_bias: True, moe_router_bias_update_rate: 0.5}\n"
    )
    assert cli.main(["--config", "x.yaml", "--migrate"]) == 2
    text = capsys.readouterr().out
    for part in (
        "    num_hidden_layers: 2  # renamed: model.num_layers",
        "    rope_theta: 100.0  # renamed: model.theta",
        "    params_dtype: float32  # renamed: model.param_init_type",
        "    moe_router_bias_update_rate: 0.5  # needs you: moving the router's biases",
        "    moe_router_enable_expert_bias: true  # renamed: model.moe_router_enable_expert_bias",
        "rope_type: yarn  # replaced: model.",
        "# training.rampup_batch_size:  # needs you: a batch that grows during the run",
    ):
        assert part in text, text
    Path("y.yaml").write_text(text)
    assert cli.main(["--config", "y.yaml", "--migrate"]) == 2
    assert "moving the router's biases" in capsys.readouterr().err


def test_keys_without_a_field_survive_printing() -> None:
    text = (
        "runner_wrapper: {type: null}\nparallel: {search_mode: null, strategy_ckpt_config: "
        "{only_trainable_params: 'True', save_file: x}}\nmetric: {type: PerplexityMetric}\n"
        "checkpoint: {}\nmoe_config:\n"
    )
    first = read(text)
    printed = to_yaml(first.config, first.provenance)
    again = read(printed)
    assert not first.problems
    assert not again.problems, printed
    content = yaml.safe_load(printed)
    assert content["parallel"]["strategy_ckpt_config"]["only_trainable_params"] is True
    assert content["runner_wrapper"]["type"] is None
    assert content["metric"] == {"type": "PerplexityMetric"}
    assert "checkpoint" not in content
    assert "moe_config" not in content
    assert to_yaml(again.config, again.provenance).count("\n") == printed.count("\n")
