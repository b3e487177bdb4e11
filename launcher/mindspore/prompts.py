"""The prompts of the data handlers of MindFormers for alpaca records.

Owns their text, which must be equal to the letter for equal tokens: the questions are those of
Stanford Alpaca, the frame of the first one is that of Vicuna. `AlpacaInstructDataHandler` tokenizes
the system sentence, the question and the answer one by one, and ends the answer with the text
`</s>`; `CodeAlpacaInstructDataHandler` tokenizes the question and the bare answer.

Labels here are those of the handlers before any shift, so that they are shifted once: not twice, as
an alpaca handler followed by a PackingHandler does there, nor not at all, as the code handler.
"""

from __future__ import annotations

from collections.abc import Mapping

from launcher.data.prompts import PromptTemplate

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request.\n\n"


def _sections(fields: Mapping[str, str], *, has_input: bool, end: str) -> str:
    text = f"### Instruction:\n{fields['instruction']}\n\n"
    if has_input:
        text += f"### Input:\n{fields['input']}\n\n"
    return f"{text}### Response:{end}"


def _alpaca(fields: Mapping[str, str]) -> tuple[str, ...]:
    has_input = bool(fields["input"])
    paired = ", paired with an input that provides further context" if has_input else ""
    question = f"{_TASK}{paired}. {_WRITE}{_sections(fields, has_input=has_input, end='')}"
    return _SYSTEM, f"USER: {question} "


def _code_alpaca(fields: Mapping[str, str]) -> tuple[str, ...]:
    return (f"{_TASK}. {_WRITE}{_sections(fields, has_input=True, end=chr(10))}",)


ALPACA = PromptTemplate(
    context=_alpaca,
    answer=lambda output: f"ASSISTANT: {output}</s>",
    end="</s>",
    note="labels are shifted once; AlpacaInstructDataHandler and PackingHandler shift them twice",
)
CODE_ALPACA = PromptTemplate(
    context=_code_alpaca,
    answer=lambda output: output,
    note="labels are shifted once; CodeAlpacaInstructDataHandler does not shift them",
)
