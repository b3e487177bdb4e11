"""HFDataLoader of MindFormers in the keys of this launcher: handlers, their arguments, packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.config import rules
from launcher.config.command_line import parse
from launcher.config.resolve import Resolved, read_tree, resolve_command_line
from launcher.config.yaml_reader import read_text

ALPACA = "{type: AlpacaInstructDataHandler, seq_length: 64}"


def read(loader: str, more: str = "") -> Resolved:
    text = f"run_mode: train\n{more}train_dataset:\n  data_loader: {{{loader}}}\n"
    return read_tree(read_text(text, "x.yaml"))


def hf(handler: str, more: str = "") -> str:
    return f"type: HFDataLoader, path: json, data_files: a.json{more}, handler: [{handler}]"


PROMPT: dict[str, Any] = {
    "type": "InstructionDataLoader", "format": "alpaca", "prompt_template": "mindformers_alpaca",
    "shuffle": False, "path": "json", "data_files": "a.json", "transforms": None,
}  # fmt: skip

TRANSLATED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "the template of 2026": (
        hf("{type: take, n: 20}, {type: AlpacaInstructDataHandler, seq_length: 64, padding: False, "
           "tokenizer: {trust_remote_code: True, padding_side: right}}, "
           "{type: PackingHandler, seq_length: 64, pack_strategy: pack}"),
        {**PROMPT, "transforms": [{"type": "take", "n": 20}]},
        {"seq_length": 64, "packing": True, "packing_strategy": None},
    ),
    "one handler": (hf(ALPACA), PROMPT, {"seq_length": 64, "packing": False}),
    "a handler that is no list": (
        f"type: CommonDataLoader, path: json, data_files: a.json, handler: {ALPACA}", PROMPT, {},
    ),
    "code": (
        hf("{type: CodeAlpacaInstructDataHandler, seq_length: 8}"),
        {**PROMPT, "prompt_template": "mindformers_code_alpaca"}, {"seq_length": 8},
    ),
    "the older way to pack": (
        hf(f"{ALPACA}, {{type: PackingHandler, seq_length: 64}}",
           ", packing: pack, adaptor_config: {compress_mask: True, eod_pad_length: 64}"),
        PROMPT, {"packing": True, "packing_strategy": None},
    ),
    "cut": (
        hf(f"{ALPACA}, {{type: PackingHandler, pack_strategy: truncate, seq_length: 64}}"),
        PROMPT, {"packing": True, "packing_strategy": "concatenate"},
    ),
    "columns of other names": (
        hf("{type: AlpacaInstructDataHandler, seq_length: 8, prompt_key: question, "
           "input_key: input, output_key: answer, output_columns: [input_ids], is_dynamic: True, "
           "ignore_token_id: -100, pad_token_id: 0}"),
        {**PROMPT, "column_map": {"instruction": "question", "output": "answer"}}, {},
    ),
    "packing that shuffles": (
        hf(f"{ALPACA}, {{type: PackingHandler, seq_length: 64, dataset_shuffle: True, seed: 42}}"),
        {**PROMPT, "shuffle": True}, {"packing": True},
    ),
    "steps alone": (
        hf("{type: shuffle, seed: 3}, {type: skip, n: 2}"),
        {"type": "HFDataLoader", "transforms": [{"type": "shuffle", "seed": 3},
                                                {"type": "skip", "n": 2}]},
        {"packing": False},
    ),
    "shuffle that is written": (hf(ALPACA, ", shuffle: True"), {**PROMPT, "shuffle": True}, {}),
    "a configuration by name": (
        "type: HFDataLoader, path: hub, name: zh", {"path": "hub", "subset": "zh"}, {},
    ),
    "no handler": (
        "type: HFDataLoader, path: json, data_files: a, handler: null, packing: null, split: null",
        {"type": "HFDataLoader", "transforms": None, "shuffle": None}, {},
    ),
    "what only a hub or a disk needs": (
        "type: HFDataLoader, path: json, data_files: a, revision: main, num_proc: 4, "
        "trust_remote_code: True, column_names: [input_ids], use_broadcast_data: False",
        {"path": "json"}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_loader_is_translated(name: str) -> None:
    loader, keys, dataset_keys = TRANSLATED[name]
    resolved = read(loader)
    assert not resolved.problems, resolved.problems
    section = resolved.config.train_dataset
    assert section is not None
    assert {key: getattr(section.data_loader, key) for key in keys} == keys
    assert {key: getattr(section, key) for key in dataset_keys} == dataset_keys


def test_the_tokenizer_of_a_handler_is_that_of_the_run() -> None:
    handler = (
        "{type: AlpacaInstructDataHandler, seq_length: 8, tokenizer: {pretrained_model_dir: t}}"
    )
    resolved = read(hf(handler))
    assert resolved.config.processor.tokenizer.pretrained_model_dir == "t"
    more = "processor: {tokenizer: {pretrained_model_dir: u}}\n"
    (problem,) = read(hf(handler), more).problems
    assert "processor.tokenizer.pretrained_model_dir" in str(problem)
    assert "'t'" in str(problem)
    assert "'u'" in str(problem)


def test_every_key_that_is_gone_has_a_reason() -> None:
    resolved = read(TRANSLATED["the template of 2026"][0])
    reasons = {change.key.partition("data_loader.")[2]: change.why for change in resolved.changes}
    assert set(reasons) == {
        "handler", "handler.0", "handler.1.seq_length", "handler.1.padding", "handler.1.type",
        "handler.1.tokenizer.trust_remote_code", "handler.1.tokenizer.padding_side",
        "handler.2.seq_length", "handler.2.pack_strategy", "handler.2.type",
    }  # fmt: skip
    assert all(reasons.values())
    assert "shifted once" in reasons["handler.1.type"]


def test_files_on_the_command_line_are_read_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loader = "{type: HFDataLoader, path: some/data, name: zh, data_files: a.json}"
    Path("x.yaml").write_text(f"run_mode: train\ntrain_dataset: {{data_loader: {loader}}}\n")
    line = ["--config", "x.yaml", "--train_dataset_dir", "mine"]
    resolved = resolve_command_line(parse(line))
    assert resolved.config.train_dataset is not None
    assert resolved.config.train_dataset.loaders["data_loader"].paths == ["mine"]
    reasons = {change.key: change.why for change in resolved.changes}
    gone = {f"train_dataset.data_loader.{name}" for name in ("path", "name", "data_files")}
    assert {key for key, why in reasons.items() if "command line" in why} == gone


REFUSED: dict[str, tuple[str, list[str]]] = {
    "a handler that is misspelt": (
        hf("{type: AlpacaInstructDataHander, seq_length: 8}"),
        ["handler.0.type = 'AlpacaInstructDataHander'", "mean `AlpacaInstructDataHandler`?"],
    ),
    "a handler that is not built": (
        hf("{type: AdgenInstructDataHandler}"), ["AdgenInstructDataHandler", "not built yet"],
    ),
    "an unknown argument": (
        hf("{type: AlpacaInstructDataHandler, seq_lenth: 8}"),
        ["handler.0.seq_lenth = 8", "not an argument of AlpacaInstructDataHandler", "`seq_length`"],
    ),
    "a strategy": (
        hf(f"{ALPACA}, {{type: PackingHandler, seq_length: 64, pack_strategy: truncat}}"),
        ["handler.1.pack_strategy = 'truncat'", "did you mean `truncate`?"],
    ),
    "two lengths": (
        hf(f"{ALPACA}, {{type: PackingHandler, seq_length: 32, pack_strategy: pack}}"),
        ["handler.1.seq_length` = 32", "`train_dataset.seq_length` = 64"],
    ),
    "a step after tokens": (
        hf(f"{ALPACA}, {{type: take, n: 2}}"), ["handler.1.type = 'take'", "Move `take` before"],
    ),
    "two prompts": (
        hf(f"{ALPACA}, {{type: CodeAlpacaInstructDataHandler, seq_length: 64}}"),
        ["handler", "one prompt"],
    ),
    "labels that are ignored otherwise": (
        hf("{type: AlpacaInstructDataHandler, seq_length: 8, ignore_token_id: 0}"),
        ["handler.0.ignore_token_id = 0", "Nearest: -100"],
    ),
    "a handler that is a number": ("type: HFDataLoader, path: json, handler: 3",
                                   ["handler = 3", "a list of steps"]),
    "an adaptor": (
        "type: HFDataLoader, path: json, adaptor_config: {compres_mask: True}",
        ["adaptor_config.compres_mask = True", "`compress_mask`"],
    ),
    "handlers of another loader": (
        "type: TextDataLoader, dataset_dir: x, handler: [{type: take, n: 2}]",
        ["handler = [{", "It belongs to HFDataLoader"],
    ),
    "another function": (
        "type: HFDataLoader, path: json, load_func: load_from_dik",
        ["load_func = 'load_from_dik'", "did you mean `load_from_disk`?"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_one_problem_with_its_place(name: str) -> None:
    loader, words = REFUSED[name]
    problems = read(loader).problems
    assert len(problems) == 1, problems
    assert problems[0].where == "x.yaml:3"
    for word in words:
        assert word in str(problems[0])


def test_a_wrong_step_is_reported_as_it_is_written(tmp_path: Path) -> None:
    Path(tmp_path / "a.json").write_text("[]")
    loader = hf(f"{{type: take, m: 2}}, {{type: mapp}}, {ALPACA}").replace(
        "a.json", str(tmp_path / "a.json")
    )
    resolved = read(loader)
    assert not resolved.problems
    found = rules.check(resolved.config, resolved.provenance, world=1, bad_keys=resolved.bad_keys)
    steps = [str(problem) for problem in found if "handler" in str(problem)]
    assert [step.partition(" = ")[0] for step in steps] == [
        f"x.yaml:3: train_dataset.data_loader.handler.{key}" for key in ("0.m", "0", "1.type")
    ]


def test_handlers_of_the_sources_of_a_mixture() -> None:
    second = f"{{type: HFDataLoader, name: b, path: json, data_files: b, handler: [{ALPACA}]}}"
    text = (
        "run_mode: train\ntrain_dataset:\n  data_loader:\n"
        f"  - {{type: TextDataLoader, name: a, dataset_dir: x}}\n  - {second}\n"
    )
    resolved = read_tree(read_text(text, "x.yaml"))
    assert not resolved.problems
    section = resolved.config.train_dataset
    assert section is not None
    assert isinstance(section.data_loader, list)
    first, last = section.data_loader
    assert (first.type, first.name) == ("TextDataLoader", "a")
    assert (last.type, last.name, last.subset) == ("InstructionDataLoader", "b", "")
    assert last.prompt_template == "mindformers_alpaca"
    assert section.seq_length == 64
