"""Layouts with rows of many short documents, above the length up to which attention has a mask.

The rows of the other parity tests have 32 tokens, which attend by a mask, and hardly two documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from models.attention import MASK_UP_TO
from tests.parallel.keeping import SEQUENCE, SWAP, recompute
from tests.parallel.parity import FAMILIES, MIXTURES, Case, Outcome, assert_equal
from tests.parallel.test_parity import SCHEDULES, outcomes_of, wrong_ones
from tests.workshop import Workshop

ULYSSES = {"context_parallel_algo": "ulysses_cp"}
HYBRID = {"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 2}
WINDOW = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
FIRST_FIT = {"train_dataset": {"packing_strategy": "first_fit"}}
CHUNKED = {"loss_chunk_tokens": 64}
SEED = {"seed": 8}
"""With that of the others a token of gpt-oss has two experts that are equally good: the order of
sums decides."""


def long(case: Case, length: int = 96) -> Case:
    """The case with rows of `length` tokens, of the documents that `write_paragraphs` makes."""
    assert length > MASK_UP_TO
    loader = {"type": "HFDataLoader", "dataset_dir": None, "dataset_files": "paragraphs.jsonl"}
    data = {"seq_length": length, "data_loader": loader, **case.more.get("train_dataset", {})}
    return replace(
        case,
        model={"max_position_embeddings": 256, **case.model},
        more={**SEED, **case.more, "train_dataset": data},
    )


def write_paragraphs(workshop: Workshop) -> Workshop:
    texts = [path.read_text() for path in sorted((workshop.folder / "corpus").iterdir())]
    parts = [part for text in texts for part in text.split("\n\n") if part.strip()]
    lines = [json.dumps({"text": part}) + "\n" for part in parts]
    (workshop.folder / "paragraphs.jsonl").write_text("".join(lines))
    return workshop


QUICK = [
    long(case)
    for case in (
        Case(cp=2, model=WINDOW),
        Case(tp=2, cp=2, parallel=ULYSSES, model=WINDOW),
        Case(dp=2, sharded=True, batch=2, model=WINDOW, more={"micro_batch_interleave_num": 2}),
        Case(tp=2, pp=2, pipeline=SCHEDULES["zero bubble"], model=DROPOUT),
        Case("deepseek", tp=2, pp=2, more=recompute(recompute_operations=True)),
        Case("gpt-oss", dp=2, ep=2, cp=2, sharded=True, more=recompute(recompute=True)),
    )
]


@pytest.fixture(scope="module")
def quick(materials: Workshop, tmp_path_factory) -> dict[str, tuple[list[Outcome], Outcome]]:
    workshop = materials.copy_to(tmp_path_factory.mktemp("long"))
    return outcomes_of(write_paragraphs(workshop), QUICK)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_layout_equals_one_process(quick: Any, case: Case) -> None:
    assert_equal(case, *quick[str(case)])


MORE = [
    Case(cp=4, parallel=HYBRID, model=WINDOW),
    Case("deepseek", cp=4, parallel=HYBRID),
    Case("gpt-oss", cp=4, parallel=HYBRID),
    Case(cp=2, batch=4, model=WINDOW, more={"micro_batch_interleave_num": 2}),
    Case(tp=2, cp=2, batch=4, parallel=ULYSSES,
         more={"micro_batch_interleave_num": 2, **recompute(recompute=True)}),
    Case(dp=2, model={**WINDOW, **DROPOUT}, more=recompute(select_recompute=True)),
    Case(dp=2, model=WINDOW, more=SWAP),
    Case(cp=2, parallel=ULYSSES, more=SWAP),
    Case(dp=2, cp=2, sharded=True, micro=2, more=CHUNKED),
    Case("qwen3 tied", cp=2, pp=2, parallel=ULYSSES, pipeline=SCHEDULES["zero bubble"],
         more=CHUNKED),
    Case("deepseek", tp=2, cp=2, more=recompute(recompute_operations=True)),
    Case("gpt-oss", dp=2, cp=2, parallel=ULYSSES, more=recompute(memory_budget=0.4)),
    Case(cp=2, model=WINDOW, more=FIRST_FIT),
    Case(pp=2, cp=2, parallel=ULYSSES, more=FIRST_FIT),
    Case(cp=2, more={"train_dataset": {"packing": False}}),
    Case(cp=2, parallel=ULYSSES, model=WINDOW, more={"train_dataset": {"packing": False}}),
]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_what_goes_with_attention(materials: Workshop, tmp_path) -> None:
    workshop = write_paragraphs(materials.copy_to(tmp_path / "work"))
    wrong = wrong_ones(workshop, [long(case, 128) for case in MORE], 1e-5)
    assert not wrong, "\n".join(wrong)


def axes_of(family: str) -> Iterator[Case]:
    model = {"sliding_window": 20} if family == "gpt-oss" else {}
    yield long(Case(family, tp=2, pp=2, model=model), 160)
    yield long(Case(family, dp=2, cp=2, sharded=True, model=model), 96)
    yield long(Case(family, tp=2, cp=2, parallel=ULYSSES, model=model), 96)
    if family in MIXTURES:
        yield long(
            Case(family, dp=2, tp=2, ep=2, sharded=True, parallel=SEQUENCE, model=model), 160
        )


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(materials: Workshop, tmp_path, family: str) -> None:
    workshop = write_paragraphs(materials.copy_to(tmp_path / "work"))
    wrong = wrong_ones(workshop, list(axes_of(family)), 1e-5)
    assert not wrong, "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["qwen3", "deepseek", "gpt-oss"])
def test_compiled(materials: Workshop, tmp_path, family: str) -> None:
    workshop = write_paragraphs(materials.copy_to(tmp_path / "work"))
    layouts: list[dict[str, Any]] = [{"dp": 2}, {"tp": 2}, {"cp": 2, "parallel": ULYSSES}]
    cases = [long(Case(family, **layout, more={"compile": "aot_eager"})) for layout in layouts]
    wrong = wrong_ones(workshop, cases, 1e-4)
    assert not wrong, "\n".join(wrong)
