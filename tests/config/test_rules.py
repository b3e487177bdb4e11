"""Rules between sections: what they allow, and the sizes they agree on with the program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.config import derived, rules
from launcher.config.checks.paths import nearest_path
from launcher.config.resolve import resolve
from launcher.config.schema import SCHEDULE_ARGUMENTS, SCHEDULES_WITHOUT_WARMUP, WARMUP_ARGUMENTS
from tests import messages
from tests.config.workspace import RIGHT


def found(
    add: str = "", *words: str, run_mode: str = "train", world: int | None = 1, **flags: Any
) -> list[str]:
    """Everything wrong with the right configuration plus `add`."""
    Path("x.yaml").write_text(RIGHT + add)
    result = resolve("x.yaml", run_mode, flags, words)
    rest = rules.check(result.config, result.provenance, world=world, bad_keys=result.bad_keys)
    return [str(problem) for problem in (*result.problems, *rest)]


DATA_PARALLEL_2 = "parallel_config: {data_parallel: 2}\n"


@pytest.mark.parametrize(
    ("add", "words", "mode", "world"),
    [
        ("", [], "train", 1),
        (DATA_PARALLEL_2, [], "train", 2),
        (DATA_PARALLEL_2 + "use_parallel: True\n", [], "train", 2),
        ("use_parallel: True\n", [], "train", 1),
        (DATA_PARALLEL_2, [], "train", None),
        (DATA_PARALLEL_2 + "load_checkpoint: qwen\n", [], "train", 2),
        (DATA_PARALLEL_2 + "load_checkpoint: qwen\nauto_trans_ckpt: True\n", [], "train", 2),
        ("load_checkpoint: qwen\nauto_trans_ckpt: False\nuse_parallel: False\n", [], "train", 1),
        ("load_checkpoint: qwen\nauto_trans_ckpt: True\n", [], "finetune", 1),
        ("load_checkpoint: qwen/model.safetensors\n", [], "finetune", 1),
        ("load_checkpoint: qwen\nload_ckpt_format: safetensors\n", [], "finetune", 1),
        (DATA_PARALLEL_2 + "load_checkpoint: ranks\nauto_trans_ckpt: False\n", [], "train", 2),
        ("load_checkpoint: ranks\n", [], "train", 1),
        ("pretrained_model_dir: qwen\n", [], "finetune", 1),
        ("load_ckpt_format: ckpt\n", [], "train", 1),
        ("", [], "resume", 1),
        ("resume_training: True\nload_checkpoint: out/checkpoint\n", [], "train", 1),
        ("resume_training: True\nauto_trans_ckpt: True\n", [], "train", 1),
        ("", ["--predict_data", "hello"], "predict", 1),
        ("", ["--predict_data", "prompts.txt"], "predict", 1),
        ("eval_dataset: {data_loader: {dataset_dir: corpus}}\n", [], "eval", 1),
        ("", ["train_dataset.data_loader.dataset_dir='corpus/*.txt'"], "train", 1),
        ("", ["train_dataset.data_loader.dataset_files=[corpus,corpus/a.txt]"], "train", 1),
        ("", ["runner_config.sink_mode=true", "runner_config.sink_size=5"], "train", 1),
        ("", ["runner_config.sink_mode=true", "runner_config.sink_size=-1"], "train", 1),
        ("", ["runner_config.sink_size=7"], "train", 1),  # sink_mode is off
        ("", ["~processor", "pretrained_model_dir=qwen"], "train", 1),
        ("", ["~model", "pretrained_model_dir=qwen"], "train", 1),
        ("moe_config: {expert_num: 1, capacity_factor: 2.0}\n", [], "train", 1),
        ("recompute_config: {recompute: False, mp_comm_recompute: True}\n", [], "train", 1),
        ("calculate_per_token_loss: True\n", [], "train", 1),
        ("runner_wrapper: {scale_sense: {type: DynamicLossScaleUpdateCell}}\n", [], "train", 1),
        ("runner_wrapper: {scale_sense: {type: FixedLossScaleUpdateCell, loss_scale_value: 0.5}}\n",
         [], "train", 1),
        ("runner_wrapper: {scale_sense: 1024}\n", ["model.model_config.compute_dtype=fp16"],
         "train", 1),
        ("eval_dataset: {data_loader: {dataset_dir: corpus}}\n",
         ["+model.model_config.param_init_type=fp16"], "eval", 1),
        ("parallel: {parallel_mode: 1, full_batch: True, search_mode: sharding_propagation}\n",
         [], "train", 1),
    ],
)  # fmt: skip
def test_what_is_allowed(
    workspace: Path, add: str, words: list[str], mode: str, world: int | None
) -> None:
    assert found(add, *words, run_mode=mode, world=world) == []


@pytest.mark.parametrize("kind", SCHEDULE_ARGUMENTS)
def test_every_schedule_takes_its_arguments(workspace: Path, kind: str) -> None:
    names = [*SCHEDULE_ARGUMENTS[kind], "total_steps"]
    if kind not in SCHEDULES_WITHOUT_WARMUP:
        names += ["warmup_steps", "warmup_epochs", "warmup_lr_init"]
    words = ["~lr_schedule.warmup_ratio", f"lr_schedule.type={kind}"]
    sizes = {"total_steps": 100, "lr_end": 1e-5, "lr_end1": 1e-5, "warmup_lr_init": 0}
    words += [f"lr_schedule.{name}={sizes.get(name, 1)}" for name in names]
    assert found("", *words) == []


@pytest.mark.parametrize("kind", SCHEDULES_WITHOUT_WARMUP)
def test_annealing_has_no_warm_up(workspace: Path, kind: str) -> None:
    (text,) = found("", f"lr_schedule.type={kind}")
    assert "lr_schedule.warmup_ratio = 0.1: " in text
    assert set(WARMUP_ARGUMENTS).isdisjoint(text.rpartition("takes")[2].split())


@pytest.mark.parametrize(
    ("add", "flags", "subject"),
    [
        ("lr_schedule2: 0\n", {}, "did you mean `lr_schedule`?"),
        ("trackers: [dvclive]\n", {}, "trackers = ['dvclive']"),
        ("resume_training: True\nload_checkpoint: elsewhere\n", {}, "'elsewhere'"),
        ("do_eval: True\neval_step_interval: -1\n"
         "eval_dataset: {data_loader: {dataset_dir: corpus}}\n", {}, "do_eval = True"),
        ("do_eval: True\neval_dataset: {data_loader: {dataset_dir: nowhere}}\n", {},
         "eval_dataset.data_loader.dataset_dir = 'nowhere'"),
        ("", {"output_dir": "right.yaml"}, "output_dir = 'right.yaml'"),
        ("parallel: {parallel_optimizer_config: {optimizer_weight_shard_size: 1}}\n", {},
         "optimizer_weight_shard_size = 1"),
    ],
)  # fmt: skip
def test_what_is_refused(workspace: Path, add: str, flags: Any, subject: str) -> None:
    (text,) = found(add, **flags)
    assert subject in text
    messages.check("rules", (add or str(flags)).strip().replace("\n", " "), text)


@pytest.mark.parametrize("asserted", [True, False])
@pytest.mark.parametrize("said", ["True", "False", None, "damaged"])
def test_redundancy_is_what_the_files_say(workspace: Path, asserted: bool, said: str) -> None:
    metadata = {"remove_redundancy": said} if said else {}
    header = json.dumps({"__metadata__": metadata}).encode()
    content = b"" if said == "damaged" else len(header).to_bytes(8, "little") + header
    (workspace / "ranks" / "rank_0" / "CKP_rank_0-1_10.safetensors").write_bytes(content)
    assert found(f"load_checkpoint: ranks\nremove_redundancy: {asserted}\n") == []
    result = resolve("x.yaml", "train", {}, ())
    notes = [note for note in rules.warnings(result.config, result.provenance) if "redund" in note]
    if said in ("True", "False") and said != str(asserted):
        (note,) = notes
        assert f"rank_0-1_10.safetensors records {said}" in note
        assert note.startswith("x.yaml:46: ")
    else:
        assert notes == []


def test_a_family_that_cannot_pack(workspace: Path) -> None:
    (text,) = found("", "model.model_config={type: BloomConfig}")
    assert "train_dataset.packing = True: " in text
    assert text.startswith("x.yaml:24: ")


def test_problems_of_the_model_are_reported_together_with_their_lines(workspace: Path) -> None:
    texts = found("", "model.model_config.num_heads=5", "+model.model_config.hiden_size=3")
    assert any(t.startswith("x.yaml:16: model.model_config.n_kv_heads = 2: 5 att") for t in texts)
    assert any("did you mean `hidden_size`?" in t for t in texts)


def test_what_follows_from_a_mistake_is_not_reported(workspace: Path) -> None:
    """A wrong degree gives no second message about the number of processes."""
    assert len(found("parallel_config: {data_parallel: two}\n", world=2)) == 1
    assert len(found("parallel_config: {data_paralel: 2}\n", world=2)) == 1
    assert len(found("", "processor.tokenizer={pretrained_model_dr: tokenizer}")) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 4),
        (["parallel_config.data_parallel=3"], 12),
        (["runner_config.gradient_accumulation_steps=2"], 8),
        (["parallel_config.micro_batch_num=5"], 4),
        (["parallel_config.micro_batch_num=5", "parallel_config.pipeline_stage=2",
          "runner_config.gradient_accumulation_steps=7"], 20),
        (["micro_batch_interleave_num=2"], 8),
    ],
)  # fmt: skip
def test_global_batch_size(workspace: Path, words: list[str], expected: int) -> None:
    config = resolve("right.yaml", "train", overrides=words).config
    assert rules.global_batch_size(config) == expected
    assert derived.micro_batch_size(config) == 4 * config.micro_batch_interleave_num


def test_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rules.world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rules.world_size() == 8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "tokenizer"),
        (["pretrained_model_dir=qwen"], "tokenizer"),
        (["pretrained_model_dir=qwen", "~processor"], "qwen"),
        (["~processor"], ""),
    ],
)
def test_tokenizer_dir(workspace: Path, words: list[str], expected: str) -> None:
    config = resolve("right.yaml", "train", overrides=words).config
    assert derived.tokenizer_dir(config) == expected


FILES = ["processor.tokenizer.vocab_file", "processor.tokenizer.merges_file"]


@pytest.mark.parametrize(
    ("words", "is_named"),
    [
        ([f"{FILES[0]}=vocab.json", f"{FILES[1]}=merges.txt"], True),
        ([f"{FILES[0]}=vocab.json", f"{FILES[1]}=missing.txt"], False),
        ([f"{FILES[0]}=''", f"{FILES[1]}=null"], False),
        (["processor.tokenizer.pretrained_model_dir=''", f"{FILES[0]}=missing.json"], True),
    ],
)
def test_files_of_a_tokenizer_win_where_they_exist(
    workspace: Path, words: list[str], is_named: bool
) -> None:
    for name in ("vocab.json", "merges.txt"):
        Path(name).touch()
    config = resolve("right.yaml", "train", overrides=words).config
    assert derived.uses_named_tokenizer(config) == is_named
    assert bool(derived.tokenizer_dir(config)) != is_named


@pytest.mark.parametrize("kind", ["MindDataset", "BlendedMegatronDatasetDataLoader"])
def test_a_training_on_rows_of_tokens_needs_no_tokenizer(workspace: Path, kind: str) -> None:
    none = [
        "processor.tokenizer.pretrained_model_dir=''",
        "processor.tokenizer.type=Qwen2Tokenizer",
    ]
    loader = f"train_dataset.data_loader.type={kind}"
    for path in ("''", "/path/to/vocab.json"):
        words = [*none, f"{FILES[0]}={path}"]
        assert not [text for text in found("", *words, loader) if "tokenizer" in text]
        assert [text for text in found("", *words) if "tokenizer" in text]
        prompt = {"predict_data": "a"}
        wrong = found("", *words, loader, run_mode="predict", **prompt)
        assert [text for text in wrong if "tokenizer" in text]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("corpsu", "did you mean `corpus`?"),
        ("corpus/b.txt", "did you mean `corpus/a.txt`?"),
        ("corpsu/a.txt", "did you mean `corpus/a.txt`?"),
        ("corpsu/zzz/a.txt", "did you mean `corpus`?"),
        ("/zzzzz/y", ""),
        ("old/nothing like it", "`old` contains net.ckpt"),
        ("ranks/rank_0/CKP_rank_0-1_10.safetensors/x", ""),
        ("unlike anything", ""),
    ],
)
def test_the_nearest_path(workspace: Path, path: str, expected: str) -> None:
    assert nearest_path(path) == expected


def test_ignored_keys_are_reported_once(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("x.yaml").write_text(RIGHT + "context: {mode: 0, max_device_memory: 58GB}\n")
    argv = ["--config", "x.yaml", "--run_mode", "train", "--check_config"]
    assert cli.main(argv) == 0
    expected = (
        "accepted, no effect on PyTorch: train_dataset_task.type, context.mode,\n"
        "  context.max_device_memory\n"
    )
    assert " ".join(capsys.readouterr().err.split()) == " ".join(expected.split())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([*argv, "--parallel_config.data_parallel", "2"]) == 0
    assert capsys.readouterr().err == ""


def test_warnings(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["optimizer.learning_rate=0.1", "+callbacks={type: EvalCallBack}"]
    words += ["parallel_config.micro_batch_num=4"]
    argv = ["--config", "right.yaml", "--run_mode", "train", "--check_config", *words]
    assert cli.main(argv) == 0
    err = capsys.readouterr().err
    assert "warning: command line: optimizer.learning_rate=0.1: optimizer.learning_rate: " in err
    assert "callbacks: EvalCallBack has no effect without do_eval" in err
    assert "parallel_config.micro_batch_num: no effect without a pipeline" in err


def test_internal_errors_leave_a_traceback(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("an internal error")

    monkeypatch.setattr(rules, "check", broken)
    assert cli.main(["--config", "right.yaml", "--run_mode", "train"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interruption_before_the_run(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["--config", "right.yaml", "--run_mode", "train"]) == 130
