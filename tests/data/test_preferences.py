"""Records of preferences of every usual form, to rows of two sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from launcher.data.loader import evaluation_batches
from launcher.data.preferences import Judged, Pair, PlainText, judged_of, pairs_of
from launcher.data.records import Record
from launcher.data.rows import NO_TARGET, Row, RowDataset
from launcher.data.strictness import Strictness
from launcher.data.summary import summarize
from launcher.data.tally import Tally
from launcher.errors import UserError
from tests.preferences import write_records

from .conftest import Build, train_tokenizer
from .tokenizers_of_kinds import WithoutOffsets

ASK = [{"role": "user", "content": "What is a ship?"}]
GOOD, BAD = "It floats.", "A slipway."
TURNS = {name: [{"role": "assistant", "content": text}] for name, text in
         (("chosen", GOOD), ("rejected", BAD))}  # fmt: skip
EARLIER = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    *ASK,
]
HH = "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: What is a ship?\n\nAssistant: "

CHAT_PAIRS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": ASK, **TURNS},
    "trl, implicit prompt": {k: [*ASK, *turns] for k, turns in TURNS.items()},
    "trl, prompt as text": {"prompt": "What is a ship?", **TURNS},
    "hub, all of it several times": {
        "prompt": "What is a ship?", "messages": [*ASK, *TURNS["chosen"]],
        **{k: [*ASK, *turns] for k, turns in TURNS.items()},
        "prompt_id": "1",
    },
    "llama-factory alpaca": {
        "instruction": "What is a ship?", "input": "", "chosen": GOOD, "rejected": BAD,
    },
    "llama-factory sharegpt": {
        "conversations": [{"from": "human", "value": "What is a ship?"}],
        "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD},
    },
    "swift": {"messages": [*ASK, *TURNS["chosen"]], "rejected_response": BAD},
    "swift, messages": {
        "messages": [*ASK, *TURNS["chosen"]], "rejected_messages": [*ASK, *TURNS["rejected"]],
    },
}  # fmt: skip
LONG_PAIRS: dict[str, dict[str, Any]] = {
    "trl": {"prompt": EARLIER, **TURNS},
    "hh": {"chosen": HH + GOOD, "rejected": HH + BAD},
    "llama-factory alpaca": {
        "instruction": "What is a ship?", "chosen": GOOD, "rejected": BAD,
        "history": [["Hello", "Hi"]],
    },
    "llama-factory sharegpt": {
        "conversations": [
            {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"},
            {"from": "human", "value": "What is a ship?"},
        ],
        "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD},
    },
}  # fmt: skip
JUDGED: dict[str, dict[str, Any]] = {
    "trl": {"prompt": ASK, "completion": TURNS["chosen"], "label": True},
    "trl, prompt as text": {"prompt": "What is a ship?", "completion": TURNS["chosen"], "label": 1},
    "llama-factory alpaca": {"instruction": "What is a ship?", "output": GOOD, "kto_tag": True},
    "llama-factory sharegpt": {
        "conversations": [
            {"from": "human", "value": "What is a ship?"}, {"from": "gpt", "value": GOOD},
        ],
        "kto_tag": "true",
    },
    "swift": {"messages": [*ASK, *TURNS["chosen"]], "label": True},
}  # fmt: skip
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "prompt, chosen"),
    "other kinds": ({"prompt": "a", "chosen": "b", "rejected": TURNS["rejected"]}, "'rejected'"),
    "a number": ({"prompt": "a", "chosen": 1, "rejected": "b"}, "'chosen' = 1"),
    "no prompt": ({"chosen": 1, "rejected": 2}, "'prompt' is missing"),
    "nothing in common": (
        {"chosen": [*ASK, *TURNS["chosen"]], "rejected": [EARLIER[0], *TURNS["rejected"]]},
        "no turn in common",
    ),
    "ends with a question": (
        {"chosen": [*EARLIER[:2], ASK[0]], "rejected": [*EARLIER[:2], *TURNS["rejected"]]},
        "ends with a turn of user",
    ),
    "half a character": (
        {"prompt": "a", "chosen": "c\ud800", "rejected": "b"}, "half of a surrogate pair"
    ),
    "an unknown speaker": (
        {"prompt": [{"role": "boss", "content": "a"}], **TURNS}, "messages[0].role",
    ),
    "no prompt at all": ({"chosen": GOOD, "rejected": BAD}, "column_map, or write `prompt`"),
    "the prompt in another column": (
        {"question": "What is a ship?", "chosen": f"A {GOOD}", "rejected": f"A {BAD}"},
        "data_loader.column_map: {prompt: question}",
    ),
    "a typo": ({"promt": "Why", "chosen": GOOD, "rejected": BAD}, "{prompt: promt}"),
    "null": ({"prompt": "Why", "chosen": GOOD, "rejected": None}, "Keys found: prompt, chosen"),
}  # fmt: skip


def strictness() -> Strictness:
    return Strictness(strict=True, tally=Tally())


def pair(value: dict[str, Any], form: str | None = None) -> Pair:
    return next(pairs_of([Record("data.jsonl:1", value)], form, strictness()))


def judged(value: dict[str, Any]) -> list[Judged]:
    return list(judged_of([Record("data.jsonl:1", value)], None, strictness()))


@pytest.mark.parametrize("value", CHAT_PAIRS.values(), ids=CHAT_PAIRS)
def test_pairs_of_every_form_are_the_same_conversations(value: dict[str, Any]) -> None:
    expected = pair(CHAT_PAIRS["trl"])
    assert pair(value) == expected
    assert expected.chosen.messages == [*ASK, *TURNS["chosen"]]
    assert expected.rejected.messages == [*ASK, *TURNS["rejected"]]


@pytest.mark.parametrize("value", LONG_PAIRS.values(), ids=LONG_PAIRS)
def test_earlier_answers_are_context(value: dict[str, Any]) -> None:
    found = pair(value)
    assert found == pair(LONG_PAIRS["trl"])
    assert found.chosen.context_turns == found.rejected.context_turns == {1}


@pytest.mark.parametrize("value", JUDGED.values(), ids=JUDGED)
def test_judged_answers_of_every_form(value: dict[str, Any]) -> None:
    (found,) = judged(value)
    assert found.is_desirable is True
    assert found.answer == pair(CHAT_PAIRS["trl"]).chosen
    label = next(key for key in ("label", "kto_tag") if key in value)
    assert judged({**value, label: False})[0].is_desirable is False
    with pytest.raises(UserError, match=f"{label}' = 'maybe'"):
        judged({**value, label: "maybe"})


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    found = judged(CHAT_PAIRS["swift"])
    assert [one.is_desirable for one in found] == [True, False]
    assert [one.answer for one in found] == list(pair(CHAT_PAIRS["swift"])[1:])


def test_fields_that_are_not_used_are_counted() -> None:
    counted = Tally()
    lenient = Strictness(strict=True, tally=counted)
    value = {**CHAT_PAIRS["trl"], "label": 1, "score_chosen": 0.4}
    (found,) = pairs_of([Record("data.jsonl:1", value)], None, lenient)
    assert found == pair(CHAT_PAIRS["trl"])
    assert set(counted.unused_fields.by_name) == {"label", "score_chosen"}
    assert counted.unused_fields.all.count == 1


def test_text_is_used_as_it_is_unless_the_format_says_messages() -> None:
    value = {"prompt": "What is a ship?", "chosen": GOOD, "rejected": BAD}
    found = pair(value)
    assert found.chosen == PlainText("data.jsonl:1", "What is a ship?", GOOD)
    assert pair(value, "messages") == pair(CHAT_PAIRS["trl"])
    whole = {"chosen": "Why? Yes it is", "rejected": "Why? No, wrong"}
    assert pair(whole).chosen[1:] == ("Why?", " Yes it is")
    assert pair(whole).rejected[1:] == ("Why?", " No, wrong")
    hh = {"chosen": HH + GOOD, "rejected": HH + BAD}
    assert isinstance(pair(hh, "text").chosen, PlainText)


@pytest.mark.parametrize(("value", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_record_is_named_with_its_place(value: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        pair(value)
    assert caught.value.problems[0].where == "data.jsonl:1"
    assert says in str(caught.value)


Rows = Callable[..., RowDataset]


@pytest.fixture
def rows_of(build: Build, tmp_path: Path) -> Rows:
    """rows_of(records, type of the data loader, **settings)."""

    def make(records: list[dict[str, Any]], kind: str = "PreferenceDataLoader", **more: Any):
        write_records(tmp_path / "data.jsonl", records)
        settings = {"seq_length": 24, "packing": False} | more
        return build(type=kind, dataset_files=str(tmp_path / "data.jsonl"), **settings)

    return make


def decoded(tokenizer: PreTrainedTokenizerFast, row: Row, line: int) -> tuple[str, str]:
    """The text of a sequence, padding apart, and that of its targets."""
    targets = row.labels[line][row.labels[line] != NO_TARGET]
    ids = row.input_ids[line]
    return tokenizer.decode(ids[ids != tokenizer.pad_token_id]), tokenizer.decode(targets)


def test_a_row_is_a_pair_with_its_answers_as_targets(
    rows_of: Rows, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows_of([LONG_PAIRS["trl"]], tokenizer=chat_tokenizer, seq_length=64)
    row = rows.row(0)
    assert row.input_ids.shape == row.labels.shape == (2, 64)
    chosen, targets = decoded(chat_tokenizer, row, 0)
    assert chosen.startswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi")
    assert targets == GOOD + "<|im_end|>"
    assert decoded(chat_tokenizer, row, 1)[1] == BAD + "<|im_end|>"
    counts = rows.counts(np.array([0]))
    assert counts.targets.tolist() == [1]
    assert counts.tokens[0] == (row.input_ids != chat_tokenizer.pad_token_id).sum()


@pytest.mark.parametrize("kind", [train_tokenizer, lambda: WithoutOffsets(train_tokenizer())])
def test_plain_text_ends_with_the_end_token(rows_of: Rows, kind: Any) -> None:
    tokenizer = kind()
    record = {"prompt": "What is a ship?", "chosen": " It floats.", "rejected": " A slipway."}
    row = rows_of([record], tokenizer=tokenizer).row(0)
    plain = train_tokenizer()
    assert decoded(plain, row, 0) == ("What is a ship? It floats.", " It floats.<|endoftext|>")
    assert decoded(plain, row, 1)[1] == " A slipway.<|endoftext|>"


def test_a_tokenizer_that_begins_texts_with_a_token_does_so_here(rows_of: Rows) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(bos_token="<|im_start|>")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)]
    )
    record = {"prompt": "What?", "chosen": " It.", "rejected": " A."}
    row = rows_of([record], tokenizer=tokenizer).row(0)
    assert row.input_ids[:, 0].tolist() == [begin, begin]
    assert begin not in row.input_ids[:, 1:]


def test_pairs_that_are_cut_dropped_or_equal_are_counted(
    rows_of: Rows, logged: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "What is a ship? " * 8
    records = [
        {"prompt": "What?", "chosen": " It.", "rejected": " A."},
        {"prompt": "What?", "chosen": " Same.", "rejected": " Same."},
        {"prompt": "What?", "chosen": text, "rejected": " A."},
        {"prompt": text * 4, "chosen": " It.", "rejected": " A."},
    ]
    rows = rows_of(records)
    assert len(rows) == 3
    lines = "\n".join(logged)
    assert "1 sample(s) longer than seq_length 24 were cut" in lines
    assert "1 sample(s) with no answer within seq_length 24 were left out" in lines
    assert "data.jsonl:4" in lines
    assert "1 sample(s) have the same answer as chosen and as rejected" in lines
    assert all((rows.row(i).labels != NO_TARGET).any(1).all() for i in range(3))


def test_only_pairs_without_targets_are_nothing_to_train_on(rows_of: Rows) -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        rows_of([{"prompt": "ship " * 90, "chosen": " It.", "rejected": " A."}])


def test_a_judged_answer_is_beside_the_answer_before(
    rows_of: Rows, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [
        {"prompt": f"What {i}?", "completion": f" The {word}.", "label": i != 1}
        for i, word in enumerate(("ship", "ramp", "slipway"))
    ]
    rows = rows_of(records, "FeedbackDataLoader")
    for i, before in enumerate((2, 0, 1)):
        row = rows.row(i)
        own, other = records[i], records[before]
        answer, mismatch = (decoded(tokenizer, row, line) for line in range(2))
        assert answer[0] == own["prompt"] + own["completion"]
        assert mismatch[0] == own["prompt"] + other["completion"]
        assert answer[1] == own["completion"] + "<|endoftext|>"
        assert mismatch[1] == other["completion"] + "<|endoftext|>"
        assert row.is_desirable is (i != 1)


def test_batches_keep_a_pair_together(rows_of: Rows) -> None:
    records = [
        {"prompt": f"What {i}?", "completion": f" The {i}.", "label": i % 2} for i in range(5)
    ]
    rows = rows_of(records, "FeedbackDataLoader")
    batches = list(evaluation_batches(rows, 2, 2, 1))
    assert [batch.rows.tolist() for batch in batches] == [[2, 3], [-1, -1]]
    assert batches[0].input_ids.shape == (2, 2, 24)
    assert batches[0].is_desirable.tolist() == [False, True]
    assert (batches[1].labels == NO_TARGET).all()
    assert summarize(rows, 100).padding > 0
