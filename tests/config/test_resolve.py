"""What a file and a command line become: precedence, provenance, names that mean the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.command_line import FLAGS
from launcher.config.resolve import Resolved, resolve
from launcher.config.schema import (
    CheckpointMonitorSection,
    EvalCallbackSection,
    IgnoredCallbackSection,
    LossMonitorSection,
    RegisteredCallbackSection,
)
from launcher.errors import UserError
from tests import messages


def resolved(text: str, *words: str, run_mode: str | None = "train", **flags: Any) -> Resolved:
    """The configuration of a YAML text in the current directory, which must be right."""
    Path("x.yaml").write_text(text)
    result = resolve("x.yaml", run_mode, flags, words)
    assert not result.problems, "\n".join(map(str, result.problems))
    return result


def value(result: Resolved, key: str) -> Any:
    if key in result.provenance.extra:
        return result.provenance.extra[key]
    found: Any = result.config
    for name in key.split("."):
        if isinstance(found, list):
            found = found[int(name)]
        else:
            found = found[name] if isinstance(found, dict) else getattr(found, name)
    return found


def problems(text: str, *words: str, run_mode: str | None = "train", **flags: Any) -> list[str]:
    Path("x.yaml").write_text(text)
    return [str(problem) for problem in resolve("x.yaml", run_mode, flags, words).problems]


# --- precedence -----------------------------------------------------------------------------------


def test_precedence(workspace: Path) -> None:
    key = "runner_config.epochs"
    Path("base.yaml").write_text("runner_config: {epochs: 2}\n")
    with_base = "base_config: base.yaml\n"
    own = with_base + "runner_config: {epochs: 3}\n"
    steps = [
        (resolved(""), 1, "default"),
        (resolved(with_base), 2, "base.yaml:1"),
        (resolved(own), 3, "x.yaml:2"),
        (resolved(own, epochs=4), 4, "command line: --epochs"),
        (resolved(own, f"--{key}", "5", epochs=4), 5, f"command line: --{key}"),
        (resolved(own, f"--{key}=6", f"{key}=7", epochs=4), 7, f"command line: {key}=7"),
        (resolved(own, f"{key}=7", f"--{key}=6", epochs=4), 6, f"command line: --{key}"),
        (resolved(own, "--options", f"{key}=8", epochs=4), 8, f"command line: --options {key}"),
    ]
    for result, epochs, where in steps:
        assert value(result, key) == epochs
        assert result.provenance.where(key) == where


def test_a_written_section_is_merged_over_its_defaults(workspace: Path) -> None:
    config = resolved("runner_wrapper: {max_grad_norm: 2}\noptimizer: {eps: 1e-6}\n").config
    assert config.runner_wrapper.use_clip_grad
    assert config.runner_wrapper.max_grad_norm == 2.0
    assert config.optimizer.betas == [0.9, 0.999]


def test_an_empty_section_is_its_defaults(workspace: Path) -> None:
    result = resolved("optimizer:\ncallbacks:\ntrain_dataset:\nmodel:\nload_checkpoint:\n")
    assert result.config.optimizer.type == "AdamW"
    assert result.config.train_dataset is None
    assert result.config.load_checkpoint == ""


def test_types_are_what_the_schema_says(workspace: Path) -> None:
    result = resolved(
        "seed: '3'\nlr_schedule: {learning_rate: 1}\noptimizer: {betas: [0, 0.5]}\n"
        "runner_config: {max_steps: 1e2}\nresume_training: 'TRUE'\ntrackers: [wandb]\n"
    )
    for key, expected in (
        ("seed", 3),
        ("lr_schedule.learning_rate", 1.0),
        ("optimizer.betas", [0.0, 0.5]),
        ("runner_config.max_steps", 100),
        ("resume_training", True),
    ):
        assert value(result, key) == expected
        assert type(value(result, key)) is type(expected)


# --- base_config ----------------------------------------------------------------------------------


def test_several_bases_merge_deeply_in_order(workspace: Path) -> None:
    (workspace / "bases").mkdir()
    Path("bases/a.yaml").write_text("optimizer: {eps: 1e-6, weight_decay: 0.1}\nseed: 1\n")
    Path("bases/b.yaml").write_text("optimizer: {eps: 1e-7}\nbase_config: c.yaml\n")
    Path("bases/c.yaml").write_text("seed: 9\noptimizer: {betas: [0.5, 0.6]}\n")
    result = resolved("base_config: [bases/a.yaml, bases/b.yaml]\noptimizer: {weight_decay: 0.2}\n")
    optimizer = result.config.optimizer
    assert (optimizer.eps, optimizer.weight_decay, optimizer.betas) == (1e-7, 0.2, [0.5, 0.6])
    assert result.config.seed == 9
    assert result.provenance.where("optimizer.eps") == "bases/b.yaml:1"
    assert result.provenance.where("optimizer.betas") == "bases/c.yaml:2"
    assert result.provenance.where("optimizer.weight_decay") == "x.yaml:2"


def test_lists_of_a_base_are_replaced(workspace: Path) -> None:
    Path("base.yaml").write_text("callbacks: [{type: CheckpointMonitor, prefix: a}]\n")
    result = resolved("base_config: base.yaml\ncallbacks: [{type: MFLossMonitor}]\n")
    assert result.config.checkpoint_monitor is None


def test_problems_in_a_base_have_its_name(workspace: Path) -> None:
    Path("base.yaml").write_text("\nsede: 1\n")
    found = problems("base_config: base.yaml\nepocs: 2\n")
    assert any(text.startswith("base.yaml:2: unknown key `sede`") for text in found)
    assert any(text.startswith("x.yaml:2: unknown key `epocs`") for text in found)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("base_config: nowhere.yaml\n", "x.yaml:1: base_config = 'nowhere.yaml'"),
        ("base_config: x.yaml\n", "x.yaml:1: base_config = 'x.yaml'"),
        ("base_config: loop.yaml\n", "loop.yaml:1: base_config = 'x.yaml'"),
        ("base_config: [1]\n", "x.yaml:1: base_config = 1"),
        ("base_config: corpus\n", "x.yaml:1: base_config = 'corpus'"),
        ("just text\n", "x.yaml:1: "),
        ("- a\n- b\n", "x.yaml:1: "),
    ],
)
def test_files_that_cannot_be_read(workspace: Path, text: str, subject: str) -> None:
    Path("loop.yaml").write_text("base_config: x.yaml\n")
    Path("x.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        resolve("x.yaml")
    assert str(caught.value).startswith(subject)
    messages.check("files", text.strip().replace("\n", " "), str(caught.value))


def test_bytes_that_are_no_text(workspace: Path) -> None:
    Path("x.yaml").write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        resolve("x.yaml")


def test_the_project_configs_are_found_from_anywhere(workspace: Path) -> None:
    assert resolve("quickstart.yaml", "train").config.run_mode == "train"
    assert resolve("quickstart", "train").config.run_mode == "train"


# --- names that mean the same ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("generation: {max_length: 30}\n", "generation_config.max_length", 30),
        ("generation_config: {max_decode_length: 30}\n", "generation_config.max_length", 30),
        ("generation: {max_decode_length: 30}\n", "generation_config.max_length", 30),
        ("top_k: 3\n", "generation_config.top_k", 3),
        ("model: {model_config: {do_sample: True}}\n", "generation_config.do_sample", True),
        ("model: {model_config: {eos_token_id: 5}}\n", "generation_config.eos_token_id", 5),
        ("load_balanced: False\n", "balanced_load", False),
        ("parallel_config: {micro_batch_interleave_num: 1}\n", "micro_batch_interleave_num", 1),
        ("lr_schedule: {base_lr: 1e-3}\n", "lr_schedule.learning_rate", 1e-3),
        ("run_mode: predict_with_train_model\n", "run_mode", "predict"),
    ],
)
def test_second_names(workspace: Path, text: str, key: str, expected: Any) -> None:
    result = resolved(text, run_mode=None)
    assert value(result, key) == expected
    assert result.provenance.where(key) == "x.yaml:1"


def test_the_section_wins_over_generation_keys_of_the_model(workspace: Path) -> None:
    text = "model: {model_config: {top_k: 3, top_p: 0.5}}\ngeneration: {top_k: 4}\n"
    generation = resolved(text).config.generation_config
    assert (generation.top_k, generation.top_p) == (4, 0.5)


def test_a_second_name_in_a_base_does_not_hide_the_first(workspace: Path) -> None:
    Path("base.yaml").write_text("generation: {top_k: 3, top_p: 0.5}\n")
    text = "base_config: base.yaml\ngeneration_config: {top_k: 4}\n"
    generation = resolved(text, "generation.max_length=9").config.generation_config
    assert (generation.top_k, generation.top_p, generation.max_length) == (4, 0.5, 9)


def test_equal_values_under_two_names_are_no_problem(workspace: Path) -> None:
    assert resolved("top_k: 3\ngeneration: {top_k: 3}\ngeneration_config: {top_k: 3}\n")


def test_the_task_of_a_data_set_may_hold_the_data_set(workspace: Path) -> None:
    result = resolved("train_dataset_task: {dataset_config: {seq_length: 8}}\n")
    assert result.config.train_dataset is not None
    assert result.config.train_dataset.seq_length == 8
    assert result.config.train_dataset_task.dataset_config is None


def test_a_problem_of_an_alias_is_reported_once(workspace: Path) -> None:
    text = "train_dataset: &t {foo: 1}\ntrain_dataset_task: {dataset_config: *t}\n"
    assert len(problems(text)) == 1


def test_a_problem_of_an_alias_changed_by_a_flag_is_reported_once(workspace: Path) -> None:
    text = "train_dataset: &t {foo: 1}\ntrain_dataset_task: {dataset_config: *t}\n"
    assert len(problems(text, train_dataset_dir="corpus")) == 1


@pytest.mark.parametrize(
    ("text", "flags", "resume"),
    [
        ("", {}, True),
        ("resume_training: False\n", {}, True),
        ("resume_training: CKP-1_2.safetensors\n", {}, "CKP-1_2.safetensors"),
        ("", {"resume_training": "CKP-1_2.safetensors"}, "CKP-1_2.safetensors"),
    ],
)
def test_the_mode_resume(workspace: Path, text: str, flags: dict[str, str], resume: Any) -> None:
    result = resolved(text, run_mode="resume", **flags)
    assert result.config.run_mode == "train"
    assert result.config.resume_training == resume
    assert result.provenance.where("run_mode") == "command line: --run_mode resume"


def test_resume_in_a_file_contradicts_itself(workspace: Path) -> None:
    found = problems("run_mode: resume\nresume_training: False\n", run_mode=None)
    assert any("resume_training = False" in text for text in found)


# --- callbacks ------------------------------------------------------------------------------------


def test_callbacks_are_typed_and_the_last_one_counts(workspace: Path) -> None:
    config = resolved(
        "register_path: user_callbacks.py\ncallbacks:\n"
        "  - {type: CheckpointMonitor, prefix: a}\n  - {type: Mine, count: 3, deep: {x: [1]}}\n"
        "  - {type: EvalCallBack}\n  - {type: CheckpointMonitor, prefix: b}\n"
        "  - {type: ObsMonitor, interval: 5}\n"
    ).config
    kinds = [type(callback) for callback in config.callbacks]
    assert kinds == [
        CheckpointMonitorSection,
        RegisteredCallbackSection,
        EvalCallbackSection,
        CheckpointMonitorSection,
        IgnoredCallbackSection,
    ]
    assert config.callbacks[1] == RegisteredCallbackSection(
        type="Mine", arguments={"count": 3, "deep": {"x": [1]}}
    )
    assert config.checkpoint_monitor is config.callbacks[3]
    assert config.loss_monitor == LossMonitorSection()


@pytest.mark.parametrize(
    ("entry", "subject"),
    [
        ("SummaryMonitor", "callbacks.0 = 'SummaryMonitor'"),
        ("{type: SummaryMonitor}", "callbacks.0.type = 'SummaryMonitor': not built yet"),
        ("{typ: MFLossMonitor}", "did you mean `callbacks.0.type`, not `callbacks.0.typ`?"),
        ("{type: Mine}", "callbacks.0.type = 'Mine'"),
        ("{type: EvalCallBack, x: 1}", "unknown key `callbacks.0.x`"),
        ("{type: MFLossMonitor, per_print_times: 0}", "callbacks.0.per_print_times = 0"),
    ],
)
def test_wrong_callbacks(workspace: Path, entry: str, subject: str) -> None:
    (found,) = problems(f"callbacks:\n  - {entry}\n")
    assert subject in found
    messages.check("callbacks", entry, found)


# --- flags ----------------------------------------------------------------------------------------

FLAG_VALUES: dict[str, tuple[Any, Any]] = {
    "run_mode": ("finetune", "finetune"),
    "output_dir": ("my out=1", "my out=1"),
    "load_checkpoint": ("/a b/c", "/a b/c"),
    "pretrained_model_dir": ("qwen", "qwen"),
    "auto_trans_ckpt": ("TRUE", True),
    "src_strategy_path_or_dir": ("output/strategy", "output/strategy"),
    "resume_training": ("CKP-1_10.safetensors", "CKP-1_10.safetensors"),
    "transform_process_num": ("2", 2),
    "seed": ("11", 11),
    "only_save_strategy": ("true", True),
    "use_parallel": ("false", False),
    "epochs": ("3", 3),
    "max_steps": ("1e3", 1000),
    "batch_size": ("8", 8),
    "gradient_accumulation_steps": ("2", 2),
    "sink_mode": ("False", False),
    "do_eval": ("true", True),
    "train_dataset_dir": ("{x}", "{x}"),
    "eval_dataset_dir": ("[y]", "[y]"),
    "num_samples": ("5", 5),
    "predict_data": ("a=b, c", "a=b, c"),
    "system": ("be short", "be short"),
    "chat_template": ("none", "none"),
    "tools": ("tools.json", "tools.json"),
    "stream": ("False", False),
    "interactive": ("True", True),
    "predict_batch_size": ("2", 2),
    "do_sample": ("True", True),
    "trust_remote_code": ("true", True),
    "register_path": ("user_callbacks.py", "user_callbacks.py"),
    "mode": ("1", 1),
    "device_id": ("3", 3),
    "device_target": ("CPU", "CPU"),
    "remote_save_url": ("obs://x", "obs://x"),
}
REFUSED_FLAGS = {
    "strategy_load_checkpoint": "x",
    "modal_type": "image",
    "adapter_id": "a",
    "profile": "true",
}
MOVED = {"model.model_config.do_sample": "generation_config.do_sample"}
SECTIONS = "train_dataset: {seq_length: 8}\neval_dataset: {seq_length: 8}\n"


def test_every_flag_is_tried() -> None:
    assert {*FLAG_VALUES, *REFUSED_FLAGS} == set(FLAGS)


@pytest.mark.parametrize("equals", [False, True], ids=["two words", "one word"])
@pytest.mark.parametrize("name", FLAG_VALUES)
def test_every_flag_survives(workspace: Path, name: str, equals: bool) -> None:
    written, expected = FLAG_VALUES[name]
    words = [f"--{name}={written}"] if equals else [f"--{name}", written]
    result = resolved(SECTIONS, *words, run_mode=None)
    for target in FLAGS[name].targets:
        key = MOVED.get(target, target)
        assert value(result, key) == expected
        assert type(value(result, key)) is type(expected)
        assert result.provenance.where(key) == f"command line: --{name}"


@pytest.mark.parametrize("name", REFUSED_FLAGS)
def test_flags_not_built_yet_arrive_too(workspace: Path, name: str) -> None:
    (found,) = problems("", f"--{name}", REFUSED_FLAGS[name], run_mode=None)
    assert found.startswith(f"command line: --{name}: {FLAGS[name].targets[0]} = ")
    assert "not built yet" in found


@pytest.mark.parametrize("name", ["train_dataset", "train_data"])
def test_abbreviations_of_the_original(workspace: Path, name: str) -> None:
    result = resolved("", f"--{name}", "corpus")
    assert result.config.train_dataset is not None
    assert result.config.train_dataset.data_loader.paths == ["corpus"]


def test_num_samples_makes_no_sections(workspace: Path) -> None:
    assert resolved("", num_samples=3).config.train_dataset is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["one"], "one"),
        (["a\\nb"], "a\nb"),
        (["I love Beijing, because", "two=2"], ["I love Beijing, because", "two=2"]),
        (["123"], "123"),
        (["true"], "true"),
        (["${x}"], "${x}"),
    ],
)
def test_prompts(workspace: Path, words: list[str], expected: Any) -> None:
    result = resolved("", "--predict_data", *words, "--seed", "3")
    assert result.config.input_data == expected
    assert result.config.seed == 3


@pytest.mark.parametrize(
    ("words", "prompts", "top_k"),
    [
        (["a", "b", "generation.top_k=3"], ["a", "b"], 3),
        (["a", "generation_config.top_k=3", "b"], ["a", "b"], 3),
        (["a", "top_k=3"], "a", 3),
        (["a", "+model.model_config.top_k=3"], "a", 3),
        (["top_k=3"], "top_k=3", 50),
        (["a", "x=3"], ["a", "x=3"], 50),
    ],
)
def test_keys_among_prompts(workspace: Path, words: list[str], prompts: Any, top_k: int) -> None:
    """What begins like a key after the first prompt is an override; anything else is a prompt."""
    config = resolved("", "--predict_data", *words).config
    assert (config.input_data, config.generation_config.top_k) == (prompts, top_k)


def test_trust_is_given_on_the_command_line_only(workspace: Path) -> None:
    assert resolved("", "--trust_remote_code", "true").config.trust_remote_code
    assert resolved("trust_remote_code: False\n").config.trust_remote_code is False
    (found,) = problems("trust_remote_code: True\n")
    assert "--trust_remote_code true" in found


# --- keys without effect --------------------------------------------------------------------------


def test_keys_without_effect_are_listed_where_written(workspace: Path) -> None:
    result = resolved(
        "context: {mode: 0, max_device_memory: 58GB, ascend_config: {precision_mode: x}, odd: 1}\n"
        "parallel: {enable_alltoall: True}\nuse_legacy: False\n"
    )
    assert result.no_effect == (
        "context.mode",
        "context.max_device_memory",
        "context.ascend_config",
        "context.odd",
        "parallel.enable_alltoall",
        "use_legacy",
    )
    assert resolved("").no_effect == ()


def test_a_value_of_an_ignored_key_is_checked_all_the_same(workspace: Path) -> None:
    found = problems("parallel: {parallel_mode: SEMI_AUTO_PARALEL, full_batch: 3}\n")
    assert any("did you mean `SEMI_AUTO_PARALLEL`?" in text for text in found)
    assert any("parallel.full_batch = 3: " in text for text in found)


# --- samples of the original's page ---------------------------------------------------------------


def test_the_fields_of_the_original_page_are_known(workspace: Path) -> None:
    """Every key of the page's samples is in the schema (what is not built yet is refused)."""
    found = problems(
        "use_legacy: False\nload_checkpoint: ''\npretrained_model_dir: qwen\n"
        "load_ckpt_format: safetensors\nauto_trans_ckpt: True\nuse_parallel: True\n"
        "remove_redundancy: True\noutput_dir: ./output\n"
        "model:\n  model_config:\n    compute_dtype: bfloat16\n"
        "    layernorm_compute_dtype: float32\n    softmax_compute_dtype: float32\n"
        "    rotary_dtype: bfloat16\n    params_dtype: bfloat16\ngeneration:\n  max_length: 30\n"
        "callbacks:\n  - type: CheckpointMonitor\n    prefix: deepseekv3\n"
        "    save_checkpoint_steps: 1000\n    keep_checkpoint_max: 5\n"
        "    save_network_params: False\n    integrated_save: False\n    async_save: False\n"
        "    checkpoint_format: safetensors\n"
        "parallel_config:\n  data_parallel: 2\n  model_parallel: 1\n  pipeline_stage: 1\n"
        "  micro_batch_num: 2\n  vocab_emb_dp: True\n  gradient_aggregation_group: 4\n"
        "  micro_batch_interleave_num: 1\n"
    )
    assert found == []
