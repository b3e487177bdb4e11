"""What is done with an adapter after its training: predict, evaluate, train on, merge; from a
checkpoint or a directory of PEFT, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from launcher.tools import export_adapter, merge_lora
from tests.end_to_end.adapters import LORA, STEPS, lora_yaml, run_jobs, write_base
from tests.workshop import Workshop

DORA = {**LORA, "pet_type": "dora", "modules_to_save": ["embed_tokens"], "use_rslora": True}
PROMPT = ["--predict_data", "import textwrap", "--generation_config.max_new_tokens", "12"]
TP = ["--parallel_config.model_parallel", "2"]


def predict(output: str, *more: str) -> list[str]:
    return ["--config", "predict.yaml", "--run_mode", "predict", "--output_dir", output, *PROMPT,
            *more]  # fmt: skip


def evaluate(output: str, *more: str) -> list[str]:
    return ["--config", "run.yaml", "--run_mode", "eval", "--output_dir", output, *more]


def go_on(output: str, *more: str) -> list[str]:
    return ["--config", "on.yaml", "--run_mode", "finetune", "--output_dir", output, *more]


@pytest.fixture(scope="module")
def shop(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    shop = materials.copy_to(tmp_path_factory.mktemp("use"))
    write_base(shop.folder / "base", shop.folder / "tokenizer")
    corpus = {"type": "TextDataLoader", "dataset_dir": "corpus/bisect.py"}
    evaluation = {"eval_dataset": {"data_loader": corpus, "seq_length": 16, "packing": True}}
    lora_yaml(shop, "run.yaml", DORA, output_dir="run", **evaluation)
    bare = yaml.safe_load((shop.folder / "run.yaml").read_text())
    for key in ("pretrained_model_dir", "pet_config", "processor"):
        del bare[key]
    (shop.folder / "predict.yaml").write_text(yaml.safe_dump(bare))
    on = bare | {"pet_config": {"load_adapter": "run/adapter"}}
    (shop.folder / "on.yaml").write_text(yaml.safe_dump(on))
    checkpoint, peft = (["--load_checkpoint", place] for place in ("run/checkpoint", "run/adapter"))
    shop.on_one = run_jobs(shop, 1, [  # type: ignore[attr-defined]
        ["--config", "run.yaml", "--run_mode", "finetune"],
        predict("by_checkpoint", *checkpoint), predict("by_peft", *peft), evaluate("eval", *peft),
        go_on("on"), go_on("refused", "--pet_config.lora_rank", "5"),
        go_on("none", "--pet_config.load_adapter", "gone"),
    ])  # fmt: skip
    tool = ["--load_checkpoint", f"{shop.folder}/run/checkpoint"]
    assert merge_lora.main([*tool, "--output_dir", f"{shop.folder}/merged"]) == 0
    assert merge_lora.main([*tool, "--output_dir", f"{shop.folder}/base", "--overwrite"]) == 2
    assert export_adapter.main([*tool, "--output_dir", f"{shop.folder}/exported"]) == 0
    shop.on_two = run_jobs(shop, 2, [  # type: ignore[attr-defined]
        predict("tp", *peft, *TP), evaluate("eval_tp", *checkpoint, *TP), go_on("on_tp", *TP),
        predict("by_merged", "--load_checkpoint", "merged", "--pretrained_model_dir", "merged",
                *TP),
    ])  # fmt: skip
    return shop


def tokens(shop: Workshop, output: str) -> list[int]:
    file = shop.folder / output / "text_generation_result.jsonl"
    texts = [*shop.on_one, *shop.on_two]  # type: ignore[attr-defined]
    assert file.is_file(), "\n\n".join(texts)
    found: list[int] = json.loads(file.read_text().splitlines()[0])["tokens"]
    return found


@pytest.mark.parametrize("output", ["by_peft", "tp", "by_merged"])
def test_the_same_text_however_the_adapter_is_given(shop: Workshop, output: str) -> None:
    assert len(tokens(shop, output)) == 12
    assert tokens(shop, output) == tokens(shop, "by_checkpoint")


def test_the_same_evaluation_on_two_ranks(shop: Workshop) -> None:
    losses = [json.loads((shop.folder / f"{name}/eval_result.json").read_text())["eval_loss"]
              for name in ("eval", "eval_tp")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] < shop.losses("run")[0] - 0.1


def test_training_goes_on_from_an_adapter(shop: Workshop) -> None:
    assert shop.losses("on") == pytest.approx(shop.losses("on_tp"), rel=1e-5)
    assert shop.losses("on")[0] < shop.losses("run")[0] - 0.1
    for config in ("run", "on"):
        described = json.loads((shop.folder / config / "adapter/adapter_config.json").read_text())
        assert (described["r"], described["lora_alpha"], described["use_dora"]) == (2, 8, True)


def test_what_contradicts_the_files(shop: Workshop) -> None:
    *_, refused, none = shop.on_one  # type: ignore[attr-defined]
    assert "pet_config.lora_rank = 5" in refused
    assert "r = 2" in refused
    assert "pet_config.load_adapter" in none
    assert "gone" in none


def test_the_run_leaves_what_the_tool_writes(shop: Workshop) -> None:
    run, tool = (shop.folder / name for name in ("run/adapter", "exported"))
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (run / name).read_bytes() == (tool / name).read_bytes()


def test_peft_opens_it_with_the_logits_of_the_merged_model(shop: Workshop) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(shop.folder / "base")
    model = PeftModel.from_pretrained(base, shop.folder / "run/adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(shop.folder / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert Path(model.peft_config["default"].base_model_name_or_path).name == "base"
    assert (shop.folder / "merged/README.md").is_file()
    assert len(shop.losses("run")) == STEPS
