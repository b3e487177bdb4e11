"""Wrong configurations and command lines: exit code 2, every mistake told, nothing heavy loaded.

Each row breaks the right configuration of workspace.py in one way (or several): the edit, the words
of the command line, and what the user must be told. `line` is the number of the line in the YAML.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.config.interpreter import REPOSITORY, Report, run_many
from tests.config.workspace import RIGHT, build

TRAIN = ("--run_mode", "train")


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """One row of the table."""

    name: str
    replace: dict[str, str] = field(default_factory=dict)
    """Text in right.yaml and what stands there instead."""
    add: str = ""
    """Lines put at the end of the file."""
    argv: tuple[str, ...] = TRAIN
    env: dict[str, str] = field(default_factory=dict)
    says: tuple[str, ...]
    """Texts of the messages; `@text` means: at the file and line where `text` stands."""
    count: int = 1
    """Number of errors."""

    @property
    def yaml(self) -> str:
        """The wrong file."""
        text = RIGHT
        for old, new in self.replace.items():
            assert old in text, (self.name, old)
            text = text.replace(old, new, 1)
        return text + self.add

    def expected(self, name: str) -> list[str]:
        """The messages with `@text ` filled in."""
        found = []
        for message in self.says:
            if message.startswith("@"):
                marker, _, rest = message[1:].partition("@ ")
                lines = self.yaml.splitlines()
                at = next(i for i, line in enumerate(lines, 1) if marker in line)
                message = f"error: {name}:{at}: {rest}"
            found.append(message)
        return found


TABLE = (
    # --- names ------------------------------------------------------------------------------
    Wrong(
        name="typo in a section's key",
        replace={"weight_decay": "weigth_decay"},
        says=("@weigth@ unknown key `optimizer.weigth_decay`",
              "did you mean `optimizer.weight_decay`?"),
    ),
    Wrong(
        name="typo in a section",
        replace={"optimizer:": "optimzer:"},
        says=("@optimzer@ unknown key `optimzer`", "did you mean `optimizer`?"),
    ),
    Wrong(
        name="typo at the top level",
        add="resume_trainning: True\n",
        says=("@resume_trainning@ unknown key `resume_trainning`",
              "did you mean `resume_training`?"),
    ),
    Wrong(
        name="a misspelt section does not count as missing",
        replace={"train_dataset: &train": "train_datset: &train"},
        says=("@train_datset@ unknown key `train_datset`", "did you mean `train_dataset`?"),
    ),
    Wrong(
        name="right key, wrong section",
        replace={"weight_decay": "warmup_ratio"},
        says=("did you mean `lr_schedule.warmup_ratio`?",),
    ),
    Wrong(
        name="a section's key at the top level",
        add="epochs: 3\n",
        says=("@epochs: 3@ unknown key `epochs`", "did you mean `runner_config.epochs`?"),
    ),
    Wrong(
        name="another launcher's word",
        replace={"weight_decay": "lr"},
        says=("did you mean `optimizer.learning_rate`?",),
    ),
    Wrong(
        name="typo in the runner",
        replace={"batch_size": "batchsize"},
        says=("did you mean `runner_config.batch_size`?",),
    ),
    Wrong(
        name="typo in the data set",
        replace={"seq_length": "seq_lenght"},
        says=("@seq_lenght@ unknown key `train_dataset.seq_lenght`",
              "did you mean `train_dataset.seq_length`?"),
    ),
    Wrong(
        name="typo in the data loader, and the missing source is not told twice",
        replace={"dataset_dir": "dataset_dirs"},
        says=("did you mean `train_dataset.data_loader.dataset_dir`?",),
    ),
    Wrong(
        name="typo in a callback",
        replace={"save_checkpoint_steps": "save_checkpoint_step"},
        says=("@save_checkpoint_step@ unknown key `callbacks.1.save_checkpoint_step`",
              "did you mean `callbacks.1.save_checkpoint_steps`?"),
    ),
    Wrong(
        name="typo in a callback's type",
        replace={"CheckpointMonitor": "CheckpointMoniter"},
        says=("@CheckpointMoniter@ callbacks.1.type = 'CheckpointMoniter'",
              "did you mean `CheckpointMonitor`?", "register_path"),
    ),
    Wrong(
        name="a callback without a type",
        add="  - prefix: other\n",
        says=("@prefix: other@ callbacks.2 has no `type`", "Known: MFLossMonitor"),
    ),
    Wrong(
        name="typo in model_config",
        replace={"intermediate_size": "intermedate_size"},
        says=("@intermedate_size@ model.model_config.intermedate_size",
              "did you mean `intermediate_size`?"),
    ),
    Wrong(
        name="typo in parallel_config",
        add="parallel_config: {model_paralel: 2}\n",
        says=("did you mean `parallel_config.model_parallel`?",),
    ),
    Wrong(
        name="typo in parallel",
        add="parallel: {enable_parallel_optimiser: True}\n",
        says=("did you mean `parallel.enable_parallel_optimizer`?",),
    ),
    Wrong(
        name="typo in the tokenizer",
        replace={"    pretrained_model_dir": "    pretrained_model_dirs"},
        says=("did you mean `processor.tokenizer.pretrained_model_dir`?",),
    ),
    Wrong(
        name="typo in generation",
        add="generation: {temprature: 0.5}\n",
        says=("unknown key `generation_config.temprature`",
              "did you mean `generation_config.temperature`?"),
    ),
    Wrong(
        name="typo in runner_wrapper, recompute, swap, moe, monitor and tensorboard at once",
        add="runner_wrapper: {max_grad_nrm: 1}\nrecompute_config: {recompte: True}\n"
            "swap_config: {swp: True}\nmoe_config: {expert_nun: 8}\n"
            "monitor_config: {monitr_on: True}\ntensorboard: {tensorboard_dirs: x}\n",
        says=("did you mean `runner_wrapper.max_grad_norm`?",
              "did you mean `recompute_config.recompute`?", "did you mean `swap_config.swap`?",
              "did you mean `moe_config.expert_num`?", "did you mean `monitor_config.monitor_on`?",
              "did you mean `tensorboard.tensorboard_dir`?", "6 errors. Nothing was started."),
        count=6,
    ),
    Wrong(
        name="nothing is near",
        add="qqq: 1\n",
        says=("unknown key `qqq`", "docs/configuration.md lists all keys"),
    ),
    # --- words that must be one of several ----------------------------------------------------
    Wrong(
        name="unknown schedule",
        replace={"CosineWithWarmUpLR": "CosineWarmUpLR"},
        says=("@CosineWarmUpLR@ lr_schedule.type = 'CosineWarmUpLR'",
              "did you mean `CosineWithWarmUpLR`?"),
    ),
    Wrong(
        name="unknown optimizer",
        replace={"type: AdamW": "type: adamw"},
        says=("optimizer.type = 'adamw'", "did you mean `AdamW`?"),
    ),
    Wrong(
        name="unknown trainer",
        replace={"CausalLanguageModelingTrainer": "CausalLanguageModellingTrainer"},
        says=("did you mean `CausalLanguageModelingTrainer`?",),
    ),
    Wrong(
        name="unknown loader",
        replace={"TextDataLoader": "TextLoader"},
        says=("train_dataset.data_loader.type = 'TextLoader'", "did you mean `TextDataLoader`?"),
    ),
    Wrong(
        name="unknown run mode",
        argv=("--run_mode", "trian"),
        says=("error: command line: --run_mode: run_mode = 'trian'", "did you mean `train`?"),
    ),
    Wrong(name="unknown tracker", add="trackers: [wandbb]\n", says=("did you mean `wandb`?",)),
    # --- types --------------------------------------------------------------------------------
    Wrong(
        name="text for a number",
        replace={"epochs: 2": "epochs: two"},
        says=("@epochs: two@ runner_config.epochs = 'two': a whole number is needed",),
    ),
    Wrong(
        name="several wrong types at once",
        replace={"seed: 7": "seed: 7.5", "learning_rate: 1e-3": "learning_rate: fast",
                 "sink_mode: False": "sink_mode: maybe", "betas: [0.9, 0.95]": "betas: 0.9"},
        says=("@seed: 7.5@ seed = 7.5: a whole number is needed",
              "@fast@ lr_schedule.learning_rate = 'fast': a number or null is needed",
              "@maybe@ runner_config.sink_mode = 'maybe': true or false is needed",
              "@betas@ optimizer.betas = 0.9: a list of numbers is needed"),
        count=4,
    ),
    Wrong(
        name="null where a value is needed",
        replace={"batch_size: 4": "batch_size:"},
        says=("@batch_size@ runner_config.batch_size = null: a whole number is needed. "
              "Leave the key out for the default (1).",),
    ),
    Wrong(
        name="a value where a section is needed",
        replace={"trainer:\n  type: CausalLanguageModelingTrainer": "trainer: Causal"},
        says=("@trainer@ trainer = 'Causal': a section (key: value) is needed",),
    ),
    Wrong(
        name="callbacks as a section",
        add="callbacks2: 0\n",
        replace={"callbacks:\n  - type: MFLossMonitor\n  - type": "callbacks:\n    type"},
        says=("@callbacks:@ callbacks = ", "a list of callbacks is needed",
              "Write each callback as `- type: ...`"),
        count=2,
    ),
    Wrong(
        name="an interpolation",
        add="save_file: ${output_dir}/x\n",
        says=("save_file = '${output_dir}/x'", "YAML anchors"),
    ),
    # --- numbers out of bounds ------------------------------------------------------------------
    Wrong(
        name="negative, zero and endless numbers",
        replace={"batch_size: 4": "batch_size: 0", "weight_decay: 0.1": "weight_decay: -1",
                 "learning_rate: 1e-3": "learning_rate: .nan", "warmup_ratio: 0.1":
                 "warmup_ratio: 1.5", "[0.9, 0.95]": "[0.9, 1.0]"},
        says=("@batch_size@ runner_config.batch_size = 0: it must be at least 1",
              "@weight_decay@ optimizer.weight_decay = -1.0: it must be at least 0",
              "@.nan@ lr_schedule.learning_rate = nan: a finite number is needed",
              "@1.5@ lr_schedule.warmup_ratio = 1.5: it must be at most 1",
              "@[0.9, 1.0]@ optimizer.betas = [0.9, 1.0]: two numbers, each at least 0"),
        count=5,
    ),
    # --- impossible combinations ----------------------------------------------------------------
    Wrong(
        name="more ranks than processes",
        add="parallel_config: {data_parallel: 4}\n",
        says=("@data_parallel@ the degrees ask for data_parallel 4 = 4 processes, this job has 1",
              "Nearest: data_parallel 1", "`torchrun --nproc_per_node 4 run.py ...`"),
    ),
    Wrong(
        name="more processes than ranks",
        env={"WORLD_SIZE": "2"},
        says=("the degrees ask for data_parallel 1 = 1 process, this job has 2",
              "Nearest: data_parallel 2"),
    ),
    Wrong(
        name="one process asserted, two running",
        env={"WORLD_SIZE": "2"},
        add="use_parallel: False\nparallel_config: {data_parallel: 2}\n",
        says=("@use_parallel@ use_parallel = False: this job has 2 processes",),
    ),
    Wrong(
        name="the sequence pipeline",
        add="parallel_config: {seq_split_num: 2}\n"
            "parallel: {pipeline_config: {pipeline_scheduler: seqpipe}}\n",
        says=("@seq_split@ parallel_config.seq_split_num = 2: not built yet. Set it to 1.",
              "@seqpipe@ parallel.pipeline_config.pipeline_scheduler = 'seqpipe': not built yet. "
              "Use 1f1b, gpipe, zero_bubble_v, interleaved_1f1b, interleaved_zero_bubble."),
        count=2,
    ),
    Wrong(
        name="an unknown way to share a sequence, an unknown compiler, an unknown schedule",
        add="parallel_config: {context_parallel_algo: ulyses}\ncompile: inductr\n"
            "parallel: {pipeline_config: {pipeline_scheduler: zero_bubble}}\n",
        says=("parallel_config.context_parallel_algo = 'ulyses'", "did you mean `ulysses`?",
              "@compile@ compile = 'inductr': allowed: True, False, inductor, aot_eager, eager. "
              "did you mean `inductor`?", "did you mean `zero_bubble_v`?"),
        count=3,
    ),
    Wrong(
        name="two places for one number",
        add="micro_batch_interleave_num: 2\nparallel_config: {micro_batch_interleave_num: 3}\n",
        says=("@num: 3@ `parallel_config.micro_batch_interleave_num` = 3, but "
              "`micro_batch_interleave_num` = 2: both are the same key (the other is at "
              "wrong.yaml:45). Remove `parallel_config.micro_batch_interleave_num`.",),
    ),
    Wrong(
        name="a shard size that does not divide",
        env={"WORLD_SIZE": "4"},
        add="parallel_config: {data_parallel: 4}\nparallel:\n  enable_parallel_optimizer: True\n"
            "  parallel_optimizer_config: {optimizer_weight_shard_size: 3}\n",
        says=("@_shard_size@ parallel.parallel_optimizer_config.optimizer_weight_shard_size = 3: "
              "it must divide data_parallel (4)", "Nearest: 2"),
    ),
    Wrong(
        name="checkpoints inside a sink",
        replace={"sink_mode: False": "sink_size: 4"},
        says=("@save_checkpoint_steps@ callbacks.1.save_checkpoint_steps = 10: with sink_size 4 "
              "it must be a multiple of 4. Nearest: 8 or 12.",),
    ),
    Wrong(
        name="a sink of no size",
        replace={"sink_mode: False": "sink_size: 0"},
        says=("@sink_size@ runner_config.sink_size = 0", "-1 for the whole epoch"),
    ),
    Wrong(
        name="words where CheckpointMonitor counts",
        replace={"save_checkpoint_steps: 10": "save_checkpoint_steps: ten"},
        add="    keep_checkpoint_max: many\n",
        says=("@steps: ten@ callbacks.1.save_checkpoint_steps = 'ten': a whole number",
              "@many@ callbacks.1.keep_checkpoint_max = 'many': a whole number or null is"),
        count=2,
    ),
    Wrong(
        name="a prefix that breaks names",
        replace={"prefix: demo": "prefix: my/rank"},
        says=("@prefix@ callbacks.1.prefix = 'my/rank': a prefix holds no \"/\"",),
    ),
    Wrong(
        name="a prefix with rank",
        replace={"prefix: demo": "prefix: demo_rank"},
        says=('a prefix holds no "rank". Nearest: demo.',),
    ),
    Wrong(
        name="an argument of another schedule",
        replace={"warmup_ratio: 0.1": "power: 2"},
        says=("@power@ lr_schedule.power = 2.0: CosineWithWarmUpLR does not take it",
              "It belongs to PolynomialWithWarmUpLR"),
    ),
    Wrong(
        name="a polynomial that rises",
        replace={"CosineWithWarmUpLR": "PolynomialWithWarmUpLR", "warmup_ratio: 0.1": "lr_end: 1"},
        says=("@lr_end@ lr_schedule.lr_end = 1: a polynomial ends below its learning rate",),
    ),
    Wrong(
        name="two lengths of a row",
        replace={"head_dim: 8": "head_dim: 8\n    seq_length: 32"},
        says=("@  seq_length: 64@ train_dataset.seq_length = 64: model.model_config.seq_length = "
              "32 (wrong.yaml:18) says otherwise",),
    ),
    Wrong(
        name="rows longer than the model",
        replace={"seq_length: 64": "seq_length: 256"},
        says=("@seq_length@ train_dataset.seq_length = 256: the model has 128 positions",
              "Nearest: 128"),
    ),
    Wrong(
        name="heads that do not divide",
        replace={"n_kv_heads: 2": "n_kv_heads: 3"},
        says=("@n_kv_heads@ model.model_config.n_kv_heads = 3", "4"),
    ),
    Wrong(
        name="weights in fp16",
        replace={"head_dim: 8": "head_dim: 8\n    param_init_type: float16"},
        says=("@float16@ model.model_config.param_init_type = 'float16': weights that are trained "
              "are kept in float32 or bfloat16", "Nearest: float32",
              "compute_dtype: float16 computes in float16 all the same"),
    ),
    Wrong(
        name="a loss scale that is no number",
        add="runner_wrapper:\n  scale_sense: much\n",
        says=("@scale_sense@ runner_wrapper.scale_sense = 'much'", "a number or a section"),
    ),
    Wrong(
        name="a loss scale of nothing",
        add="runner_wrapper:\n  scale_sense: 0\n",
        says=("@scale_sense@ runner_wrapper.scale_sense = 0.0: a loss scale is a number above 0",
              "Nearest: 1.0"),
    ),
    Wrong(
        name="a loss scale without a type",
        add="runner_wrapper:\n  scale_sense:\n    loss_scale_value: 8\n",
        says=("@scale_sense@ runner_wrapper.scale_sense = {'loss_scale_value': 8}: the type "
              "of a loss scale is DynamicLossScaleUpdateCell or FixedLossScaleUpdateCell",
              "can also be written as a number"),
    ),
    Wrong(
        name="a loss scale of an unknown type",
        add="runner_wrapper:\n  scale_sense:\n    type: DynamicLossScaleCell\n",
        says=("@LossScaleCell@ runner_wrapper.scale_sense.type = 'DynamicLossScaleCell'",
              "did you mean `DynamicLossScaleUpdateCell`?"),
    ),
    Wrong(
        name="a fixed loss scale that moves",
        add="runner_wrapper:\n  scale_sense:\n    type: FixedLossScaleUpdateCell\n"
            "    scale_window: 8\n",
        says=("@scale_window@ runner_wrapper.scale_sense.scale_window = 8: "
              "FixedLossScaleUpdateCell does not take it",
              "runner_wrapper.scale_sense.loss_scale_value is missing"),
        count=2,
    ),
    Wrong(
        name="a dynamic loss scale with wrong numbers",
        add="runner_wrapper:\n  scale_sense:\n    type: DynamicLossScaleUpdateCell\n"
            "    loss_scale_value: 0.5\n    scale_factor: 1\n    scale_window: 2.5\n",
        says=("@loss_scale_value@ runner_wrapper.scale_sense.loss_scale_value = 0.5: a loss scale "
              "is a number above 0, at most 2**64; a dynamic one is at least 1",
              "@scale_factor@ runner_wrapper.scale_sense.scale_factor = 1: a dynamic scale moves "
              "by a factor above 1. Nearest: 2",
              "@scale_window@ runner_wrapper.scale_sense.scale_window = 2.5: it is a whole number "
              "of steps"),
        count=3,
    ),
    Wrong(
        name="an embedding smaller than the tokenizer",
        replace={"pretrained_model_dir: tokenizer": "pretrained_model_dir: large_tokenizer"},
        says=("@vocab_size@ model.model_config.vocab_size = 64: the tokenizer in large_tokenizer "
              "has 80 tokens. Nearest: 80.",),
    ),
    Wrong(
        name="a loader's argument for another loader",
        replace={"dataset_dir: corpus": "dataset_dir: corpus\n    format: alpaca"},
        says=("@alpaca@ train_dataset.data_loader.format = 'alpaca': TextDataLoader does not take "
              "it. It belongs to InstructionDataLoader.",),
    ),
    Wrong(
        name="evaluation without data",
        add="do_eval: True\n",
        says=("@do_eval@ do_eval = True: evaluation needs eval_dataset",),
    ),
    Wrong(
        name="features not built yet",
        add="profile: True\nlayer_scale: True\nmoe_config: {expert_num: 8}\n"
            "monitor_config: {monitor_on: True}\ncheckpoint: {save_path: x}\n",
        says=("@profile@ profile = True: not built yet. Set it to False.",
              "@expert_num@ moe_config.expert_num = 8: not built yet. Describe the experts in "
              "model.model_config",
              "@save_path@ checkpoint.save_path = 'x': not built yet. Use load_checkpoint"),
        count=5,
    ),
    Wrong(
        name="kinds of data not built yet",
        replace={"TextDataLoader": "MindDataset"},
        says=("train_dataset.data_loader.type = 'MindDataset': not built yet. Use TextDataLoader",),
    ),
    Wrong(
        name="CheckpointMonitor's options not built yet",
        add="    checkpoint_format: ckpt\n    enc_key: secret\n",
        says=("@format: ckpt@ callbacks.1.checkpoint_format = 'ckpt': not built yet. "
              "Use safetensors.",
              "@enc_key@ callbacks.1.enc_key = 'secret': not built yet"),
        count=2,
    ),
    Wrong(
        name="CheckpointMonitor's choices",
        add="    async_save: threads\n    on_save_error: contine\n",
        says=("@async_save@ callbacks.1.async_save = 'threads'", "did you mean `thread`?",
              "@on_save_error@ callbacks.1.on_save_error = 'contine'", "did you mean `continue`?"),
        count=2,
    ),
    Wrong(
        name="code allowed by a file",
        add="trust_remote_code: True\n",
        says=("@trust_remote_code@ trust_remote_code = True", "--trust_remote_code true"),
    ),
    Wrong(
        name="resume and not resume",
        argv=("--run_mode", "resume", "--resume_training", "false"),
        says=("resume is train with resume_training: True",),
    ),
    Wrong(
        name="two names of one key that disagree",
        add="generation: {top_k: 5}\ngeneration_config: {top_k: 6}\n",
        says=("@generation:@ `generation.top_k` = 5, but `generation_config.top_k` = 6",),
    ),
    Wrong(
        name="more samples than room",
        argv=("--run_mode", "predict", "--predict_data", "hello"),
        add="generation: {min_length: 30, max_length: 20, top_p: 1.5, num_beams: 4}\n",
        says=("generation_config.min_length = 30: it must be at most max_length (20)",
              "generation_config.top_p = 1.5: it must be at most 1",
              "generation_config.num_beams = 4: not built yet"),
        count=3,
    ),
    # --- what a mode needs, and paths -------------------------------------------------------------
    Wrong(
        name="no mode",
        argv=(),
        says=("run_mode is missing", "Write `--run_mode train`"),
    ),
    Wrong(
        name="finetune without weights",
        argv=("--run_mode", "finetune"),
        says=("there are no weights to start from: finetune starts from weights",),
    ),
    Wrong(
        name="finetune from a folder without weights",
        argv=("--run_mode", "finetune", "--pretrained_model_dir", "no_weights"),
        says=("no_weights holds no *.safetensors",),
    ),
    Wrong(
        name="predict without prompts",
        argv=("--run_mode", "predict"),
        says=("input_data is missing: predict needs it. Write `--predict_data 'a prompt'`.",),
    ),
    Wrong(
        name="eval without data",
        argv=("--run_mode", "eval"),
        says=("eval_dataset is missing: eval needs it",),
    ),
    Wrong(
        name="a path that is not there, with its neighbour",
        replace={"dataset_dir: corpus": "dataset_dir: corpsu"},
        says=("@corpsu@ train_dataset.data_loader.dataset_dir = 'corpsu': there is no such path. "
              "did you mean `corpus`?",),
    ),
    Wrong(
        name="a glob that matches nothing",
        replace={"dataset_dir: corpus": "dataset_dir: corpus/*.md"},
        says=("@corpus@ train_dataset.data_loader.dataset_dir = 'corpus/*.md': no file matches",),
    ),
    Wrong(
        name="many missing paths at once",
        add="load_checkpoint: nowhere\nregister_path: no.py\npretrained_model_dir: qwem\n",
        replace={"pretrained_model_dir: tokenizer": "pretrained_model_dir: tokeniser"},
        says=("@nowhere@ load_checkpoint = 'nowhere': there is no such path",
              "@no.py@ register_path = 'no.py': there is no such path",
              "@qwem@ pretrained_model_dir = 'qwem': there is no such folder. did you mean `qwen`?",
              "@tokeniser@ processor.tokenizer.pretrained_model_dir = 'tokeniser': there is no "
              "such folder. did you mean `tokenizer`?"),
        count=4,
    ),
    Wrong(
        name="no tokenizer",
        replace={"    pretrained_model_dir: tokenizer": "    type: LlamaTokenizer"},
        says=("there is no tokenizer: text becomes tokens by a tokenizer",),
    ),
    Wrong(
        name="a tokenizer folder without one",
        replace={"pretrained_model_dir: tokenizer": "pretrained_model_dir: corpus"},
        says=("tokenizer.pretrained_model_dir = 'corpus': the folder holds no tokenizer",),
    ),
    Wrong(
        name="a broken config.json",
        add="pretrained_model_dir: broken\n",
        says=("error: broken/config.json:2: this is not valid JSON",),
    ),
    Wrong(
        name="a model nobody describes",
        replace={"    type: Qwen3Config\n": ""},
        says=("@model_config@ model.model_config has no `type`", "Qwen3Config"),
    ),
    Wrong(
        name="slicing of nothing",
        add="auto_trans_ckpt: True\n",
        says=("@auto_trans@ auto_trans_ckpt = True: there are no weights to cut",),
    ),
    Wrong(
        name="a folder without weights",
        add="load_checkpoint: corpus\n",
        says=("@load_checkpoint@ load_checkpoint = 'corpus': it holds no weights",),
    ),
    # --- YAML -----------------------------------------------------------------------------------
    Wrong(
        name="a tab",
        replace={"  epochs: 2": "\tepochs: 2"},
        says=("@epochs@ this is not valid YAML", "Replace the tab by spaces"),
    ),
    Wrong(
        name="a key twice",
        replace={"  epochs: 2": "  epochs: 2\n  epochs: 3"},
        says=("@epochs: 3@ `epochs` is written twice in one section",
              "the other is at wrong.yaml:29"),
    ),
    Wrong(
        name="an unknown anchor",
        replace={"*train": "*trian"},
        says=("@*trian@ this is not valid YAML: found undefined alias",),
    ),
    Wrong(
        name="code in YAML",
        add="save_file: !!python/object/apply:os.getcwd []\n",
        says=("@save_file@ the tag `!!python/object/apply:os.getcwd` is not allowed",),
    ),
    Wrong(
        name="a missing base_config",
        add="base_config: nowhere.yaml\n",
        says=("@base_config@ base_config = 'nowhere.yaml': there is no file nowhere.yaml",),
    ),
    Wrong(
        name="a base_config that is its own base",
        add="base_config: wrong.yaml\n",
        says=("@base_config@ base_config = 'wrong.yaml' leads back to this file",),
    ),
    # --- command line ----------------------------------------------------------------------------
    Wrong(
        name="a misspelt flag",
        argv=(*TRAIN, "--epohcs", "3"),
        says=("unknown flag `--epohcs`", "did you mean `--epochs`?"),
    ),
    Wrong(
        name="a flag of another launcher",
        argv=(*TRAIN, "--num_train_epochs", "3"),
        says=("unknown flag `--num_train_epochs`", "did you mean `--runner_config.epochs`?"),
    ),
    Wrong(
        name="a misspelt dotted key",
        argv=(*TRAIN, "--optimizer.weight_deacy", "0.1"),
        says=("error: command line: --optimizer.weight_deacy: unknown key "
              "`optimizer.weight_deacy`", "did you mean `optimizer.weight_decay`?"),
    ),
    Wrong(
        name="a misspelt override",
        argv=(*TRAIN, "runner_config.epoch=3"),
        says=("error: command line: runner_config.epoch=3: unknown key `runner_config.epoch`",
              "did you mean `runner_config.epochs`?"),
    ),
    Wrong(
        name="a wrong boolean",
        argv=(*TRAIN, "--use_parallel", "1"),
        says=("`--use_parallel` = '1': true or false is needed",),
    ),
    Wrong(
        name="a wrong number",
        argv=(*TRAIN, "--epochs", "many", "--batch_size=-1"),
        says=("command line: --epochs: runner_config.epochs = 'many': a whole number is needed",
              "command line: --batch_size: runner_config.batch_size = -1: it must be at least 1"),
        count=2,
    ),
    Wrong(
        name="a flag without a value",
        argv=(*TRAIN, "--seed"),
        says=("`--seed` has no value: `--seed` takes a whole number",),
    ),
    Wrong(
        name="a stray word",
        argv=(*TRAIN, "other.yaml"),
        says=("`other.yaml` stands alone", "Write `--config other.yaml`"),
    ),
    Wrong(
        name="an entry that a list does not have",
        argv=(*TRAIN, "callbacks.5.prefix=x"),
        says=("`5` is no entry of this list: its entries are 0 to 1",),
    ),
    Wrong(
        name="plus in a closed section",
        argv=(*TRAIN, "+optimizer.lr=0.1", "+runner_config.epochs=3"),
        says=("`optimizer.lr`: there is no such key, and its section is not an open one",
              "did you mean `optimizer.learning_rate`?",
              "`runner_config.epochs` is a key of the schema", "Write `runner_config.epochs=...`"),
        count=2,
    ),
    Wrong(
        name="removing what is not there",
        argv=(*TRAIN, "~optimizer.eps"),
        says=("nothing is written there, so nothing can be removed",),
    ),
    Wrong(
        name="a sweep",
        argv=(*TRAIN, "seed=1,2"),
        says=("`seed=1,2` cannot be read", "no sweep"),
    ),
    Wrong(
        name="grammar that nobody understands",
        argv=(*TRAIN, "output_dir=a(b"),
        says=("`output_dir=a(b` cannot be read", "Write `--output_dir 'a(b'`"),
    ),
    Wrong(
        name="a file that is not there",
        argv=("--config", "wrnog.yaml", *TRAIN),
        says=("there is no file wrnog.yaml", "did you mean `wrong.yaml`?"),
    ),
    Wrong(
        name="a folder for a file",
        argv=("--config", "corpus", *TRAIN),
        says=("corpus is a directory: --config names one YAML file",),
    ),
    Wrong(
        name="everything at once, from every layer",
        replace={"weight_decay": "weigth_decay", "epochs: 2": "epochs: two",
                 "dataset_dir: corpus": "dataset_dir: corpsu"},
        argv=(*TRAIN, "--sed", "3", "lr_schedule.typ=x"),
        add="parallel_config: {data_parallel: 3}\n",
        says=("weigth_decay", "'two'", "corpsu", "unknown flag `--sed`", "`lr_schedule.typ`",
              "torchrun --nproc_per_node 3", "6 errors. Nothing was started."),
        count=6,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Every row of the table run, in one interpreter."""
    cases: list[dict[str, Any]] = []
    for index, row in enumerate(TABLE):
        folder = build(tmp_path_factory.mktemp(f"case{index}"))
        (folder / "wrong.yaml").write_text(row.yaml)
        given = [] if "--config" in row.argv else ["--config", "wrong.yaml"]
        cases.append({"argv": [*given, *row.argv], "cwd": str(folder), "env": row.env})
    return dict(zip([row.name for row in TABLE], run_many(cases), strict=True))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_mistake_is_told(row: Wrong, reports: dict[str, Report]) -> None:
    report = reports[row.name]
    for message in row.expected("wrong.yaml"):
        assert message in report.err, report.err
    assert report.err.count("error: ") == row.count, report.err
    assert report.code == 2
    assert "Traceback" not in report.err + report.out
    assert not report.torch_imported
    assert report.out == ""


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 30
    assert len({row.name for row in TABLE}) == len(TABLE)


