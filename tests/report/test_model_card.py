"""The model card as a function of what a run recorded, and how that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.report.model_card import EVALUATIONS_SHOWN, CardSubject, model_card, nested
from launcher.report.run_record import RunRecord, read_run_record

SUBJECT = CardSubject(
    name="hf", config={"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}, parameters=12,
    weight_bytes=24, files=2, has_tokenizer=True, has_template=True, generation={}, source="out",
)  # fmt: skip


def record(**more: Any) -> RunRecord:
    state = {"global_step": 30, "consumed_samples": 240, "consumed_tokens": 9000, **more}
    return RunRecord(name="CKP-1_30", state=state)


def test_a_card_without_a_run_has_the_model_alone() -> None:
    text = model_card(SUBJECT, None)
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "text-generation"
    assert "| weights | bfloat16, 0.0 MB in 2 files |" in text
    assert "apply_chat_template" in text
    for section in ("## Training", "## Data", "## Evaluation", "## Configuration"):
        assert section not in text


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ({}, "step 30, save `CKP-1_30`, of a run."),
        ({"initial_weights": None}, "of a run that began with random weights."),
        ({"initial_weights": "base"}, "of a run that began with the weights in `base`."),
    ],
)
def test_where_a_run_began(start: dict[str, Any], expected: str) -> None:
    assert expected in model_card(SUBJECT, record(**start))


def test_sources_of_a_mixture_have_their_own_rows() -> None:
    place = "train_dataset.data_loader"
    found = RunRecord(
        name="CKP-1_30",
        last_row={"consumed/code": 180, "consumed/chat": 60},
        state={
            "global_step": 30,
            "configuration": {
                f"{place}.0.type": "TextDataLoader", f"{place}.0.dataset_dir": "corpora/code",
                f"{place}.1.type": "InstructionDataLoader", f"{place}.1.name": "chat",
                f"{place}.1.dataset_files": ["a|b.jsonl", "c.jsonl"],
            },
            "data": {"seq_length": 64, "packing": False, "mixture": {"sources": {
                "code": {"rows": 1000}, "chat": {"rows": 50},
            }}},
        },
    )  # fmt: skip
    text = model_card(SUBJECT, found)
    assert "| code | corpora/code | TextDataLoader | 1,000 | 180 |" in text
    assert "| chat | a\\|b.jsonl, c.jsonl | InstructionDataLoader | 50 | 60 |" in text
    assert "A row has 64 tokens, one document in a row." in text


def test_a_run_on_preferences_has_its_loss_and_its_metrics() -> None:
    configuration = {
        "trainer.type": "SimPOTrainer", "preference.beta": 2.5, "preference.simpo_gamma": 0.5,
        "preference.desirable_weight": 1.0, "preference.reference.weights": "",
    }  # fmt: skip
    row = {"step": 30, "eval_loss": 0.25, "eval_samples": 6, "eval_logps/chosen": -9.5,
           "eval_rewards/accuracies": 0.75}  # fmt: skip
    found = RunRecord(name="x", evaluations=(row,), state={
        "configuration": configuration, "data": {"seq_length": 64, "rows": 6},
    })  # fmt: skip
    text = model_card(SUBJECT, found)
    assert "| objective | SimPOTrainer, loss simpo, beta 2.5, simpo_gamma 0.5 |" in text
    assert "A row has two sequences of 64 tokens, the answers that are compared." in text
    assert "| 30 | 0.2500 | 0.7500 |" in text
    assert "Losses are means over 6 samples." in text


def test_of_many_evaluations_the_first_the_best_and_the_newest_are_shown() -> None:
    rows = tuple(
        {"step": step, "eval_loss": 0.5 if step == 7 else 9 - step / 10, "eval_tokens": 99}
        for step in range(1, 41)
    )
    text = model_card(SUBJECT, RunRecord(name="x", evaluations=rows))
    table = text.partition("## Evaluation")[2].partition("\nLosses")[0].strip().splitlines()
    steps = [int(line.split("|")[1]) for line in table[2:]]
    assert steps[:2] == [1, 7]
    assert steps[2:] == list(range(43 - EVALUATIONS_SHOWN, 41))
    assert f"{40 - len(steps)} more evaluations are not shown" in text


def test_a_flat_configuration_becomes_sections_and_lists() -> None:
    flat = {"a.b": 1, "a.c.0.x": 2, "a.c.1.x": 3, "d": [4], "e.10": 5}
    assert nested(flat) == {"a": {"b": 1, "c": [{"x": 2}, {"x": 3}]}, "d": [4], "e": {"10": 5}}


def write_save(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A save of step 4 after 32 samples, and the metrics beside it."""
    root = folder / "checkpoint"
    (root / "state").mkdir(parents=True)
    (root / "rank_0").mkdir()
    (root / "state/CKP-1_4.json").write_text(json.dumps({"global_step": 4, "consumed_samples": 32}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{cut")
    return root / "rank_0/CKP_rank_0-1_4.safetensors"


STEPS = [{"step": step, "loss": 5.0 - step, "consumed_samples": 8 * step} for step in range(1, 7)]


def test_rows_up_to_the_save_are_read(tmp_path: Path) -> None:
    rows = [*STEPS[:4], {"step": 4, "eval_loss": 2.0}, *STEPS[4:], {"step": 6, "eval_loss": 1.0}]
    found = read_run_record(write_save(tmp_path, rows))
    assert (found.name, found.step, found.layout) == ("CKP-1_4", 4, "")
    assert found.last_row["loss"] == 1.0
    assert [row["step"] for row in found.evaluations] == [4]


def test_metrics_of_another_run_do_not_count(tmp_path: Path) -> None:
    other = [{**row, "consumed_samples": 16 * row["step"]} for row in STEPS]
    found = read_run_record(write_save(tmp_path, [*other, {"step": 4, "eval_loss": 2.0}]))
    assert (found.last_row, found.evaluations) == ({}, ())
    missing = read_run_record(tmp_path / "none/rank_0/CKP_rank_0-1_4.safetensors")
    assert (missing.step, missing.configuration) == (None, {})
