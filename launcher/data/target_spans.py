"""Which characters of a rendered conversation count for the loss.

Owns the choice between `{% generation %}` blocks and the search of `answers`. Invariants: a learnt
turn has its first character and its end mark; white space that the template writes behind the mark
is context; an answer behind other text than predict renders before it is counted.
"""

from __future__ import annotations

from launcher.data.answers import (
    answer_not_found,
    answer_span,
    block_span,
    has_end_mark,
    turn_span,
)
from launcher.data.conversations import Conversation
from launcher.data.rendering_check import Rendering
from launcher.data.tally import Tally
from launcher.data.templates import ChatTemplate, Span

INSIDE_TOKEN = "they begin inside a token of the text before them"
REWRITTEN = "the template writes earlier turns in another way"
"""Why answers follow other tokens in their row than in predict."""


def target_spans(rendering: Rendering, tally: Tally) -> tuple[str, list[Span]]:
    """The rendered conversation and the spans of what counts for the loss, in order.

    With generation blocks the text is rendered again, by the function that marks them.
    Raises UserError where a turn cannot be found.
    """
    conversation, template = rendering.conversation, rendering.template
    learnt = conversation.learnt_turns
    answers = [index for index in learnt if _role(conversation, index) == "assistant"]
    if template.marks_answers:
        text, spans = _block_spans(rendering, answers, tally)
    else:
        text, spans = rendering.text, _answer_spans(rendering, answers, tally)
    unmarked = sum(not has_end_mark(text, span, template) for span in spans)
    if unmarked:
        tally.without_end_mark.add(conversation.where)
    spans += [
        turn_span(text, conversation, template, index)
        for index in learnt
        if _role(conversation, index) != "assistant"
    ]
    return text, sorted(spans)


def _role(conversation: Conversation, index: int) -> str:
    role: str = conversation.messages[index]["role"]
    return role


def _answer_spans(rendering: Rendering, answers: list[int], tally: Tally) -> list[Span]:
    found = []
    for index in filter(None, answers):  # a first answer, without a question, is context
        span, as_in_predict = answer_span(
            rendering.text, rendering.conversation, rendering.template, index
        )
        found.append(span)
        if not as_in_predict:
            tally.other_context.add(REWRITTEN, rendering.conversation.where)
    return found


def _block_spans(rendering: Rendering, answers: list[int], tally: Tally) -> tuple[str, list[Span]]:
    conversation, template = rendering.conversation, rendering.template
    text, spans = template.render_marked(conversation, conversation.messages)
    if len(answers) < sum(message["role"] == "assistant" for message in conversation.messages):
        turns = _turns_of_blocks(conversation, template, len(spans))
        spans = [span for span, turn in zip(spans, turns, strict=True) if turn in answers]
    for index in filter(None, answers):
        prompt = template.render(conversation, conversation.messages[:index], prompt=True)
        if not text.startswith(prompt):
            tally.other_context.add(REWRITTEN, conversation.where)
        else:  # what predict feeds is context, also where a block begins with a part of it
            spans = [
                (len(prompt), end) if begin < len(prompt) < end else (begin, end)
                for begin, end in spans
            ]
    return text, [block_span(text, span, template) for span in spans]


def _turns_of_blocks(conversation: Conversation, template: ChatTemplate, blocks: int) -> list[int]:
    """The turn (index of `messages`) that adds each generation block."""
    turns: list[int] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            _, spans = template.render_marked(conversation, conversation.messages[: index + 1])
            turns += [index] * (len(spans) - len(turns))
    if len(turns) != blocks:
        raise answer_not_found(conversation.where, max(conversation.context_turns, default=0))
    return turns
