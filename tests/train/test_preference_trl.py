"""The losses of TRL's trainers and functions on the same model, weights and data."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.train.preference import PreferenceSettings, kto_losses, pair_losses
from tests.preferences import PAIRS, settings, write_preferences
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


def their_losses(shop: Workshop, *, lora: bool, beta: float) -> tuple[list[float], list[float]]:
    """Losses and margins of TRL's DPOTrainer, in the order of the data."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
            init_lora_weights=True, task_type="CAUSAL_LM",
        )  # fmt: skip
    arguments = trl.DPOConfig(
        output_dir=str(shop.folder / "trl"), per_device_train_batch_size=BATCH, max_steps=STEPS,
        learning_rate=1e-2, lr_scheduler_type="constant", beta=beta, logging_steps=1,
        max_grad_norm=1.0, adam_epsilon=1e-4, adam_beta2=0.999, weight_decay=0.0, report_to=[],
        disable_tqdm=True, train_sampling_strategy="sequential", bf16=False, fp16=False,
        use_cpu=True, gradient_checkpointing=False, save_strategy="no", disable_dropout=False,
        dataset_num_proc=None,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trl.DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(shop.folder / "model", dtype="float32"),
            args=arguments, train_dataset=Dataset.from_list(PAIRS), peft_config=peft_config,
            processing_class=AutoTokenizer.from_pretrained(shop.folder / "tokenizer"),
        )  # fmt: skip
        if lora:
            _save_adapter_as_ours(trainer.model, shop.folder)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
    return [row["loss"] for row in rows], [row["rewards/margins"] for row in rows]


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


def our_rows(shop: Workshop, *, lora: bool, beta: float) -> list[dict[str, Any]]:
    changes = settings("dpo", beta=beta) | {
        "model": None,
        "pretrained_model_dir": "model",
        "do_eval": False,
        "runner_config": {"batch_size": BATCH, "max_steps": STEPS},
        "optimizer": {"type": "AdamW", "eps": 1e-4, "weight_decay": 0.0},
        "lr_schedule": {
            "type": "ConstantWarmUpLR", "learning_rate": 1e-2, "warmup_steps": 0,
        },
    }  # fmt: skip
    changes["train_dataset"]["data_loader"]["shuffle"] = False
    if lora:
        changes |= {"pet_config": {"pet_type": "lora", **LORA}, "load_checkpoint": "with_adapter"}
    name = shop.yaml("dpo.yaml", **changes)
    result = run_job(["--config", name, "--run_mode", "finetune"], shop.folder)
    assert result.code == 0, result.stderr + result.stdout
    return shop.rows()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_has_the_losses_of_trl(shop: Workshop, lora: bool) -> None:
    losses, margins = their_losses(shop, lora=lora, beta=0.5)
    rows = our_rows(shop, lora=lora, beta=0.5)
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-5)
    assert [row["rewards/margins"] for row in rows] == pytest.approx(margins, abs=1e-4)
    assert losses[-1] < losses[0]


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


def test_kto_has_the_loss_of_trl() -> None:
    """Its trainer has no function for the loss: the data are given to the trainer's own method."""
    log_p, counts, log_q = scores(8)
    desirable = torch.tensor([True, False, True, True, False, False, True, False])
    divergence = torch.tensor(0.3)
    ours = PreferenceSettings(loss="kto", beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    found = kto_losses(
        ours, log_p[:, 0], counts[:, 0], log_q[:, 0], desirable, divergence.expand(8)
    )
    ratios = log_p[:, 0] - log_q[:, 0]
    good = 1.5 * (1 - torch.sigmoid(0.4 * (ratios - divergence)))
    bad = 0.5 * (1 - torch.sigmoid(0.4 * (divergence - ratios)))
    torch.testing.assert_close(found.losses, torch.where(desirable, good, bad))
