"""The chat of a job, on all its ranks: the main one has the terminal, the others follow.

Each answer begins with one broadcast from the main rank, which the others await for as long as its
user thinks. Every rank then makes the same calls; Ctrl-C reaches all at the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.builders.chat_template import ChatSetup, chat_setup
from launcher.builders.job import Job
from launcher.builders.load_weights import find_weights, load_or_init
from launcher.builders.model import build_predicting, predict_mesh
from launcher.builders.prediction import answer_room, ends_are_set, settings
from launcher.data.conversations import Conversation
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.errors import UserError
from launcher.generation.forward import Forward
from launcher.generation.loop import Watch
from launcher.generation.prefix import PrefixCache
from launcher.generation.settings import GenerationSettings
from launcher.parallel.all_ranks import on_all_ranks
from launcher.parallel.model_parts import ModelParts
from launcher.predict.chat import Chat, Limits
from launcher.predict.encode import EncodedPrompt, has_system
from launcher.predict.generate import generate, positions_of
from launcher.predict.prompts import read_prompts
from launcher.predict.results import check_writable
from launcher.predict.session import CHAT_FILE, Session, free_path
from launcher.predict.terminal import Terminal

_WHERE = "the chat"


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """One answer that all ranks generate."""

    prompt: EncodedPrompt
    limit: int
    """Longest length of the text in tokens."""
    number: int
    """Of the answer, from 0: the random draws of each are different."""


def chat(job: Job) -> int:
    """Chat at the terminal of the main rank. Called by all ranks together; raises `UserError`.

    Returns the exit code: 0, or 130 after Ctrl-C at the prompt.
    """
    strictness = Strictness(strict=True, tally=Tally())
    start = on_all_ranks(job.world, lambda: _start(job, strictness))
    if start.messages and job.config.system is not None and has_system(start):
        job.log("--system: the conversation has its own system prompt, which is used instead")
    path = Path(job.config.save_file or job.output_dir / CHAT_FILE).with_suffix(".jsonl")
    check_writable(path)
    weights, chosen = find_weights(job), settings(job)
    trained = None if weights is None else weights.trained
    setup = chat_setup(job, trained, chosen, strictness, ends_are_set=ends_are_set(job))
    if setup.encoder.renderer.settings.is_raw:
        raise UserError(
            "chat_template = 'none'",
            where=job.provenance.where("chat_template"),
            rule="a chat renders its turns with a chat template",
            advice="Leave it out to use the template of the tokenizer",
        )
    forward, layout = build_predicting(job)
    load_or_init(job, ModelParts([forward.model]), layout, weights)
    forward.model.eval()
    if not job.world.is_main:
        return _follow(job, forward, setup.settings)
    return _lead(job, forward, setup, free_path(path), start)


def _start(job: Job, strictness: Strictness) -> Conversation:
    """The conversation that the chat continues: that of --predict_data, else an empty one."""
    if not job.world.is_main or not job.config.input_data:
        return Conversation(where=_WHERE, messages=[])
    prompts = read_prompts(job.config.input_data, strictness)
    last = prompts[-1]  # of a file that a chat has written
    if len(prompts) > 1:
        job.log(f"the last of {len(prompts)} conversations is continued, without those before it")
    if last.conversation is not None:
        return replace(last.conversation, where=_WHERE)
    return Conversation(where=_WHERE, messages=[{"role": "user", "content": last.text}])


def _lead(job: Job, forward: Forward, setup: ChatSetup, path: Path, start: Conversation) -> int:
    """The chat on the main rank."""
    world, prefix, answers = job.world.with_long_timeout(), PrefixCache(), 0

    def respond(prompt: EncodedPrompt, limit: int, watch: Watch) -> Sequence[int]:
        nonlocal answers
        turn = _Turn(prompt=prompt, limit=limit, number=answers)
        answers += 1
        world.from_main(turn)
        return _generated(job, forward, setup.settings, turn, watch, prefix)

    limits = Limits(
        settings=setup.settings, positions=positions_of(forward.model), room=answer_room(job)
    )
    terminal = Terminal(handles_signals=world.size == 1)
    session = Session(path, start, job.config.system)
    job.log(f"chat with {setup.encoder.renderer.name}; /help lists the commands, Ctrl-D ends it")
    if setup.end_mark:
        job.log(f"answers end at {setup.end_mark!r} too, the end of a turn")
    code = Chat(session, setup.encoder, terminal, limits, respond).run()
    world.from_main(code)
    if path.exists():
        job.log(f"written: {path}")
    return code


def _follow(job: Job, forward: Forward, chosen: GenerationSettings) -> int:
    """The part of another rank, until the main one ends the chat with its exit code."""
    world, prefix = job.world.with_long_timeout(), PrefixCache()
    while True:
        turn = world.from_main(None)
        if not isinstance(turn, _Turn):
            return int(turn)
        _generated(job, forward, chosen, turn, lambda tokens: False, prefix)


def _generated(
    job: Job, forward: Forward, chosen: GenerationSettings, turn: _Turn, watch: Watch,
    prefix: PrefixCache,
) -> Sequence[int]:  # fmt: skip
    """The new tokens of an answer on the main rank; each rank does its part."""
    seed, mesh = job.config.generation_config.seed, predict_mesh(job)
    seed = job.config.seed if seed is None else seed
    found = generate(
        forward,
        job.tokenizer,
        [turn.prompt],
        replace(chosen, num_return_sequences=1),
        device=job.world.device,
        seed=seed + turn.number,
        rank=mesh.data_rank(job.world.rank),
        data_parallel=mesh.data_parallel,
        room=turn.limit - len(turn.prompt.ids),
        watch=watch,
        prefix=prefix,
    )
    return found[0].tokens if found else ()
