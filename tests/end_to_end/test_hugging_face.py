"""Hugging Face directories in and out, against transformers itself."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from tests.ranks import run_job
from tests.workshop import VOCABULARY, Workshop

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "qwen3 tied": Qwen3Config(**SIZES, **GROUPED, tie_word_embeddings=True),
    "llama untied": LlamaConfig(**SIZES, **GROUPED, tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**SIZES, tie_word_embeddings=False),
}


def directory(workshop: Workshop, case: str) -> Path:
    """A directory written by save_pretrained, with its tokenizer."""
    torch.manual_seed(5)
    folder = workshop.folder / "pretrained"
    model = AutoModelForCausalLM.from_config(MODELS[case])
    # Random weights choose tokens by a hair; wider ones leave no doubt about the greedy choice.
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size="40KB" if case == "llama untied" else "5GB")
    AutoTokenizer.from_pretrained(workshop.folder / "tokenizer").save_pretrained(folder)
    return folder


def yaml_for(workshop: Workshop, **changes: object) -> str:
    return workshop.yaml(
        **{
            "pretrained_model_dir": "pretrained",
            "model": None,
            "processor": None,
            "runner_config": {"batch_size": 4, "max_steps": 5},
            "lr_schedule": {"learning_rate": 1e-3},
            "train_dataset": {
                "packing": False,
                "seq_length": 32,
                "data_loader": {"num_samples": 5},
            },
            "eval_dataset": {
                "data_loader": {"type": "TextDataLoader", "dataset_dir": "corpus"},
                "seq_length": 32,
            },
            **changes,
        }
    )


def evaluated_by_transformers(folder: Path, workshop: Workshop) -> float:
    """Mean loss over the first 32 targets of each document, by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for path in sorted((workshop.folder / "corpus").iterdir()):
        ids = torch.tensor([tokenizer(path.read_text())["input_ids"][:33]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize(("case", "world"), [(case, 1) for case in MODELS] + [("qwen3 tied", 2)])
def test_finetune_export_and_evaluate(workshop: Workshop, case: str, world: int) -> None:
    directory(workshop, case)
    name = yaml_for(
        workshop,
        runner_config={"batch_size": 4 // world, "epochs": 9, "max_steps": 5},
        parallel_config={"data_parallel": world},
        parallel={"enable_parallel_optimizer": True},
    )
    before = sorted((p.name, p.read_bytes()) for p in (workshop.folder / "pretrained").iterdir())
    tuned = run_job(["--config", name, "--run_mode", "finetune"], workshop.folder, world)
    assert tuned.code == 0, tuned.stderr
    assert "initialized" not in tuned.stdout
    assert (
        sorted((p.name, p.read_bytes()) for p in (workshop.folder / "pretrained").iterdir())
        == before
    )
    assert workshop.losses()[-1] < workshop.losses()[0]

    exported = export(workshop)
    reloaded, info = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert reloaded.config.tie_word_embeddings == MODELS[case].tie_word_embeddings

    result = run_job(
        [
            "--config",
            name,
            "--run_mode",
            "eval",
            "--load_checkpoint",
            "output/checkpoint",
            "--output_dir",
            "evaluated",
        ],
        workshop.folder,
        world,
    )
    assert result.code == 0, result.stderr
    loss = json.loads((workshop.folder / "evaluated" / "eval_result.json").read_text())["eval_loss"]
    assert loss == pytest.approx(evaluated_by_transformers(exported, workshop), abs=1e-5)
    assert f"perplexity {math.exp(loss):.2f}" in result.stdout
    logits_agree(exported)


def export(workshop: Workshop) -> Path:
    """The merged weights of the fine-tuned run."""
    from launcher.tools.unified_safetensors import main

    root = workshop.folder / "output" / "checkpoint"
    suffix = next((root / "manifest").glob("*.json")).stem.rpartition("-")[2]
    arguments = [
        "--mindspore_ckpt_dir",
        str(root),
        "--output_dir",
        str(workshop.folder / "merged"),
        "--file_suffix",
        suffix,
        "--filter_out_param_prefix",
        "adam_",
    ]
    assert main(arguments) == 0
    return workshop.folder / "merged"


def logits_agree(folder: Path) -> None:
    """Our model, filled by our loader from the export, gives the logits of transformers."""
    from launcher.builders.layout import model_layout
    from launcher.layout.mesh import Mesh
    from launcher.parallel.apply import shards
    from launcher.parallel.model_parts import ModelParts
    from launcher.weights.reading.load import load
    from launcher.weights.source import open_complete
    from launcher.weights.tensor_mapping import mapped
    from models.build import build_model, mappings_of, tied_names
    from models.families import model_spec

    spec = model_spec({}, json.loads((folder / "config.json").read_text()))
    ours = build_model(spec, dtype=torch.float32, device="cpu").eval()
    layout = model_layout(ours, spec, Mesh(), split=None, vocab_emb_dp=True)
    held = mapped(shards(ModelParts([ours]).named_tensors(), layout, 0), mappings_of(ours))
    load(held, open_complete(folder), tied=tied_names(ours))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)


PROMPTS = ["def wrap(self, text):", "import", "class Heap:\n    pass"]


@pytest.mark.parametrize(("case", "world"), [(case, 1) for case in MODELS] + [("qwen3 tied", 2)])
def test_greedy_prediction_is_that_of_transformers(
    workshop: Workshop, case: str, world: int
) -> None:
    folder = directory(workshop, case)
    name = yaml_for(
        workshop, parallel_config={"data_parallel": world}, generation_config={"max_new_tokens": 16}
    )
    result = run_job(
        ["--config", name, "--run_mode", "predict", "--predict_data", *PROMPTS],
        workshop.folder,
        world,
    )
    assert result.code == 0, result.stderr
    rows = [
        json.loads(line)
        for line in (workshop.folder / "output/text_generation_result.jsonl")
        .read_text()
        .splitlines()
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, prompt in zip(rows, PROMPTS, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        assert row["tokens"] == expected.tolist()
        assert row["prompt"] == prompt
        assert row["text"].startswith(prompt)
    text = (workshop.folder / "output/text_generation_result.txt").read_text()
    batches = ast.literal_eval(text)
    assert [t for batch in batches for t in batch["text_generation_text"]] == [
        r["text"] for r in rows
    ]


def test_network_params_are_saved_alone_and_predict_reads_any_checkpoint(
    workshop: Workshop,
) -> None:
    name = workshop.yaml(
        callbacks=[
            {
                "type": "CheckpointMonitor",
                "save_checkpoint_steps": 10,
                "save_network_params": True,
                "prefix": "net",
                "keep_checkpoint_max": 1,
            }
        ]
    )
    assert run_job(["--config", name, "--run_mode", "train"], workshop.folder, 1).code == 0
    (alone,) = (workshop.folder / "output/checkpoint_network/rank_0").glob("*.safetensors")
    assert alone.name == "net_rank_0-1_20.safetensors"
    full = load_file(workshop.folder / "output/checkpoint/rank_0/net_rank_0-1_20.safetensors")
    weights = load_file(alone)
    assert not any(key.startswith("adam_") for key in weights)
    assert all(torch.equal(full[key], value) for key, value in weights.items())
    outputs = []
    for index, source in enumerate(
        ("output/checkpoint", "output/checkpoint_network", str(alone.relative_to(workshop.folder)))
    ):
        result = run_job(
            [
                "--config",
                name,
                "--run_mode",
                "predict",
                "--load_checkpoint",
                source,
                "--predict_data",
                "def ",
                "--output_dir",
                f"p{index}",
            ],
            workshop.folder,
        )
        assert result.code == 0, result.stderr
        outputs.append((workshop.folder / f"p{index}/text_generation_result.txt").read_text())
    assert len(set(outputs)) == 1


def test_merging_never_harms_its_input(workshop: Workshop, capsys) -> None:
    from launcher.tools.unified_safetensors import main

    name = workshop.yaml(parallel_config={"data_parallel": 2}, runner_config={"batch_size": 4})
    assert run_job(["--config", name, "--run_mode", "train"], workshop.folder, 2).code == 0
    moved = ["--config", name, "--run_mode", "resume", "--parallel_config.data_parallel", "1",
             "--batch_size", "8", "--max_steps", "30"]  # fmt: skip
    assert run_job(moved, workshop.folder, 1).code == 0
    root = workshop.folder / "output" / "checkpoint"
    merge = ["--mindspore_ckpt_dir", str(root), "--file_suffix"]
    for suffix in ("1_20", "1_30"):
        out = str(workshop.folder / suffix)
        assert main([*merge, suffix, "--output_dir", out]) == 0
        AutoModelForCausalLM.from_pretrained(out)
        AutoTokenizer.from_pretrained(out)
    before = sorted(str(path) for path in (workshop.folder / "output").rglob("*"))
    (workshop.folder / "file").write_text("")
    wrong = {
        str(workshop.folder / "output"): "contains, or is in,",
        str(root): "contains, or is in,",
        str(root / "merged"): "contains, or is in,",
        str(workshop.folder / "file"): "is a file",
        str(workshop.folder / "1_20"): "is not empty",
    }
    for out, text in wrong.items():
        overwrite = [] if text == "is not empty" else ["--overwrite"]
        assert main([*merge, "1_20", "--output_dir", out, *overwrite]) == 2
        assert text in capsys.readouterr().err
    assert main([*merge, "9_9", "--output_dir", str(workshop.folder / "new")]) == 2
    assert "There are:" in capsys.readouterr().err
    assert sorted(str(path) for path in (workshop.folder / "output").rglob("*")) == before


def test_damaged_weights_are_never_merged_or_used(workshop: Workshop, capsys) -> None:
    from launcher.tools.unified_safetensors import main

    name = workshop.yaml()
    assert run_job(["--config", name, "--run_mode", "train"], workshop.folder).code == 0
    file = workshop.folder / "output/checkpoint/rank_0/CKP_rank_0-1_20.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    merged = workshop.folder / "merged"
    arguments = ["--mindspore_ckpt_dir", str(file.parents[1]), "--output_dir", str(merged)]
    assert main([*arguments, "--file_suffix", "1_20"]) == 2
    assert "changed (" in capsys.readouterr().err
    assert not merged.exists()
    for run_mode in (["predict", "--predict_data", "def "], ["finetune"]):
        result = run_job(["--config", name, "--load_checkpoint", str(file), "--output_dir", "used",
                          "--run_mode", *run_mode], workshop.folder)  # fmt: skip
        assert result.code == 2
        assert "changed (" in result.stderr
    folder = run_job(["--config", name, "--run_mode", "predict", "--predict_data", "x",
                      "--load_checkpoint", str(file.parent)], workshop.folder)  # fmt: skip
    assert folder.code == 2
    assert f"did you mean `{file.parents[1]}`?" in folder.stderr
