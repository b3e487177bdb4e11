"""What a step may do beside training a decoder from text, on a virtual GPU: adapters, preferences,
mixtures, recomputation by operation, moments in bfloat16, losses in chunks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.dry_run.test_dry_run import check
from tests.parallel.parity import Case
from tests.preferences import settings, write_preferences
from tests.workshop import Workshop, merged

SOURCES = [
    {"type": "TextDataLoader", "dataset_dir": "corpus", "weight": 0.7},
    {"type": "HFDataLoader", "dataset_files": "notes.jsonl", "weight": 0.3},
]
MIXTURE: dict[str, Any] = {"train_dataset": {"data_loader": SOURCES}}


def adapters(**keys: Any) -> dict[str, Any]:
    return {"pet_config": {"lora_rank": 4, "lora_alpha": 8, **keys}}


def preferences(loss: str, **more: Any) -> dict[str, Any]:
    kept = {k: v for k, v in settings(loss).items() if k not in ("runner_config", "callbacks")}
    slow = {"lr_schedule": {"learning_rate": 1e-4}}  # or the loss of so few pairs vanishes
    return merged(merged(kept, slow), more)


def recompute(**section: Any) -> dict[str, Any]:
    return {"recompute_config": section}


CHUNKS = {"loss_chunk_tokens": 32}
MOMENTS = {"optimizer": {"state_dtype": "bfloat16"}}
BY_OPERATION = recompute(recompute_operations=True)

QUICK = [
    Case("qwen3 moe", more=adapters(lora_rank=8, target_modules=["up_proj", "down_proj"])),
    Case(more=preferences("kto")),
    Case(more=MIXTURE | CHUNKS, micro=2),
    Case("deepseek", more=recompute(memory_budget=0.4) | MOMENTS),
]
ALONE = [
    Case(more=adapters()),
    Case(more=preferences("dpo") | adapters(pet_type="dora", lora_dropout=0.1)),
    Case("llama", more=MOMENTS | BY_OPERATION),
    Case(more=adapters(pet_type="dora", lora_dropout=0.1) | CHUNKS),
    Case("qwen3 tied", more=adapters(modules_to_save=["norm", "embed_tokens"])),
    Case("llama", more=adapters(target_modules="all-linear", use_rslora=True) | BY_OPERATION),
    Case(more=preferences("dpo")),
    Case(more=preferences("simpo") | CHUNKS),
    Case(more=MIXTURE),
    Case("qwen3 moe", more=BY_OPERATION),
    Case("deepseek", more=recompute(memory_budget=0.0)),
    Case("gpt-oss", more=recompute(select_recompute=["self_attn", "mlp"])),
    Case("llama", more={"optimizer": {"type": "Muon", "state_dtype": "bfloat16"}}),
    Case("llama", more={"optimizer": {"type": "SGD", "momentum": 0.9, "state_dtype": "bfloat16"}}),
    Case("qwen3 tied", more=CHUNKS),
    Case("glm 0414", model={"compute_dtype": "float16"}, more=CHUNKS),
]
SEVERAL = [
    Case(dp=2, sharded=True, more=adapters(lora_dropout=0.1)),
    Case(tp=2, more=adapters() | BY_OPERATION, parallel={"use_seq_parallel": True}),
    Case(tp=2, more=preferences("dpo") | CHUNKS),
    Case(cp=2, more=preferences("kto", train_dataset={"seq_length": 32})),
    Case(pp=2, more=preferences("dpo")),
    Case(pp=2, more=MIXTURE),
    Case(dp=2, more=MIXTURE | MOMENTS),
    Case("qwen3 moe", dp=2, ep=2, sharded=True, more=recompute(memory_budget=0.4) | MOMENTS),
    Case("deepseek", dp=2, ep=2, more=recompute(recompute=True)),
    Case(tp=2, more={"optimizer": {"type": "Muon", "state_dtype": "bfloat16"}}),
]


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    write_preferences(workshop)
    notes = [{"text": f"def note_{n}(x):\n    return x + {n}\n"} for n in range(200)]
    text = "".join(json.dumps(note) + "\n" for note in notes)
    (workshop.folder / "notes.jsonl").write_text(text)
    return workshop


def test_features(shop: Workshop) -> None:
    check(shop, QUICK)


@pytest.mark.long
def test_in_one_process(shop: Workshop) -> None:
    check(shop, ALONE)


@pytest.mark.long
def test_on_several_ranks(shop: Workshop) -> None:
    check(shop, SEVERAL)
