"""Wrong keys, choices, types and numbers."""

from __future__ import annotations

from tests.config.tables import Error, Row

TABLE = (
    # names
    Row(
        name="typo in a section's key",
        replace={"weight_decay": "weigth_decay"},
        errors=(Error("optimizer.weigth_decay", at="weigth", near="optimizer.weight_decay"),),
    ),
    Row(
        name="typo in a section",
        replace={"optimizer:": "optimzer:"},
        errors=(Error("optimzer", at="optimzer", near="optimizer"),),
    ),
    Row(
        name="typo at the top level",
        add="resume_trainning: True\n",
        errors=(Error("resume_trainning", at="resume_trainning", near="resume_training"),),
    ),
    Row(
        name="a misspelt section does not count as missing",
        replace={"train_dataset: &train": "train_datset: &train"},
        errors=(Error("train_datset", at="train_datset", near="train_dataset"),),
    ),
    Row(
        name="right key, wrong section",
        replace={"weight_decay": "warmup_ratio"},
        errors=(
            Error("optimizer.warmup_ratio", at="warmup_ratio", near="lr_schedule.warmup_ratio"),
        ),
    ),
    Row(
        name="a section's key at the top level",
        add="epochs: 3\n",
        errors=(Error("epochs", at="epochs: 3", near="runner_config.epochs"),),
    ),
    Row(
        name="another launcher's word",
        replace={"weight_decay": "lr"},
        errors=(Error("optimizer.lr", at="lr", near="optimizer.learning_rate"),),
    ),
    Row(
        name="typo in the runner",
        replace={"batch_size": "batchsize"},
        errors=(Error("runner_config.batchsize", at="batchsize", near="runner_config.batch_size"),),
    ),
    Row(
        name="typo in the data set",
        replace={"seq_length": "seq_lenght"},
        errors=(
            Error("train_dataset.seq_lenght", at="seq_lenght", near="train_dataset.seq_length"),
        ),
    ),
    Row(
        name="typo in the data loader, and the missing source is not reported twice",
        replace={"dataset_dir": "dataset_dirs"},
        errors=(
            Error(
                "train_dataset.data_loader.dataset_dirs",
                at="dataset_dirs",
                near="train_dataset.data_loader.dataset_dir",
            ),
        ),
    ),
    Row(
        name="typo in a callback",
        replace={"save_checkpoint_steps": "save_checkpoint_step"},
        errors=(
            Error(
                "callbacks.1.save_checkpoint_step",
                at="save_checkpoint_step",
                near="callbacks.1.save_checkpoint_steps",
            ),
        ),
    ),
    Row(
        name="typo in a callback's type",
        replace={"CheckpointMonitor": "CheckpointMoniter"},
        errors=(
            Error(
                "callbacks.1.type = 'CheckpointMoniter'",
                at="CheckpointMoniter",
                near="CheckpointMonitor",
            ),
        ),
    ),
    Row(
        name="a callback without a type",
        add="  - prefix: other\n",
        errors=(Error("callbacks.2", at="prefix: other"),),
    ),
    Row(
        name="typo in model_config",
        replace={"intermediate_size": "intermedate_size"},
        errors=(
            Error(
                "model.model_config.intermedate_size = 64",
                at="intermedate_size",
                near="intermediate_size",
            ),
        ),
    ),
    Row(
        name="typo in parallel_config",
        add="parallel_config: {model_paralel: 2}\n",
        errors=(
            Error(
                "parallel_config.model_paralel",
                at="model_paralel",
                near="parallel_config.model_parallel",
            ),
        ),
    ),
    Row(
        name="typo in parallel",
        add="parallel: {enable_parallel_optimiser: True}\n",
        errors=(
            Error(
                "parallel.enable_parallel_optimiser",
                at="enable_parallel_optimiser",
                near="parallel.enable_parallel_optimizer",
            ),
        ),
    ),
    Row(
        name="typo in the tokenizer",
        replace={"    pretrained_model_dir": "    pretrained_model_dirs"},
        errors=(
            Error(
                "processor.tokenizer.pretrained_model_dirs",
                at="pretrained_model_dirs",
                near="processor.tokenizer.pretrained_model_dir",
            ),
        ),
    ),
    Row(
        name="typo in generation",
        add="generation: {temprature: 0.5}\n",
        errors=(
            Error(
                "generation_config.temprature",
                at="temprature",
                near="generation_config.temperature",
            ),
        ),
    ),
    Row(
        name="typo in runner_wrapper, recompute, swap, moe, monitor and tensorboard at once",
        add=(
            "runner_wrapper: {max_grad_nrm: 1}\n"
            "recompute_config: {recompte: True}\n"
            "swap_config: {swp: True}\n"
            "moe_config: {expert_nun: 8}\n"
            "monitor_config: {monitr_on: True}\n"
            "tensorboard: {tensorboard_dirs: x}\n"
        ),
        errors=(
            Error(
                "runner_wrapper.max_grad_nrm",
                at="max_grad_nrm",
                near="runner_wrapper.max_grad_norm",
            ),
            Error("recompute_config.recompte", at="recompte", near="recompute_config.recompute"),
            Error("swap_config.swp", at="swp", near="swap_config.swap"),
            Error("moe_config.expert_nun", at="expert_nun", near="moe_config.expert_num"),
            Error("monitor_config.monitr_on", at="monitr_on", near="monitor_config.monitor_on"),
            Error(
                "tensorboard.tensorboard_dirs",
                at="tensorboard_dirs",
                near="tensorboard.tensorboard_dir",
            ),
        ),
    ),
    Row(name="nothing is near", add="qqq: 1\n", errors=(Error("qqq", at="qqq"),)),
    # words that must be one of several
    Row(
        name="unknown schedule",
        replace={"CosineWithWarmUpLR": "CosineWarmUpLR"},
        errors=(
            Error(
                "lr_schedule.type = 'CosineWarmUpLR'",
                at="CosineWarmUpLR",
                near="CosineWithWarmUpLR",
            ),
        ),
    ),
    Row(
        name="unknown optimizer",
        replace={"type: AdamW": "type: adamw"},
        errors=(Error("optimizer.type = 'adamw'", at="type: adamw", near="AdamW"),),
    ),
    Row(
        name="unknown trainer",
        replace={"CausalLanguageModelingTrainer": "CausalLanguageModellingTrainer"},
        errors=(
            Error(
                "trainer.type = 'CausalLanguageModellingTrainer'",
                at="type",
                near="CausalLanguageModelingTrainer",
            ),
        ),
    ),
    Row(
        name="unknown loader",
        replace={"TextDataLoader": "TextLoader"},
        errors=(
            Error(
                "train_dataset.data_loader.type = 'TextLoader'",
                at="type: TextLoader",
                near="TextDataLoader",
            ),
        ),
    ),
    Row(
        name="unknown run mode",
        argv=(
            "--run_mode",
            "trian",
        ),
        errors=(Error("run_mode = 'trian'", place="command line: --run_mode", near="train"),),
    ),
    Row(
        name="unknown tracker",
        add="trackers: [wandbb]\n",
        errors=(Error("trackers = ['wandbb']", at="trackers", near="wandb"),),
    ),
    # types
    Row(
        name="text for a number",
        replace={"epochs: 2": "epochs: two"},
        errors=(Error("runner_config.epochs = 'two'", at="epochs: two"),),
    ),
    Row(
        name="several wrong types at once",
        replace={
            "seed: 7": "seed: 7.5",
            "learning_rate: 1e-3": "learning_rate: fast",
            "sink_mode: False": "sink_mode: maybe",
            "betas: [0.9, 0.95]": "betas: 0.9",
        },
        errors=(
            Error("seed = 7.5", at="seed: 7.5"),
            Error("runner_config.sink_mode = 'maybe'", at="maybe"),
            Error("optimizer.betas = 0.9", at="betas"),
            Error("lr_schedule.learning_rate = 'fast'", at="fast"),
        ),
    ),
    Row(
        name="null where a value is needed",
        replace={"batch_size: 4": "batch_size:"},
        errors=(Error("runner_config.batch_size = null", at="batch_size"),),
    ),
    Row(
        name="a value where a section is needed",
        replace={"trainer:\n  type: CausalLanguageModelingTrainer": "trainer: Causal"},
        errors=(Error("trainer = 'Causal'", at="trainer"),),
    ),
    Row(
        name="callbacks as a section",
        replace={"callbacks:\n  - type: MFLossMonitor\n  - type": "callbacks:\n    type"},
        add="callbacks2: 0\n",
        errors=(
            Error("callbacks = {'type'", at="callbacks:"),
            Error("callbacks2", at="callbacks2", near="callbacks"),
        ),
    ),
    Row(
        name="an interpolation",
        add="save_file: ${output_dir}/x\n",
        errors=(Error("save_file = '${output_dir}/x'", at="save_file"),),
    ),
    # numbers out of bounds
    Row(
        name="negative, zero and endless numbers",
        replace={
            "batch_size: 4": "batch_size: 0",
            "weight_decay: 0.1": "weight_decay: -1",
            "learning_rate: 1e-3": "learning_rate: .nan",
            "warmup_ratio: 0.1": "warmup_ratio: 1.5",
            "[0.9, 0.95]": "[0.9, 1.0]",
        },
        errors=(
            Error("runner_config.batch_size = 0", at="batch_size"),
            Error("optimizer.weight_decay = -1.0", at="weight_decay"),
            Error("lr_schedule.learning_rate = nan", at=".nan"),
            Error("lr_schedule.warmup_ratio = 1.5", at="1.5"),
            Error("optimizer.betas = [0.9, 1.0]", at="[0.9, 1.0]", near="[0.9, 0.999]"),
        ),
    ),
)
