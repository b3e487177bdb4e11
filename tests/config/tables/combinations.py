"""Keys that do not fit together, and features that are not built yet."""

from __future__ import annotations

from tests.config.tables import Error, Row

TABLE = (
    # impossible combinations
    Row(
        name="more ranks than processes",
        add="parallel_config: {data_parallel: 4}\n",
        errors=(Error("data_parallel 4 = 4 processes", at="data_parallel", near="1"),),
    ),
    Row(
        name="more processes than ranks",
        env={"WORLD_SIZE": "2"},
        errors=(Error("data_parallel 1 = 1 process", near="2"),),
    ),
    Row(
        name="one process asserted, two running",
        add="use_parallel: False\nparallel_config: {data_parallel: 2}\n",
        env={"WORLD_SIZE": "2"},
        errors=(Error("use_parallel = False", at="use_parallel"),),
    ),
    Row(
        name="an unknown way to share a sequence, an unknown compiler, an unknown schedule",
        add=(
            "parallel_config: {context_parallel_algo: ulyses}\n"
            "compile: inductr\n"
            "parallel: {pipeline_config: {pipeline_scheduler: zero_bubble}}\n"
        ),
        errors=(
            Error(
                "parallel_config.context_parallel_algo = 'ulyses'",
                at="context_parallel_algo",
                near="ulysses",
            ),
            Error("compile = 'inductr'", at="compile", near="inductor"),
            Error(
                "parallel.pipeline_config.pipeline_scheduler = 'zero_bubble'",
                at="pipeline_scheduler",
                near="zero_bubble_v",
            ),
        ),
    ),
    Row(
        name="two places for one number",
        add=("micro_batch_interleave_num: 2\nparallel_config: {micro_batch_interleave_num: 3}\n"),
        errors=(Error("parallel_config.micro_batch_interleave_num", at="num: 3"),),
    ),
    Row(
        name="a shard size that does not divide",
        add=(
            "parallel_config: {data_parallel: 4}\n"
            "parallel:\n"
            "  enable_parallel_optimizer: True\n"
            "  parallel_optimizer_config: {optimizer_weight_shard_size: 3}\n"
        ),
        env={"WORLD_SIZE": "4"},
        errors=(
            Error(
                "parallel.parallel_optimizer_config.optimizer_weight_shard_size = 3",
                at="_shard_size",
                near=("2", "4"),
            ),
        ),
    ),
    Row(
        name="checkpoints inside a sink",
        replace={"sink_mode: False": "sink_size: 4"},
        errors=(
            Error(
                "callbacks.1.save_checkpoint_steps = 10",
                at="save_checkpoint_steps",
                near=("8", "12"),
            ),
        ),
    ),
    Row(
        name="a profile that ends before it begins, on ranks that are not there",
        add=(
            "profile: True\nprofile_start_step: 9\nprofile_stop_step: 4\nprofile_rank_ids: [0, 2]\n"
        ),
        errors=(
            Error("profile_stop_step = 4", at="profile_stop_step", near="9"),
            Error("profile_rank_ids = [0, 2]", at="profile_rank_ids", near="[0]"),
        ),
    ),
    Row(
        name="a profile after the run, of no rank, into a file",
        replace={"sink_mode: False": "max_steps: 20"},
        add=(
            "profile: True\nprofile_start_step: 30\nprofile_rank_ids: []\n"
            "profile_output: wrong.yaml/profile\n"
        ),
        errors=(
            Error("profile_start_step = 30", at="profile_start_step", near="20"),
            Error("profile_rank_ids = []", at="profile_rank_ids", near="[0]"),
            Error("profile_output = 'wrong.yaml/profile'", at="profile_output"),
        ),
    ),
    Row(
        name="one value where a list is needed, and a peak in FLOP/s",
        add="profile_rank_ids: 0\nfp8_config: {exclude: mlp}\ndevice_peak_tflops: 989.0e+12\n",
        errors=(
            Error("profile_rank_ids = 0", at="profile_rank_ids", near="[0]"),
            Error("fp8_config.exclude = 'mlp'", at="fp8_config", near="['mlp']"),
            Error("device_peak_tflops = 989000000000000.0", at="device_peak_tflops"),
        ),
    ),
    Row(
        name="words of others for the profiler and the peak of a device",
        add="profile_step_start: 3\nsave_traces_folder: x\npeak_flops: 1.0\n",
        errors=(
            Error("profile_step_start", at="profile_step_start", near="profile_start_step"),
            Error("save_traces_folder", at="save_traces_folder", near="profile_output"),
            Error("peak_flops", at="peak_flops", near="device_peak_tflops"),
        ),
    ),
    Row(
        name="a sink of no size",
        replace={"sink_mode: False": "sink_size: 0"},
        errors=(Error("runner_config.sink_size = 0", at="sink_size", near="1"),),
    ),
    Row(
        name="text where CheckpointMonitor takes numbers",
        replace={"save_checkpoint_steps: 10": "save_checkpoint_steps: ten"},
        add="    keep_checkpoint_max: many\n",
        errors=(
            Error("callbacks.1.save_checkpoint_steps = 'ten'", at="steps: ten"),
            Error("callbacks.1.keep_checkpoint_max = 'many'", at="many"),
        ),
    ),
    Row(
        name="a prefix that breaks names",
        replace={"prefix: demo": "prefix: my/rank"},
        errors=(Error("callbacks.1.prefix = 'my/rank'", at="prefix", near="CKP"),),
    ),
    Row(
        name="a prefix with rank",
        replace={"prefix: demo": "prefix: demo_rank"},
        errors=(Error("callbacks.1.prefix = 'demo_rank'", at="prefix", near="demo"),),
    ),
    Row(
        name="an argument of another schedule",
        replace={"warmup_ratio: 0.1": "power: 2"},
        errors=(Error("lr_schedule.power = 2.0", at="power", near="PolynomialWithWarmUpLR"),),
    ),
    Row(
        name="a polynomial that rises",
        replace={"CosineWithWarmUpLR": "PolynomialWithWarmUpLR", "warmup_ratio: 0.1": "lr_end: 1"},
        errors=(Error("lr_schedule.lr_end = 1", at="lr_end"),),
    ),
    Row(
        name="two lengths of a row",
        replace={"head_dim: 8": "head_dim: 8\n    seq_length: 32"},
        errors=(Error("train_dataset.seq_length = 64", at="  seq_length: 64"),),
    ),
    Row(
        name="rows longer than the model",
        replace={"seq_length: 64": "seq_length: 256"},
        errors=(Error("train_dataset.seq_length = 256", at="seq_length", near="128"),),
    ),
    Row(
        name="heads that do not divide",
        replace={"n_kv_heads: 2": "n_kv_heads: 3"},
        errors=(Error("model.model_config.n_kv_heads = 3", at="n_kv_heads", near=("2", "4")),),
    ),
    Row(
        name="weights in fp16",
        replace={"head_dim: 8": "head_dim: 8\n    param_init_type: float16"},
        errors=(
            Error("model.model_config.param_init_type = 'float16'", at="float16", near="float32"),
        ),
    ),
    Row(
        name="a loss scale that is not a number",
        add="runner_wrapper:\n  scale_sense: much\n",
        errors=(Error("runner_wrapper.scale_sense = 'much'", at="scale_sense"),),
    ),
    Row(
        name="a loss scale of zero",
        add="runner_wrapper:\n  scale_sense: 0\n",
        errors=(Error("runner_wrapper.scale_sense = 0.0", at="scale_sense", near="1.0"),),
    ),
    Row(
        name="a loss scale without a type",
        add="runner_wrapper:\n  scale_sense:\n    loss_scale_value: 8\n",
        errors=(
            Error(
                "runner_wrapper.scale_sense = {'loss_scale_value': 8}",
                at="scale_sense",
                near="DynamicLossScaleUpdateCell",
            ),
        ),
    ),
    Row(
        name="a loss scale of an unknown type",
        add="runner_wrapper:\n  scale_sense:\n    type: DynamicLossScaleCell\n",
        errors=(
            Error(
                "runner_wrapper.scale_sense.type = 'DynamicLossScaleCell'",
                at="LossScaleCell",
                near="DynamicLossScaleUpdateCell",
            ),
        ),
    ),
    Row(
        name="a fixed loss scale that moves",
        add=(
            "runner_wrapper:\n"
            "  scale_sense:\n"
            "    type: FixedLossScaleUpdateCell\n"
            "    scale_window: 8\n"
        ),
        errors=(
            Error("runner_wrapper.scale_sense.scale_window = 8", at="scale_window"),
            Error(
                "runner_wrapper.scale_sense.loss_scale_value is missing",
                at="scale_sense:",
                near="65536",
            ),
        ),
    ),
    Row(
        name="a dynamic loss scale with wrong numbers",
        add=(
            "runner_wrapper:\n"
            "  scale_sense:\n"
            "    type: DynamicLossScaleUpdateCell\n"
            "    loss_scale_value: 0.5\n"
            "    scale_factor: 1\n"
            "    scale_window: 2.5\n"
        ),
        errors=(
            Error(
                "runner_wrapper.scale_sense.loss_scale_value = 0.5",
                at="loss_scale_value",
                near="65536",
            ),
            Error("runner_wrapper.scale_sense.scale_factor = 1", at="scale_factor", near="2"),
            Error("runner_wrapper.scale_sense.scale_window = 2.5", at="scale_window", near="1000"),
        ),
    ),
    Row(
        name="an embedding smaller than the tokenizer",
        replace={"pretrained_model_dir: tokenizer": "pretrained_model_dir: large_tokenizer"},
        errors=(Error("model.model_config.vocab_size = 64", at="vocab_size", near="80"),),
    ),
    Row(
        name="a loader's argument for another loader",
        replace={"dataset_dir: corpus": "dataset_dir: corpus\n    format: alpaca"},
        errors=(
            Error(
                "train_dataset.data_loader.format = 'alpaca'",
                at="alpaca",
                near="InstructionDataLoader",
            ),
        ),
    ),
    Row(
        name="evaluation without data",
        add="do_eval: True\n",
        errors=(Error("do_eval = True", at="do_eval"),),
    ),
    Row(
        name="features not built yet",
        add=(
            "layer_scale: True\n"
            "moe_config: {expert_num: 8}\n"
            "push_to_hub: True\n"
            "checkpoint: {save_path: x}\n"
        ),
        errors=(
            Error("layer_scale = True", at="layer_scale"),
            Error("moe_config.expert_num = 8", at="expert_num"),
            Error("push_to_hub = True", at="push_to_hub"),
            Error("checkpoint.save_path = 'x'", at="save_path"),
        ),
    ),
    Row(
        name="kinds of data not built yet",
        replace={"TextDataLoader": "TFRecordDataset"},
        errors=(Error("train_dataset.data_loader.type = 'TFRecordDataset'", at="TFRecordDataset"),),
    ),
    Row(
        name="CheckpointMonitor's options not built yet",
        add="    checkpoint_format: pickle\n    enc_key: secret\n",
        errors=(
            Error("callbacks.1.checkpoint_format = 'pickle'", at="format: pickle"),
            Error("callbacks.1.enc_key = 'secret'", at="enc_key"),
        ),
    ),
    Row(
        name="CheckpointMonitor's choices",
        add="    async_save: threads\n    on_save_error: contine\n",
        errors=(
            Error("callbacks.1.async_save = 'threads'", at="async_save", near="thread"),
            Error("callbacks.1.on_save_error = 'contine'", at="on_save_error", near="continue"),
        ),
    ),
    Row(
        name="code allowed by a file",
        add="trust_remote_code: True\n",
        errors=(Error("trust_remote_code = True", at="trust_remote_code"),),
    ),
    Row(
        name="resume and not resume",
        argv=(
            "--run_mode",
            "resume",
            "--resume_training",
            "false",
        ),
        errors=(
            Error(
                "run_mode = 'resume', but resume_training = 'false'",
                place="command line: --resume_training",
            ),
        ),
    ),
    Row(
        name="two names of one key that disagree",
        add="generation: {top_k: 5}\ngeneration_config: {top_k: 6}\n",
        errors=(Error("generation.top_k", at="generation:"),),
    ),
    Row(
        name="lengths and probabilities of generation",
        add="generation: {min_length: 30, max_length: 20, top_p: 1.5, num_beams: 4}\n",
        argv=(
            "--run_mode",
            "predict",
            "--predict_data",
            "hello",
        ),
        errors=(
            Error("generation_config.top_p = 1.5", at="top_p"),
            Error("generation_config.num_beams = 4", at="num_beams"),
            Error("generation_config.min_length = 30", at="min_length", near="20"),
        ),
    ),
)
