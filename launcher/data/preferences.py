"""Records of preferences: pairs of answers, and single answers that were judged.

Owns how a record of each format becomes a question with its answers. The formats are those of TRL
(prompt, chosen, rejected as text or messages, the prompt perhaps only inside the answers; prompt,
completion, label), LLaMA-Factory (alpaca or sharegpt fields with chosen and rejected, or kto_tag),
ms-swift (messages with rejected_response, rejected_messages or label) and Anthropic's HH (dialogues
in one text). A conversation is read by `launcher.data.conversations`, as any other instruction
data, from a record that has one answer.

Invariants: a record that fits no format is an error with file and record; only the answers that are
compared are targets, earlier ones in the dialogue are context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from launcher.data.conversations import Conversation, conversations_of
from launcher.data.record_files import without_null
from launcher.data.records import Record, convert_records, kind_of, shown
from launcher.data.strictness import Strictness, is_absent, names_of, surrogate_error
from launcher.errors import UserError, did_you_mean
from launcher.json_text import lone_surrogate

_PAIR_FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages")
_LABELS = ("label", "kto_tag")
_PROMPT_WORDS = ("question", "query", "input", "user", "context")
"""Fields that have the prompt in data sets of plain text."""
_LABEL_WORDS = {"true": True, "false": False, "1": True, "0": False}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

_PAIR_RULE = (
    "a pair is prompt, chosen and rejected (text or messages); instruction, chosen and rejected; "
    "conversations, chosen and rejected; or messages and rejected_response"
)
_JUDGED_RULE = (
    "a judged answer is prompt, completion and label; or instruction, output and kto_tag; "
    "conversations and kto_tag; messages and label; or a pair"
)


class PlainText(NamedTuple):
    """A prompt and its continuation, without a chat template."""

    where: str
    prompt: str
    completion: str


Answer = Conversation | PlainText


class Pair(NamedTuple):
    """A better and a worse answer to the same prompt."""

    where: str
    chosen: Answer
    rejected: Answer


class Judged(NamedTuple):
    """One answer, and whether it is a good one."""

    answer: Answer
    is_desirable: bool


@dataclass(frozen=True)
class _Variant:
    """A record with one of the answers, in a format of conversations or `text`."""

    form: str
    value: dict[str, Any]
    answer_turns: int = 1
    """Turns at the end that are the answer."""


def pairs_of(
    records: Iterable[Record | UserError], given_format: str | None, strictness: Strictness
) -> Iterator[Pair]:
    """The pairs of records, in the given format or that which each one has. Raises UserError."""

    def pair_of(raw: Record) -> Pair:
        record = _without_labels(without_null(raw), strictness)
        chosen, rejected = (
            _answer(record, variant, strictness) for variant in _variants(record, given_format)
        )
        return Pair(record.where, chosen, rejected)

    return convert_records(records, pair_of)


def judged_of(
    records: Iterable[Record | UserError], given_format: str | None, strictness: Strictness
) -> Iterator[Judged]:
    """The judged answers of records; a pair is a good and a bad one. Raises UserError."""

    def answers_of(raw: Record) -> list[Judged]:
        record = without_null(raw)
        if _is_pair(record.value):
            record = _without_labels(record, strictness)
            variants = _variants(record, given_format)
            return [
                Judged(_answer(record, variant, strictness), verdict)
                for variant, verdict in zip(variants, (True, False), strict=True)
            ]
        verdict = _verdict(record)
        return [Judged(_answer(record, _single(record, given_format), strictness), verdict)]

    for answers in convert_records(records, answers_of):
        yield from answers


def _without_labels(record: Record, strictness: Strictness) -> Record:
    """A pair without judgements beside it, which are counted as not used."""
    for name in _LABELS:
        if name in record.value:
            strictness.tally.unused_fields.add(name, record.where)
    return replace(record, value=_without(record.value, *_LABELS))


def _is_pair(value: Mapping[str, Any]) -> bool:
    return any(not is_absent(value.get(name)) for name in _PAIR_FIELDS)


def _verdict(record: Record) -> bool:
    found = {name: record.value[name] for name in _LABELS if name in record.value}
    if not found:
        raise _unknown(record, _JUDGED_RULE)
    name, value = next(iter(found.items()))
    if isinstance(value, str):
        value = _LABEL_WORDS.get(value.strip().lower(), value)
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise UserError(
        f"{name!r} = {shown(value)}", where=record.where,
        rule="a judgement is true (a good answer) or false", advice="Fix or remove the record",
    )  # fmt: skip


def _single(record: Record, given: str | None) -> _Variant:
    """The one answer of a record with a judgement."""
    value = _without(record.value, *_LABELS)
    if "completion" in value and given in (None, "text", "messages"):
        return _prompted(record, _without(value, "completion"), value["completion"], given,
                         "completion")  # fmt: skip
    forms = {"messages": "messages", "sharegpt": "conversations", "alpaca": "output"}
    for form, key in forms.items():
        if key in value and given in (None, form):
            return _Variant(form, value)
    raise _unknown(record, _JUDGED_RULE, given)


def _variants(record: Record, given: str | None) -> tuple[_Variant, _Variant]:
    """The record with the chosen answer, and with the rejected one."""
    value = record.value
    if "messages" in value and given in (None, "messages"):
        for key in ("rejected_response", "rejected_messages"):
            if not is_absent(value.get(key)):
                return _of_swift(record, key)
    if not ("chosen" in value and "rejected" in value):
        raise _unknown(record, _PAIR_RULE, given)
    for form, key in (("sharegpt", "conversations"), ("alpaca", "instruction")):
        if key in value and given in (None, form):
            read = _of_sharegpt if form == "sharegpt" else _of_alpaca
            return read(record, "chosen"), read(record, "rejected")
    if given in ("sharegpt", "alpaca"):
        raise _unknown(record, _PAIR_RULE, given)
    return _of_trl(record, given)


def _of_alpaca(record: Record, name: str) -> _Variant:
    answer = _turn_text(record, name)
    return _Variant("alpaca", {**_without(record.value, *_PAIR_FIELDS, "output"), "output": answer})


def _of_sharegpt(record: Record, name: str) -> _Variant:
    answer = record.value[name]
    if isinstance(answer, str):
        answer = {"from": "gpt", "value": answer}
    elif isinstance(answer, dict) and "from" not in answer and "role" in answer:
        answer = {"from": answer["role"], "value": answer.get("content")}
    earlier = record.value["conversations"]
    turns = [*(earlier if isinstance(earlier, list) else [earlier]), answer]
    return _Variant("sharegpt", {**_without(record.value, *_PAIR_FIELDS), "conversations": turns})


def _turn_text(record: Record, name: str) -> str:
    """An answer as text: a string, or one turn with `value` or `content`."""
    answer = record.value[name]
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, dict):
        answer = answer.get("value", answer.get("content"))
    return _text(record, name, answer)


def _of_swift(record: Record, key: str) -> tuple[_Variant, _Variant]:
    value, messages = record.value, record.value["messages"]
    if not isinstance(messages, list) or not messages:
        raise _wrong(record, "messages", messages, "must be a list of messages with an answer")
    rejected = value[key]
    if isinstance(rejected, str):
        rejected = [*messages[:-1], {"role": "assistant", "content": rejected}]
    return _conversational(record, _without(value, *_PAIR_FIELDS, "messages"), messages, rejected)


def _of_trl(record: Record, given: str | None) -> tuple[_Variant, _Variant]:
    value = record.value
    chosen, rejected = value["chosen"], value["rejected"]
    rest = _without(value, *_PAIR_FIELDS)
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise _wrong(record, "rejected", rejected, f"must be of the kind of 'chosen', "
                     f"{kind_of(chosen)}")  # fmt: skip
    if isinstance(chosen, str) and isinstance(rejected, str) and "prompt" not in value:
        dialogues = [_hh_turns(text) for text in (chosen, rejected)]
        if given != "text" and all(dialogues):
            return _conversational(record, rest, *dialogues)
        start = _shared_text(chosen, rejected)
        if not start or _prompt_elsewhere(rest):
            raise _without_prompt(record, _prompt_elsewhere(rest))
        rest["prompt"], chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    elif isinstance(chosen, list) and not isinstance(value.get("prompt"), list):
        asked = value.get("prompt")
        if not _begins_with_question(chosen):
            turn = {"role": "user", "content": _text(record, "prompt", asked)}
            chosen, rejected = [turn, *chosen], [turn, *rejected]
        return _conversational(record, _without_repeated(rest, chosen), chosen, rejected)
    return (
        _prompted(record, rest, chosen, given, "chosen"),
        _prompted(record, rest, rejected, given, "rejected"),
    )


def _prompt_elsewhere(rest: Mapping[str, Any]) -> str:
    """The name of a field that seems to be the prompt of a record without `prompt`; else empty."""
    found = (
        name for name, value in rest.items()
        if isinstance(value, str) and value.strip()
        and (name.lower() in _PROMPT_WORDS or did_you_mean(name, ["prompt"]))
    )  # fmt: skip
    return next(found, "")


def _without_prompt(record: Record, elsewhere: str) -> UserError:
    return UserError(
        "there is no 'prompt'", where=record.where,
        rule="an answer follows a prompt: chosen and rejected begin with it, or it is a field of "
        "its own",
        nearest=f"Keys found: {names_of(record.value)}",
        advice=f"Set data_loader.column_map: {{prompt: {elsewhere}}}" if elsewhere else
        "Name its column in data_loader.column_map, or write `prompt` with an empty text for none",
    )  # fmt: skip


def _without_repeated(rest: dict[str, Any], chosen: list[Any]) -> dict[str, Any]:
    """Without the prompt as text, and the chosen dialogue, which data sets of the Hub repeat."""
    repeated = ("prompt", "messages") if rest.get("messages") == chosen else ("prompt",)
    return _without(rest, *repeated)


def _begins_with_question(turns: list[Any]) -> bool:
    first = turns[0] if turns else None
    return isinstance(first, dict) and first.get("role") in ("user", "system", "developer")


def _prompted(
    record: Record, value: dict[str, Any], answer: Any, given: str | None, name: str
) -> _Variant:
    """`prompt` and an answer, both as text or as messages."""
    prompt = value.get("prompt")
    rest = _without(value, "prompt")
    if isinstance(prompt, str) and isinstance(answer, str) and given != "messages":
        return _Variant(
            "text", {**rest, "prompt": prompt, "completion": _text(record, name, answer)}
        )
    if given == "text":
        wrong = name if isinstance(prompt, str) else "prompt"
        raise _wrong(record, wrong, prompt if wrong == "prompt" else answer, "must be a string")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise _wrong(record, "prompt", prompt, "must be a string or a list of messages")
    if isinstance(answer, (str, dict)):
        answer = [{"role": "assistant", "content": answer} if isinstance(answer, str) else answer]
    if not isinstance(answer, list) or not answer:
        raise _wrong(record, name, answer, "must be a string or a list of messages")
    if len(answer) > len(prompt) and answer[: len(prompt)] == prompt:  # repeated in the answer
        answer = answer[len(prompt) :]
    return _Variant("messages", {**rest, "messages": [*prompt, *answer]}, len(answer))


def _conversational(
    record: Record, rest: dict[str, Any], chosen: Any, rejected: Any
) -> tuple[_Variant, _Variant]:
    """Two dialogues with the same beginning, which is the prompt."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(turns, list) or not turns:
            raise _wrong(record, name, turns, "must be a string or a list of messages")
    most = min(len(chosen), len(rejected)) - 1  # the last turn of each is an answer
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if shared == 0:
        raise UserError(
            "the two dialogues have no turn in common", where=record.where,
            rule="both answers of a pair are to the same prompt, the turns that both begin with",
            nearest=f"chosen begins with {shown(chosen[0])}, rejected with {shown(rejected[0])}",
            advice="Add the prompt as `prompt`, or fix the record",
        )  # fmt: skip
    return (
        _Variant("messages", {**rest, "messages": chosen}, len(chosen) - shared),
        _Variant("messages", {**rest, "messages": rejected}, len(rejected) - shared),
    )


