"""The export of a run: opened in transformers, with tokenizer, template, settings and card."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launcher.errors import UserError
from launcher.tools.export import main as export
from launcher.weights import export_directory
from launcher.weights.offline.directory import older_spellings, special_token_ids
from tests.ranks import run_job
from tests.workshop import Workshop

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHATS = [
    {"messages": [{"role": "user", "content": f"Number {n}?"},
                  {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(40)
]  # fmt: skip
EVALUATED: dict[str, Any] = {
    "do_eval": True,
    "eval_step_interval": 2,
    "eval_dataset": {
        "data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus/bisect.py"},
        "seq_length": 32,
        "packing": True,
    },
}


@pytest.fixture(scope="module")
def trained(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A run on conversations by two tensor-parallel ranks, with a template and settings of its
    own."""
    workshop = materials.copy_to(tmp_path_factory.mktemp("export"))
    (workshop.folder / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    name = workshop.yaml(
        **EVALUATED,
        chat_template=TEMPLATE,
        generation_config={"max_new_tokens": 7, "repetition_penalty": 1.25},
        model={"model_config": {"tie_word_embeddings": False}},
        train_dataset={"data_loader": {"type": "InstructionDataLoader", "dataset_dir": None,
                                       "dataset_files": "chats.jsonl"},
                       "seq_length": 96, "packing": False},
        parallel_config={"model_parallel": 2},
        runner_config={"max_steps": 6, "batch_size": 4},
        callbacks=[{"type": "CheckpointMonitor", "save_checkpoint_steps": 2, "keep_best": True}],
    )  # fmt: skip
    result = run_job(["--config", name, "--run_mode", "train"], workshop.folder, 2)
    assert result.code == 0, result.stderr + result.stdout
    (workshop.folder / "train.log").write_text(result.stdout)
    assert run_export(workshop, "hf") == 0
    return workshop


def run_export(workshop: Workshop, target: str, *more: str, source: str = "") -> int:
    place = workshop.folder / (source or "output/checkpoint")
    return export(["--load_checkpoint", str(place), "--output_dir",
                   str(workshop.folder / target), *more])  # fmt: skip


def test_transformers_continues_prompts_as_predict_does(trained: Workshop) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained.folder / "hf"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["def bisect(", "Number 7?"]
    result = run_job(
        ["--config", "output/resolved.yaml", "--run_mode", "predict", "--output_dir", "said",
         "--load_checkpoint", "output/checkpoint", "chat_template=none", "--predict_data", *prompts,
         "parallel_config.model_parallel=1"],
        trained.folder,
    )  # fmt: skip
    assert result.code == 0, result.stderr
    rows = [json.loads(line) for line in
            (trained.folder / "said/text_generation_result.jsonl").open()]  # fmt: skip
    for prompt, row in zip(prompts, rows, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        text = model.generate(**ids)[0]
        assert text[ids["input_ids"].shape[1] :].tolist() == row["tokens"]
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config.repetition_penalty == 1.25


def test_the_template_of_the_run_is_that_of_the_directory(trained: Workshop) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained.folder / "hf")
    shown = tokenizer.apply_chat_template(CHATS[3]["messages"][:1], tokenize=False,
                                          add_generation_prompt=True)  # fmt: skip
    assert shown == "[user] Number 3?<|endoftext|>[assistant] "
    assert not AutoTokenizer.from_pretrained(trained.folder / "tokenizer").chat_template


def test_weights_are_those_of_the_save_in_shards_and_another_dtype(trained: Workshop) -> None:
    assert run_export(trained, "cast", "--dtype", "bfloat16", "--max_shard_size", "20KB") == 0
    folder = trained.folder / "cast"
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    cast = {name: value for file in files for name, value in load_file(file).items()}
    (exact_file,) = (trained.folder / "hf").glob("model-*.safetensors")
    exact = load_file(exact_file)
    assert cast.keys() == exact.keys()
    assert all(torch.equal(cast[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_the_card_says_how_the_model_was_trained(trained: Workshop) -> None:
    text = (trained.folder / "hf/README.md").read_text()
    front, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["library_name"] == "transformers"
    state = json.loads((trained.folder / "output/checkpoint/state/CKP-1_6.json").read_text())
    rows = trained.rows()
    loss = next(row["loss"] for row in rows if row["step"] == 6 and "loss" in row)
    evaluation = [row for row in rows if "eval_loss" in row][-1]
    for fact in (
        "step 6, save `CKP-1_6`, of a run that began with random weights.",
        "| architecture | Qwen3ForCausalLM |",
        f"| tokens | {state['consumed_tokens']:,} |",
        f"| loss at this step | {loss:.4f} |",
        "| ranks | 2 ranks (tp 2) |",
        "| train_dataset | chats.jsonl | InstructionDataLoader | 40 | 24 |",
        f"| 6 | {evaluation['eval_loss']:.4f} |",
        "repetition_penalty 1.25",
        state["versions"]["torch"],
    ):
        assert fact in body, fact
    configuration = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert configuration["runner_config"]["max_steps"] == 6
    assert configuration["callbacks"][0]["keep_best"] is True
    assert configuration["chat_template"] == TEMPLATE


def test_a_run_says_at_its_end_how_to_chat_and_export(trained: Workshop) -> None:
    line = (trained.folder / "train.log").read_text().splitlines()[-1]
    first, second = line.removeprefix("next: ").split("   or: ")
    assert second == (
        "python -m launcher.tools.export --load_checkpoint output/checkpoint --output_dir output/hf"
    )
    launch = "torchrun --nproc_per_node 2 run.py "
    assert first.startswith(launch)
    words = [*shlex.split(first.removeprefix(launch)), "generation_config.max_new_tokens=2"]
    result = run_job(words, trained.folder, 2)  # the standard input has no question
    assert result.code == 0, result.stderr
    assert "chat with" in result.stdout


@pytest.mark.parametrize("how", ["--best", "--file_suffix", "rank file"])
def test_another_save_is_chosen(trained: Workshop, how: str) -> None:
    root = trained.folder / "output/checkpoint"
    record = json.loads((root / "best.json").read_text())
    label = record["save"] if how == "--best" else "CKP-1_4"
    more, source = {
        "--best": (["--best"], ""),
        "--file_suffix": (["--file_suffix", "1_4"], ""),
        "rank file": ([], "output/checkpoint/rank_1/CKP_rank_1-1_4.safetensors"),
    }[how]
    assert run_export(trained, "other", *more, "--overwrite", source=source) == 0
    assert f"save `{label}`" in (trained.folder / "other/README.md").read_text()


def test_complete_weights_are_exported_again(trained: Workshop) -> None:
    assert run_export(trained, "again", source="hf") == 0
    first, second = trained.folder / "hf", trained.folder / "again"
    for path in first.iterdir():
        if path.name != "README.md":
            assert (second / path.name).read_bytes() == path.read_bytes(), path.name
    assert "records no training run" in (second / "README.md").read_text()


def test_a_run_with_a_tokenizer_of_chat_and_no_template_gets_the_one_it_was_trained_with(
    trained: Workshop,
) -> None:
    from launcher.data.templates import DEFAULT_CHAT_TEMPLATE

    workshop = trained
    config = yaml.safe_load((workshop.folder / "run.yaml").read_text())
    config.pop("chat_template")
    config |= {"output_dir": "plain", "parallel_config": {}, "callbacks": [], "do_eval": False}
    config["runner_config"]["max_steps"] = 1
    (workshop.folder / "plain.yaml").write_text(yaml.safe_dump(config))
    result = run_job(["--config", "plain.yaml", "--run_mode", "train"], workshop.folder)
    assert result.code == 0, result.stderr
    assert run_export(workshop, "plain_hf", source="plain/checkpoint") == 0
    assert (workshop.folder / "plain_hf/chat_template.jinja").read_text() == DEFAULT_CHAT_TEMPLATE


def test_a_missing_tokenizer_is_said_and_can_be_given(
    trained: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained.folder / "bare"
    model.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"):
        (model / name).write_bytes((trained.folder / "hf" / name).read_bytes())
    assert run_export(trained, "without", source="bare") == 0
    assert "--tokenizer DIR" in capsys.readouterr().out
    assert "tokenizer is not included" in (trained.folder / "without/README.md").read_text()
    tokenizer = str(trained.folder / "tokenizer")
    assert (
        run_export(trained, "without", "--overwrite", "--tokenizer", tokenizer, source="bare") == 0
    )
    assert (trained.folder / "without/tokenizer.json").is_file()
    settings = json.loads((trained.folder / "without/generation_config.json").read_text())
    assert settings == {"eos_token_id": 0, "pad_token_id": 1}


def adapter(folder: Path) -> Path:
    (folder / "adapter_config.json").write_text("{}")
    return folder


def empty(folder: Path) -> Path:
    return folder


def without_config(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    return folder


def adapter_weights(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"a.lora_A.weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (empty, {}, "holds no weights"),
        (adapter, {}, "launcher.tools.merge_lora"),
        (adapter_weights, {}, "launcher.tools.merge_lora"),
        (without_config, {}, "has no config.json"),
        (without_config, {"best": True}, "holds complete weights"),
    ],
    ids=["nothing", "adapter", "tensors of an adapter", "no config", "best of complete weights"],
)
def test_what_cannot_be_exported_is_named(
    tmp_path: Path, make: Any, options: dict[str, Any], expected: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(UserError, match=expected):
        export_directory(make(source), tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


def test_existing_folders_and_inputs_are_not_overwritten(
    trained: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained.folder / "mine").mkdir(exist_ok=True)
    (trained.folder / "mine/notes.txt").write_text("keep me")
    assert run_export(trained, "mine") == 2
    assert "--overwrite" in capsys.readouterr().err
    for target, *more in (["output"], ["mine"], ["tokenizer", "--tokenizer", "tokenizer"]):
        words = [str(trained.folder / word) if word == "tokenizer" else word for word in more]
        assert run_export(trained, target, "--overwrite", *words) == 2, target
    assert (trained.folder / "tokenizer/tokenizer.json").is_file()
    assert (trained.folder / "mine/notes.txt").read_text() == "keep me"
    capsys.readouterr()
    (trained.folder / "unrated").mkdir(exist_ok=True)
    saved = trained.folder / "output/checkpoint"
    (trained.folder / "unrated/rank_0").symlink_to(saved / "rank_0")
    (trained.folder / "unrated/rank_1").symlink_to(saved / "rank_1")
    assert run_export(trained, "new", "--best", source="unrated") == 2
    assert "best.json" in capsys.readouterr().err


def test_older_spellings_of_rotary_embeddings() -> None:
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    assert older_spellings({"rope_parameters": scaled}) == {
        "rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }  # fmt: skip
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert older_spellings({"rope_parameters": partial}) == {
        "rope_theta": 1e4, "partial_rotary_factor": 0.5,
    }  # fmt: skip
    assert older_spellings({"rope_parameters": partial, "rope_theta": 1e4}).keys() == {
        "partial_rotary_factor"
    }
    assert older_spellings({"rope_parameters": {"full_attention": partial}}) == {}
    assert older_spellings({"rope_theta": 1e4}) == {}


def test_a_tokenizer_that_is_given_replaces_that_of_the_run(trained: Workshop, tmp_path) -> None:
    given = tmp_path / "given"
    shutil.copytree(trained.folder / "tokenizer", given)
    content = json.loads((given / "tokenizer_config.json").read_text())
    (given / "tokenizer_config.json").write_text(json.dumps(content | {"model_max_length": 77}))
    assert run_export(trained, "given", "--tokenizer", str(given), source="hf") == 0
    exported = json.loads((trained.folder / "given/tokenizer_config.json").read_text())
    assert exported["model_max_length"] == 77


def test_special_tokens_of_every_form_of_a_tokenizer(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "bos_token": None,
            "added_tokens_decoder": {"9": {"content": "<pad>"}},
        },
        "special_tokens_map.json": {"bos_token": "<s>"},
        "tokenizer.json": {
            "model": {"vocab": {"</s>": 2, "x": 3}}, "added_tokens": [{"id": 2, "content": "</s>"}],
        },
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert special_token_ids(tmp_path) == {"eos_token": 2, "pad_token": 9}
    assert special_token_ids(tmp_path / "nothing") == {}
