"""The grammar of overrides on a tree: literal texts, options, Hydra's own, lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config.command_line import FLAGS, parse
from launcher.config.resolve import resolve
from launcher.config.rules import check
from tests import messages
from tests.config.test_resolve import resolved, value

BASE = (
    "callbacks:\n  - {type: MFLossMonitor}\n  - {type: CheckpointMonitor, prefix: a}\n"
    "model: {model_config: {type: Qwen3Config, rope_scaling: {factor: 2}}}\n"
    "optimizer: {eps: 1e-6}\n"
)


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        # literal, typed by the schema
        (["--optimizer.eps", "1e-4"], "optimizer.eps", 1e-4),
        (["--optimizer.eps=1"], "optimizer.eps", 1.0),
        (["--optimizer.betas", "[0.8, 0.9]"], "optimizer.betas", [0.8, 0.9]),
        (["--output_dir", "a,b [c] {d}"], "output_dir", "a,b [c] {d}"),
        (["--output_dir=x=y"], "output_dir", "x=y"),
        (["--output_dir", "12"], "output_dir", "12"),
        (["--output_dir", "true"], "output_dir", "true"),
        (["--strict_load", "false"], "strict_load", False),
        (["--load_ckpt_format", "null"], "load_ckpt_format", None),
        (["--resume_training", "TRUE"], "resume_training", True),
        (["--resume_training", "x-1_2"], "resume_training", "x-1_2"),
        (["--trackers", "[wandb]"], "trackers", ["wandb"]),
        (["--callbacks.1.prefix", "b"], "callbacks.1.prefix", "b"),
        (["--callbacks", "[{type: CheckpointMonitor, prefix: z}]"], "callbacks.0.prefix", "z"),
        (["--callbacks", '[{"type": "CheckpointMonitor", "prefix": "z"}]'],
         "callbacks.0.prefix", "z"),
        (["--model.model_config.hidden_size", "64"], "model.model_config.hidden_size", 64),
        (["--model.model_config.new", "[1, {a: 2}]"], "model.model_config.new", [1, {"a": 2}]),
        (["--model.model_config.rope_scaling.type", "yarn"],
         "model.model_config.rope_scaling", {"factor": 2, "type": "yarn"}),
        (["--parallel.parallel_mode", "1"], "parallel.parallel_mode", 1),
        (["--parallel.parallel_mode", "STAND_ALONE"], "parallel.parallel_mode", "STAND_ALONE"),
        (["--generation.top_k", "3"], "generation_config.top_k", 3),
        (["--train_dataset.data_loader.dataset_files", "[a, b]"],
         "train_dataset.data_loader.paths", ["a", "b"]),
        (["--train_dataset.data_loader.dataset_files", "a,b"],
         "train_dataset.data_loader.paths", ["a,b"]),
        # --options, done right
        (["--options", "runner_config.sink_mode=True"],
         "runner_config.sink_mode", True),
        (["--options", "runner_config.sink_mode=False", "seed=3"],
         "runner_config.sink_mode", False),
        (["--options", "optimizer.betas=0.8,0.9"], "optimizer.betas", [0.8, 0.9]),
        (["--options", "optimizer.betas=(0.8,0.9)"], "optimizer.betas", [0.8, 0.9]),
        (["--options", "output_dir=a,b=c"], "output_dir", "a,b=c"),
        (["--options", "model.model_config.x=1,2"], "model.model_config.x", [1, 2]),
        # Hydra's grammar
        (["optimizer.eps=1e-4"], "optimizer.eps", 1e-4),
        (["optimizer.betas=[0.8,0.9]"], "optimizer.betas", [0.8, 0.9]),
        (["output_dir='a, b'"], "output_dir", "a, b"),
        (["output_dir=/data/x:y"], "output_dir", "/data/x:y"),
        (["runner_config.max_steps=null"], "runner_config.max_steps", None),
        (["lr_schedule={type: ConstantWarmUpLR, warmup_steps: 3}"],
         "lr_schedule.type", "ConstantWarmUpLR"),
        (["callbacks.1.prefix=x"], "callbacks.1.prefix", "x"),
        (["callbacks.0={type: EvalCallBack}"], "callbacks.0.type", "EvalCallBack"),
        (["+callbacks={type: EvalCallBack}"], "callbacks.2.type", "EvalCallBack"),
        (["+callbacks=[{type: EvalCallBack}]"], "callbacks.2.type", "EvalCallBack"),
        (["+trackers=wandb", "+trackers=aim"], "trackers", ["wandb", "aim"]),
        (["train_dataset.data_loader=[{dataset_dir: a}]", "train_dataset.data_loader.0.weight=0.3"],
         "train_dataset.data_loader.0.weight", 0.3),
        (["train_dataset.data_loader=[{dataset_dir: a}]",
          "--train_dataset.data_loader.0.name", "7"],
         "train_dataset.data_loader.0.name", "7"),
        (["train_dataset.data_loader=[{dataset_dir: a}]",
          "+train_dataset.data_loader={dataset_dir: b, epochs: 2}"],
         "train_dataset.data_loader.1.epochs", 2.0),
        (["+model.model_config.attention_bias=true"], "model.model_config.attention_bias", True),
        (["+context.anything=1"], "context.anything", 1),
        (["~optimizer.eps"], "optimizer.eps", 1e-8),
        (["~optimizer.eps=1e-6"], "optimizer.eps", 1e-8),
        (["~callbacks.0"], "callbacks.0.prefix", "a"),
        (["~model.model_config.rope_scaling"], "model.model_config", {"type": "Qwen3Config"}),
        (["seed=3", "~seed"], "seed", 1),
        # order
        (["seed=3", "--options", "seed=4"], "seed", 3),
        (["--seed", "5", "seed=6"], "seed", 6),
        (["seed=6", "--seed", "5"], "seed", 6),
    ],
)  # fmt: skip
def test_overrides(workspace: Path, words: list[str], key: str, expected: Any) -> None:
    result = resolved(BASE, *words)
    assert value(result, key) == expected
    assert type(value(result, key)) is type(expected)


SAMPLES: dict[str, list[tuple[list[str], Any]]] = {
    "text": [(["a b,c=[d] {e}: 'f' \"g\" #h"], "a b,c=[d] {e}: 'f' \"g\" #h"), (["12"], "12")],
    "int": [(["7"], 7), (["0"], 0)],
    "bool": [(["True"], True), (["false"], False)],
    "switch": [(["True"], True), (["false"], False)],
    "bool or text": [(["True"], True), (["CKP_rank_0-1_10"], "CKP_rank_0-1_10")],
    "texts": [(["I love Beijing, because", "1"], ["I love Beijing, because", "1"])],
}
CHOICES: dict[str, tuple[str, Any]] = {
    "run_mode": ("eval", "eval"),
    "device_target": ("CPU", "CPU"),
    "mode": ("1", 1),
}
AT_LEAST_ONE = {"epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "num_samples",
                "transform_process_num", "predict_batch_size"}  # fmt: skip
MOVED = {"model.model_config.do_sample": "generation_config.do_sample"}
SECTIONS = "train_dataset: {data_loader: {type: TextDataLoader, dataset_dir: x}}\n"


@pytest.mark.parametrize("name", FLAGS)
def test_every_value_of_a_flag_arrives_as_it_was_written(workspace: Path, name: str) -> None:
    """X10 of the reference's acceptance behaviours, with a space and with an equals sign."""
    flag = FLAGS[name]
    for words, expected in SAMPLES[flag.type]:
        if name in CHOICES:
            words, expected = [CHOICES[name][0]], CHOICES[name][1]
        if name in AT_LEAST_ONE and expected == 0:
            continue
        ways = [[f"--{name}", *words]] + [[f"--{name}={words[0]}"]] * (flag.type != "texts")
        for way in ways:
            Path("x.yaml").write_text(BASE + SECTIONS)
            result = resolve("x.yaml", None if name == "run_mode" else "train", overrides=way)
            refused = [str(problem) for problem in result.problems]
            if refused:  # by name, never dropped
                assert all("not built yet" in text and f"--{name}" in text for text in refused)
                continue
            place = MOVED.get(flag.targets[0], flag.targets[0])
            found = value(result, place)
            assert (found, type(found)) == (expected, type(expected)), way


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (["optimizer.eps.x=1"], "`optimizer.eps` = 1e-06"),
        (["callbacks.first.prefix=x"], "`first`"),
        (["~callbacks.4"], "`callbacks.4`"),
        (["~optimizer.eps=3"], "1e-06"),
        (["+seed=3"], "`seed`"),
        (["+nothing.x=3"], "`nothing.x`"),
        (["+callbacks.1.prefx=3"], "did you mean `callbacks.1.prefix`?"),
        (["seed=choice(1,2)"], "`seed=choice(1,2)`"),
        (["seed@x=1"], "`seed@x=1`"),
        (["--options", "seed"], "`seed`"),
        (["--options"], "`--options`"),
        (["--train_dataset_dri", "x"], "did you mean `--train_dataset_dir`?"),
        (["--check_config=perhaps"], "`--check_config` = 'perhaps'"),
        (["--optimizer", "fast"], "optimizer = 'fast'"),
        (["--train_dataset", "--seed", "3"], "`--train_dataset`"),
        (["--optimizer.betas", "0.9"], "optimizer.betas = '0.9'"),
    ],
)
def test_refused(workspace: Path, words: list[str], subject: str) -> None:
    Path("x.yaml").write_text(BASE)
    found = [str(problem) for problem in resolve("x.yaml", "train", overrides=words).problems]
    assert any(subject in text for text in found), found
    assert all(text.startswith("command line") for text in found)
    messages.check("command line", " ".join(words), "\n".join(found))