def test_the_right_configuration_is_right(tmp_path: Path) -> None:
    build(tmp_path)
    argv = ["--config", "right.yaml", *TRAIN, "--check_config"]
    (report,) = run_many([{"argv": argv, "cwd": str(tmp_path)}])
    assert (report.code, report.out) == (0, "right.yaml: the configuration is right\n"), report.err
    assert not report.torch_imported


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--help"], 0, "--run_mode"),
        (["--config", "wrong.yaml", *TRAIN], 2, "did you mean `optimizer.weight_decay`?"),
        ([], 2, "`--config` is missing"),
    ],
)
def test_the_real_command(tmp_path: Path, argv: list[str], code: int, says: str) -> None:
    build(tmp_path)
    (tmp_path / "wrong.yaml").write_text(RIGHT.replace("weight_decay", "weigth_decay"))
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "run.py"), *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_other_ranks_speak_under_their_name(tmp_path: Path) -> None:
    """Later than rank 0, whose launcher ends them then; and not in vain where it does not."""
    build(tmp_path)
    (tmp_path / "wrong.yaml").write_text("qqq: 1\n")
    argv = ["--config", "wrong.yaml", *TRAIN]
    env = {"WORLD_SIZE": "2", "RANK": "1"}
    (report,) = run_many([{"argv": argv, "cwd": str(tmp_path), "env": env}])
    assert (report.code, report.out) == (2, "")
    assert report.err.startswith("[rank 1] error: wrong.yaml:1: unknown key `qqq`")