def _hh_turns(text: str) -> list[dict[str, Any]]:
    """The turns of a dialogue of Anthropic's HH data; none where it is other text."""
    parts = _HH_TURN.split(text)
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human":
        return []
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": _HH_ROLES[who], "content": text.removeprefix(" ")} for who, text in pairs]


def _shared_text(chosen: str, rejected: str) -> int:
    """Characters of the prompt that two texts begin with; a space before the answers is theirs."""
    shortest = min(len(chosen), len(rejected))
    count = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    return count - (count > 0 and chosen[count - 1] == " ")


def _answer(record: Record, variant: _Variant, strictness: Strictness) -> Answer:
    """The answer of a variant. Raises UserError where it does not end with an answer."""
    if variant.form == "text":
        return _plain(record, variant.value, strictness)
    own = Record(record.where, variant.value, record.has_all_columns)
    conversation = next(iter(conversations_of([own], variant.form, strictness)))
    messages = conversation.messages
    if messages[-1]["role"] != "assistant":
        raise UserError(
            f"the dialogue ends with a turn of {messages[-1]['role']}", where=record.where,
            rule="the answers that are compared end with a turn of the assistant",
            nearest=f"The last turn is {shown(messages[-1]['content'])}",
            advice="Fix or remove the record",
        )  # fmt: skip
    if len(messages) < 2:
        raise UserError(
            "there is no prompt", where=record.where, rule="an answer follows a question",
            advice="Fix or remove the record",
        )  # fmt: skip
    first = len(messages) - variant.answer_turns
    context = {i for i, turn in enumerate(messages[:first]) if turn["role"] == "assistant"}
    return replace(conversation, context_turns=conversation.context_turns | context)


def _plain(record: Record, value: Mapping[str, Any], strictness: Strictness) -> PlainText:
    strictness.check_fields(record, value, ("prompt", "completion"))
    prompt, completion = (_text(record, key, value[key]) for key in ("prompt", "completion"))
    return PlainText(record.where, prompt, completion)


def _text(record: Record, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(record, name, value, "must be a string")
    if wrong := lone_surrogate(value):
        raise surrogate_error(record.where, name, wrong)
    return value


def _without(value: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: found for key, found in value.items() if key not in names}


def _wrong(record: Record, name: str, value: Any, rule: str) -> UserError:
    what = f"{name!r} is missing" if value is None else f"{name!r} = {shown(value)}"
    return UserError(
        what, where=record.where, rule=f"it {rule}",
        nearest=f"Keys found: {names_of(record.value)}", advice="Fix or remove the record",
    )  # fmt: skip


def _unknown(record: Record, rule: str, given: str | None = None) -> UserError:
    form = f" and data_loader.format is {given}" if given else ""
    return UserError(
        f"has the keys {names_of(record.value)}{form}", where=record.where, rule=rule,
        advice="Name its columns in data_loader.column_map"
        + (", or leave format out" if given else ""),
    )  # fmt: skip