def test_no_message_of_hydra_is_shown(workspace: Path) -> None:
    Path("x.yaml").write_text(BASE)
    for word in ("a.b=[", "=3", "a b=3", "~", "+=1", "x=${y", "x=a=b", "a..b=1", "."):
        result = resolve("x.yaml", "train", overrides=[word] if word != "." else [".=1"])
        text = "\n".join(map(str, result.problems))
        assert result.problems, word
        for phrase in ("hydra", "LexerNoViableAlt", "mismatched", "extraneous", "struct"):
            assert phrase not in text.replace("Hydra's grammar", "").lower(), (word, text)


def test_switches() -> None:
    line = parse(["--config", "x", "--check_config", "--print_config", "a=1", "--help"])
    assert (line.check_config, line.print_config, line.help) == (True, True, True)
    assert [assignment.key for assignment in line.overrides] == ["a"]


def test_values_that_look_like_numbers_or_flags() -> None:
    line = parse(["--data_skip_steps", "-1", "--predict_data=--x", "--output_dir=-"])
    assert line.overrides[0].text == "-1"
    assert [assignment.text for assignment in line.flags] == ["--x", "-"]
    assert not line.problems


def test_rules_name_the_place_on_the_command_line(workspace: Path) -> None:
    result = resolve("right.yaml", "train", {"train_dataset_dir": "nowhere"})
    (problem,) = check(result.config, result.provenance, world=1)
    assert str(problem).startswith("command line: --train_dataset_dir: train_dataset.data_loader")


def test_a_misspelt_switch_is_not_asked_for_a_value() -> None:
    (problem,) = parse(["--config", "x.yaml", "--prepare_dta"]).problems
    assert "`--prepare_data`" in problem.nearest
    assert not problem.advice
    (problem,) = parse(["--config", "x.yaml", "--max_steps"]).problems
    assert "`--max_steps value`" in problem.advice
