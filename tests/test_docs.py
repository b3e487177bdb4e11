"""Every command and every YAML sample of the documentation runs, in the order of its page."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import runpy
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from launcher.predict.chat import HELP
from launcher.tools.launch import read
from tests.ranks import run_job
from tests.workshop import VOCABULARY, Workshop

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED_SAMPLES = re.compile(r"^```yaml\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.(?:yaml|py|jsonl))\n")


@pytest.fixture(scope="module")
def folder(materials: Workshop, tmp_path_factory) -> Path:
    """The files the pages speak of: my_text, my_tokenizer, my_model, my_weights.ckpt, alpaca.json
    and questions.csv."""
    workshop = materials.copy_to(tmp_path_factory.mktemp("docs"))
    folder = workshop.folder
    (folder / "corpus").rename(folder / "my_text")
    (folder / "tokenizer").rename(folder / "my_tokenizer")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "my_model")
    torch.save(model.state_dict(), folder / "my_weights.ckpt")
    AutoTokenizer.from_pretrained(folder / "my_tokenizer").save_pretrained(folder / "my_model")
    samples = [
        {"instruction": "What is a slipway?", "input": "", "output": "A ramp for ships."},
        {"instruction": "Add the numbers.", "input": "1 and 2", "output": "3"},
    ]
    (folder / "alpaca.json").write_text(json.dumps(samples * 4))
    rows = "".join(f"What is {n}?,none,It is {n}.\n" for n in range(20))
    (folder / "questions.csv").write_text(f"question,output,answer.text\n{rows}")
    return folder


def run_here(words: list[str], folder: Path) -> None:
    """An offline tool, or a Python sample, with `folder` as the current directory."""
    with contextlib.chdir(folder):
        if words[1] == "-m":
            assert importlib.import_module(words[2]).main(words[3:]) == 0, words
        else:
            runpy.run_path(words[1], run_name="__main__")


def run_line(line: str, folder: Path) -> None:
    words = shlex.split(line)
    if words[0] == "python" and words[1] != "run.py":
        run_here(words, folder)
        return
    if words[:2] == ["bash", "msrun.sh"]:  # real ones are in test_msrun.py
        launch = read(words[2:])
        result = run_job(launch.arguments, folder, launch.workers)
        assert result.code == 0, f"{line}\n{result.stderr}"
        return
    world = 1
    if words[0] == "torchrun":
        world, words = int(words[2]), ["python", *words[3:]]
    assert words[:2] == ["python", "run.py"], f"the test does not know how to run: {line}"
    result = run_job(words[2:], folder, world)
    assert result.code == 0, f"{line}\n{result.stderr}"
    print(result.stdout)


def run_page(name: str, folder: Path, endings: Mapping[str, str] | None = None) -> int:
    """Write the named samples of a page, run its commands; how many those were. `endings`: last
    words of commands that are replaced by others."""
    ran = 0
    for language, text in FENCE.findall((ROOT / "docs" / name).read_text()):
        named = NAMED.match(text)
        if named:
            lines = text.removeprefix(named[0]) if language == "json" else text
            (folder / named[1]).write_text(lines)
        elif language == "bash":
            for line in text.strip().splitlines():
                start, _, last = line.rpartition(" ")
                run_line(f"{start} {(endings or {}).get(last, last)}", folder)
                ran += 1
        elif language != "text":
            raise AssertionError(f"a {language} sample without a name: {text[:40]}")
    return ran


def test_layouts_page(folder: Path) -> None:
    assert run_page("layouts.md", folder) >= 9
    losses = {
        path.parent.name: [json.loads(line).get("loss") for line in path.open()][:4]
        for path in folder.glob("output/*/metrics.jsonl")
    }
    for layout in ("tensor", "pipeline", "zero", "context", "recompute"):
        assert losses[layout] == pytest.approx(losses["layout"], rel=1e-4), layout
    name = "text_generation_result.jsonl"
    texts = [(folder / "output" / of / name).read_text() for of in ("predict_one", "predict_tp_pp")]
    assert texts[0] == texts[1]


def test_generation_page(folder: Path) -> None:
    assert run_page("generation.md", folder) >= 1
    texts = (folder / "output/settings/text_generation_result.jsonl").read_text().splitlines()
    assert len({json.loads(line)["text"] for line in texts}) == 3


def test_cuda_page(folder: Path) -> None:
    assert run_page("cuda.md", folder) == 1
    rows = (folder / "output/cuda/metrics.jsonl").read_text().splitlines()
    assert sum("loss" in json.loads(row) for row in rows) == 4


def test_profiling_page(folder: Path) -> None:
    assert run_page("profiling.md", folder) == 1
    files = {path.name for path in (folder / "output/profiled/profile/rank_0").iterdir()}
    assert files == {"steps_3-4.trace.json.gz", "steps_3-4.operations.txt"}


def test_tokens_page(folder: Path) -> None:
    assert run_page("tokens.md", folder) >= 3
    for name in ("megatron", "stream"):
        rows = (folder / f"output/{name}/metrics.jsonl").read_text().splitlines()
        assert sum("loss" in json.loads(row) for row in rows) == 4


def test_preference_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_page("preference.md", folder) == 6
    rows = {
        name: [json.loads(line) for line in (folder / f"output/{name}/metrics.jsonl").open()]
        for name in ("dpo", "simpo", "kto")
    }
    assert all(sum("loss" in row for row in found) == 6 for found in rows.values())
    assert rows["dpo"][-1]["eval_rewards/margins"] > 0
    evaluated = json.loads((folder / "output/dpo/eval_result.json").read_text())
    last = {key: value for key, value in rows["dpo"][-1].items() if key.startswith("eval_")}
    assert evaluated == pytest.approx(last, rel=1e-4, abs=1e-5)


def test_training_page(folder: Path) -> None:
    assert run_page("training.md", folder) >= 12
    log = (folder / "output/callbacks/log/rank_0/info.log").read_text()
    assert "step 10 has seen 40 samples" in log
    two, alone = (
        [json.loads(line)["loss"] for line in (folder / f"output/{name}/metrics.jsonl").open()]
        for name in ("two", "pretrain")
    )
    assert two == pytest.approx(alone, rel=1e-4)


def test_data_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = dict(NAMED_SAMPLES.findall((ROOT / "docs/training.md").read_text()))
    (folder / "pretrain.yaml").write_text(named["pretrain.yaml"])
    assert run_page("data.md", folder) == 3
    page, said = (ROOT / "docs/data.md").read_text(), capsys.readouterr().out
    for text in re.findall(r"```text\n(.*?)```", page, re.DOTALL):
        for line in text.splitlines():
            assert re.sub(r"[\d,.]+", "0", line) in re.sub(r"[\d,.]+", "0", said), line
    assert (folder / "output/look/data_lengths.png").exists()


def test_chat_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_page("chat.md", folder) == 3
    page, printed = (ROOT / "docs/chat.md").read_text(), capsys.readouterr().out
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert re.sub(r"[\d.]+ s", "0 s", shown) in re.sub(r"[\d.]+ s", "0 s", printed)
    rows = [json.loads(line) for line in (folder / "output/chat/metrics.jsonl").open()]
    assert sum("loss" in row for row in rows) == 2


def test_attention_page(folder: Path) -> None:
    assert run_page("attention.md", folder) == 1
    rows = [json.loads(line) for line in (folder / "output/packed/metrics.jsonl").open()]
    assert sum("loss" in row for row in rows) == 2


def test_decoding_page(folder: Path) -> None:
    assert run_page("decoding.md", folder) == 1
    rows = (folder / "output/decoding/text_generation_result.jsonl").read_text().splitlines()
    assert len(rows) == 3


def test_adapters_page(folder: Path) -> None:
    assert run_page("adapters.md", folder) == 6
    rows = (folder / "output/adapter/metrics.jsonl").read_text().splitlines()
    assert sum("loss" in json.loads(row) for row in rows) == 6
    for name in ("output/further/adapter/adapter_model.safetensors", "merged_model/config.json",
                 "exported_adapter/adapter_config.json"):  # fmt: skip
        assert (folder / name).is_file()


def test_mixtures_page(folder: Path) -> None:
    assert run_page("mixtures.md", folder) == 2
    log = (folder / "output/mixture/log/rank_0/info.log").read_text()
    page = (ROOT / "docs/mixtures.md").read_text()
    shown = page.partition("changed since:\n")[2].partition("```")[0].splitlines()
    assert len(shown) == 4
    assert all(line in log for line in shown), log
    rows = [json.loads(line) for line in (folder / "output/mixture/metrics.jsonl").open()]
    assert [row["consumed/code"] + row["consumed/chat"] for row in rows] == list(range(4, 40, 4))


def test_streaming_page(folder: Path) -> None:
    assert run_page("streaming.md", folder) == 3
    rows = [json.loads(line) for line in (folder / "output/stream/metrics.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    log = (folder / "output/stream/log/rank_0/info.log").read_text()
    text = (ROOT / "docs/streaming.md").read_text()
    for line in re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0].splitlines():
        assert re.sub(r"\d+", "0", line) in re.sub(r"\d+", "0", log)  # the text is the library's


def test_predict_page(folder: Path) -> None:
    assert run_page("predict.md", folder) == 7
    page = (ROOT / "docs/predict.md").read_text()
    line, helps = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert helps == HELP
    assert line in (folder / "output/brief/log/rank_0/info.log").read_text()
    rows = [
        json.loads((folder / f"output/{name}/text_generation_result.jsonl").read_text())
        for name in ("brief", "text")
    ]
    assert [turn["role"] for turn in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[1]["prompt"] == "What is a slipway?"
    assert "messages" not in rows[1]
    assert not (folder / "output/chat/chat.jsonl").exists()  # nobody has asked anything


def test_checkpoints_page(folder: Path) -> None:
    assert run_page("checkpoints.md", folder) >= 3
    rows = [json.loads(line) for line in (folder / "output/saving/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 17))
    names = {path.stem for path in (folder / "output/saving/checkpoint/manifest").glob("*.json")}
    assert len(names) == 3
    log = (folder / "output/saving/log/rank_0/info.log").read_text()
    assert "in the background, training waited" in log


def test_weights_page(folder: Path) -> None:
    assert run_page("weights.md", folder) >= 20
    losses = {
        name: json.loads((folder / f"output/{name}/eval_result.json").read_text())["eval_loss"]
        for name in ("single", "several", "original", "changed", "sliced_eval", "spared_eval")
    }
    assert losses["several"] == pytest.approx(losses["single"], rel=1e-5)
    for name in ("changed", "sliced_eval", "spared_eval"):
        assert losses[name] == pytest.approx(losses["original"], rel=1e-4), name
    assert losses["original"] < losses["single"]
    copies = (
        "several/ms_safetensors/param_name_map.json",
        "changed/unified_checkpoint/config.json",
    )
    assert all((folder / "output" / copy).is_file() for copy in copies)


def test_evaluation_page(folder: Path) -> None:
    assert run_page("evaluation.md", folder) >= 4
    log = (folder / "output/evaluated/log/rank_0/info.log").read_text()
    page = (ROOT / "docs/evaluation.md").read_text()
    for line in ("step 2: eval loss", "saved step 2 as", "EarlyStopping:"):
        (shown,) = re.findall(rf"^{line}.*$", page, re.MULTILINE)
        assert re.sub(r"\d+", "0", shown) in re.sub(r"\d+", "0", log), shown
    rows = [json.loads(line) for line in (folder / "output/evaluated/metrics.jsonl").open()]
    newest = [row for row in rows if "eval_loss" in row][-1]
    for again in ("evaluated_again", "evaluated_resolved"):
        row = json.loads((folder / f"output/{again}/eval_result.json").read_text())
        assert row.items() <= newest.items()


def test_export_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_page("export.md", folder) == 5
    page, said = (ROOT / "docs/export.md").read_text(), capsys.readouterr().out
    for line in re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0].splitlines():
        assert line in said, line
    files = {path.name for path in (folder / "hf").iterdir()}
    assert files >= {"README.md", "config.json", "chat_template.jinja", "tokenizer.json",
                     "generation_config.json", "model.safetensors.index.json"}  # fmt: skip


def test_the_shipped_configurations_and_the_walk_through_them(
    materials: Workshop, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quickstart, and the page that fine-tunes its model: with the folders they name made of
    the materials, and a few steps of training."""
    workshop = materials.copy_to(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("train", "heldout"):
        (tmp_path / "data/quickstart").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/quickstart" / name).symlink_to(workshop.folder / "corpus")
    (tmp_path / "data/quickstart/tokenizer").symlink_to(workshop.folder / "tokenizer")
    short = "--max_steps 2 --eval_dataset.data_loader.num_samples 1"
    quickstart = f"python run.py --config configs/quickstart.yaml --run_mode train {short}"
    run_line(quickstart, tmp_path)
    assert "eval loss" in capsys.readouterr().out
    page = (ROOT / "docs/finetuning.md").read_text()
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} == {
        "quickstart.yaml", *re.findall(r"configs/(\S+\.yaml)", page)
    }  # fmt: skip
    shorter = f"finetune {short} --train_dataset.data_loader.num_samples 64"
    assert run_page("finetuning.md", tmp_path, {"finetune": shorter}) == 7
    printed = capsys.readouterr().out
    for line in ("  | {+def ", "trained: 299,008 parameters (6.95%)",
                 "prompts are rendered with a ChatML-like template"):  # fmt: skip
        assert line in printed
    row = json.loads((tmp_path / "output/signatures/text_generation_result.jsonl").read_text())
    assert printed.endswith(f"{row['messages'][-1]['content']}\n")
    card = (tmp_path / "output/signatures/hf/README.md").read_text()
    assert "train.jsonl" in card
    assert (tmp_path / "output/signatures/peft/adapter_config.json").is_file()


FOLDERS = "launcher|models|tests|configs|docs|benchmarks"
NAMED_FILES = re.compile(rf"(?<![\w./])((?:{FOLDERS})/[\w./-]*\w/?)")


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    named = set(NAMED_FILES.findall((ROOT / page).read_text()))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
