"""The losses of TRL's trainers and functions on the same model, weights and data."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.train.preference import PreferenceSettings, pair_losses
from tests.preferences import JUDGED, PAIRS, settings, write_preferences, write_records
from tests.ranks import run_job
from tests.workshop import VOCABULARY, Workshop

trl = pytest.importorskip("trl")

STEPS, BATCH = 5, 2
LORA = {"lora_rank": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    """With a model of transformers in `model/`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    write_preferences(workshop)
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(workshop.folder / "model")
    return workshop


def their_rows(
    shop: Workshop, kind: str, records: list[dict[str, Any]], *, lora: bool = False, **numbers: Any
) -> list[dict[str, float]]:
    """What TRL's trainer logs, in the order of the data. `kind`: DPO or KTO."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=True, task_type="CAUSAL_LM",
        )  # fmt: skip
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(shop.folder / "trl"), max_steps=STEPS, learning_rate=1e-2,
        lr_scheduler_type="constant", logging_steps=1, max_grad_norm=1.0, adam_epsilon=1e-4,
        adam_beta2=0.999, weight_decay=0.0, report_to=[], disable_tqdm=True,
        train_sampling_strategy="sequential", bf16=False, fp16=False, use_cpu=True,
        gradient_checkpointing=False, save_strategy="no", disable_dropout=False, **numbers,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = getattr(trl, f"{kind}Trainer")(
            model=AutoModelForCausalLM.from_pretrained(shop.folder / "model", dtype="float32"),
            args=arguments, train_dataset=Dataset.from_list(records), peft_config=peft_config,
            processing_class=AutoTokenizer.from_pretrained(shop.folder / "tokenizer"),
        )  # fmt: skip
        if lora:
            _save_adapter_as_ours(trainer.model, shop.folder)
        trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def _save_adapter_as_ours(model: Any, folder: Path) -> None:
    """The base with the first values of the adapter, by our names."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        ours = name.removeprefix("base_model.model.").replace(".base_layer", "")
        tensors[ours.replace(".default", "")] = tensor.clone().contiguous()
    tensors.pop("lm_head.weight", None)
    (folder / "with_adapter").mkdir()
    save_file(tensors, folder / "with_adapter" / "model.safetensors", metadata={"format": "pt"})
    (folder / "with_adapter" / "config.json").write_text(
        (folder / "model" / "config.json").read_text()
    )


def our_rows(
    shop: Workshop, loss: str, batch_size: int, *, lora: bool = False, **numbers: Any
) -> list[dict[str, Any]]:
    changes = settings(loss, **numbers) | {
        "model": None,
        "pretrained_model_dir": "model",
        "do_eval": False,
        "runner_config": {"batch_size": batch_size, "max_steps": STEPS, "epochs": STEPS},
        "optimizer": {"type": "AdamW", "eps": 1e-4, "weight_decay": 0.0},
        "lr_schedule": {
            "type": "ConstantWarmUpLR", "learning_rate": 1e-2, "warmup_steps": 0,
        },
    }  # fmt: skip
    changes["train_dataset"]["data_loader"]["shuffle"] = False
    if lora:
        changes |= {"pet_config": {"pet_type": "lora", **LORA}, "load_checkpoint": "with_adapter"}
    name = shop.yaml("ours.yaml", **changes)
    result = run_job(["--config", name, "--run_mode", "finetune"], shop.folder)
    assert result.code == 0, result.stderr + result.stdout
    return shop.rows()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_has_the_losses_of_trl(shop: Workshop, lora: bool) -> None:
    theirs = their_rows(shop, "DPO", PAIRS, lora=lora, beta=0.5, per_device_train_batch_size=BATCH)
    ours = our_rows(shop, "dpo", BATCH, lora=lora, beta=0.5)
    assert len(theirs) == len(ours) == STEPS
    for row, expected in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        for name in ("rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            assert row[name] == pytest.approx(expected[name], abs=1e-3), name
    assert ours[-1]["loss"] < ours[0]["loss"]


@pytest.mark.long
def test_kto_has_the_losses_of_trl(shop: Workshop) -> None:
    """With one batch an epoch: TRL rotates the answers within a batch, we over the data."""
    records = JUDGED[:6]
    write_records(shop.folder / "judged.jsonl", records)
    numbers = {"beta": 0.5, "desirable_weight": 1.5}
    theirs = their_rows(shop, "KTO", records, per_device_train_batch_size=6, **numbers)
    ours = our_rows(shop, "kto", 6, **numbers)
    for row, expected in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert row[name] == pytest.approx(expected[name], abs=1e-4), name
    assert any(row["kl"] > 0 for row in ours)


def scores(samples: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(2, 9, (samples, 2), generator=generator)
    log_p = -torch.rand(samples, 2, generator=generator) * 3 * counts
    log_q = log_p + torch.randn(samples, 2, generator=generator)
    return log_p, counts, log_q


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss", ["simpo", "cpo", "hinge"])
def test_cpo_and_simpo_have_the_losses_of_trl(loss: str, smoothing: float) -> None:
    module = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    kind = {"cpo": "sigmoid"}.get(loss, loss)
    theirs = SimpleNamespace(
        alpha=0.0, beta=0.7, simpo_gamma=0.4, label_smoothing=smoothing, loss_type=kind,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    log_p, counts, _ = scores()
    shown = log_p / counts if loss == "simpo" else log_p
    expected, chosen, _ = module.CPOTrainer.cpo_loss(theirs, shown[:, 0], shown[:, 1])
    ours = PreferenceSettings(loss=loss, beta=0.7, simpo_gamma=0.4, label_smoothing=smoothing)
    found = pair_losses(ours, log_p, counts, torch.zeros_like(log_p))
    torch.testing.assert_close(found.losses, expected)
    torch.testing.assert_close(found.measures[:, 0], chosen)


def test_orpo_has_the_loss_of_trl() -> None:
    module = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    theirs = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    log_p, counts, log_q = scores()
    means = log_p / counts
    ratio, _, _, log_ratio, log_odds = module.ORPOTrainer.odds_ratio_loss(
        theirs, means[:, 0], means[:, 1]
    )
    ours = PreferenceSettings(loss="orpo", beta=0.3, sft_weight=1.0)
    found = pair_losses(ours, log_p, counts, log_q)
    torch.testing.assert_close(found.losses, -means[:, 0] - ratio)
    sums = dict(zip(ours.measures, found.measures.mean(0), strict=True))
    torch.testing.assert_close(sums["log_odds_ratio"], log_ratio)
    torch.testing.assert_close(sums["log_odds_chosen"], log_odds)
