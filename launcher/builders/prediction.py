"""Prediction: the generation settings, the prompts as tokens, and generating on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from launcher.builders.chat_template import (
    ANSWER_TOKENS,
    ChatSetup,
    chat_setup,
    encode_prompts,
)
from launcher.builders.job import Job
from launcher.builders.model import predict_mesh
from launcher.config.checks.check import Check
from launcher.config.checks.generation import read_generation_file
from launcher.data.strictness import Strictness
from launcher.generation.forward import Forward
from launcher.generation.loop import Watch
from launcher.generation.settings import GenerationSettings, generation_settings
from launcher.layout.mesh import Mesh
from launcher.parallel.consistency import check_same
from launcher.predict.answers import answer_message, with_answer
from launcher.predict.encode import EncodedPrompt
from launcher.predict.generate import Generation, generate, positions_of, text_limits
from launcher.predict.prompts import Prompt
from launcher.predict.results import RESULT_FILE
from launcher.predict.stream import Stream
from launcher.weights.source import Source

Share = list[tuple[int, Generation]]
PREDICT_BATCH = 8
"""Texts in a batch when predict_batch_size is not set."""


def prepare_prompts(
    job: Job, source: Source | None, prompts: Sequence[Prompt], strictness: Strictness
) -> tuple[ChatSetup, list[EncodedPrompt]]:
    """The prompts as the model reads them, and how they were encoded; the log has how. Called by
    all ranks together. Raises `UserError`, also where machines differ in their tokenizers.

    `source`: the weights. `strictness`: that of `read_prompts`.
    """
    setup = chat_setup(job, source, settings(job), strictness, ends_are_set=ends_are_set(job))
    encoded = encode_prompts(setup, prompts)
    check_same(
        job.world, {**asdict(setup.settings), "tokens of the prompts": [p.ids for p in encoded]},
        rule="all ranks need the same settings, which each machine reads from its own files",
        advice="Copy the same model folder and the same tokenizer to every machine",
    )  # fmt: skip
    for line in setup.describe(encoded):
        job.log(line)
    return setup, encoded


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The prompts that are continued alike: the texts, or the conversations."""

    numbers: list[int]
    """Of its prompts, among all."""
    prompts: list[EncodedPrompt]
    settings: GenerationSettings
    room: int | None
    """New tokens of each where no length is configured; None: `settings` has the length."""


def _groups(job: Job, setup: ChatSetup, prompts: Sequence[EncodedPrompt]) -> list[_Group]:
    """Texts and conversations apart, as they end differently: how a prompt is continued must not
    depend on the others."""
    groups = []
    for answers in (False, True):
        numbers = [n for n, p in enumerate(prompts) if (p.conversation is not None) == answers]
        if numbers:
            groups.append(_Group(
                numbers=numbers,
                prompts=[prompts[number] for number in numbers],
                settings=setup.settings if answers else settings(job),
                room=answer_room(job) if answers else None,
            ))  # fmt: skip
    return groups


def check_lengths(
    job: Job, forward: Forward, setup: ChatSetup, prompts: Sequence[EncodedPrompt]
) -> None:
    """Check that the model has room for every prompt and its continuation; no weights are needed.
    Raises `UserError`."""
    for group in _groups(job, setup, prompts):
        text_limits(group.prompts, group.settings, positions_of(forward.model), group.room)


def continue_prompts(
    job: Job, forward: Forward, setup: ChatSetup, prompts: Sequence[EncodedPrompt],
    batch_size: int, watch: Watch | None = None,
) -> list[Generation]:  # fmt: skip
    """Every prompt with its continuation, on the main rank; each rank continues its share.

    Called by all ranks together. Raises `UserError` for a prompt that is too long.
    """
    seed, mesh = job.config.generation_config.seed, predict_mesh(job)
    copies = setup.settings.num_return_sequences
    forward.model.eval()
    done: list[tuple[int, Generation]] = []
    for group in _groups(job, setup, prompts):
        found = generate(
            forward,
            job.tokenizer,
            group.prompts,
            group.settings,
            batch_size=batch_size,
            device=job.world.device,
            seed=job.config.seed if seed is None else seed,
            rank=mesh.data_rank(job.world.rank),
            data_parallel=mesh.data_parallel,
            gather=lambda done: _one_of_each_replica(job.world.gather(done), mesh),
            room=group.room,
            numbers=group.numbers,
            watch=watch,
        )
        # Other ranks have none, or their share.
        of_each = [number for number in group.numbers for _ in range(copies)]
        done += [
            (number, answered(setup, generation, prompts[number]))
            for number, generation in zip(of_each, found, strict=False)
        ]
    return [generation for _, generation in sorted(done, key=lambda pair: pair[0])]


def texts_in_batch(job: Job, prompts: Sequence[EncodedPrompt]) -> int:
    """How many texts are generated together."""
    every = len(prompts) * settings(job).num_return_sequences
    return job.config.predict_batch_size or min(every, PREDICT_BATCH)


def answered(setup: ChatSetup, generation: Generation, prompt: EncodedPrompt) -> Generation:
    """The generation of a rendered prompt with its conversation, which ends with the answer."""
    if prompt.conversation is None:
        return generation
    renderer, ends = setup.encoder.renderer, setup.settings.eos_token_ids
    template = renderer.templates.of(prompt.conversation)
    tokens = [token for token in generation.tokens if token not in ends]
    answer = answer_message(renderer.tokenizer, template, prompt.text, tokens)
    return replace(generation, conversation=with_answer(prompt.conversation, answer))


def answer_room(job: Job) -> int | None:
    """New tokens of an answer where no length is configured; None where one is."""
    return None if _sets(job, _LENGTHS) else ANSWER_TOKENS


def ends_are_set(job: Job) -> bool:
    """Whether the user configured the end tokens."""
    return _sets(job, _ENDS)


_LENGTHS = ("max_length", "max_new_tokens")
_ENDS = ("eos_token_id",)


def _sets(job: Job, keys: Sequence[str]) -> bool:
    """Whether the user configured one of some generation settings; lengths also by the file of the
    model."""
    written, model, file = _sources(job)
    sources = (written, model, file) if keys == _LENGTHS else (written, model)
    return any(source.get(key) is not None for source in sources for key in keys)


def _one_of_each_replica(shares: list[Share], mesh: Mesh) -> list[Share]:
    """What one rank of each replica has: all ranks of a replica have the same."""
    at = map(mesh.coordinates, range(mesh.world_size))
    return [share for share, a in zip(shares, at, strict=True) if a["tp"] == a["pp"] == 0]


def settings(job: Job) -> GenerationSettings:
    """The settings in YAML, else those in generation_config.json, else the defaults."""
    return generation_settings(
        *_sources(job), tokenizer=job.tokenizer, hf_config=job.spec.hf_config
    )


def _sources(job: Job) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
    """Generation settings, highest priority first: in generation_config, in model_config, in
    generation_config.json."""
    section = job.config.generation_config
    written: dict[str, Any] = {
        field.name: getattr(section, field.name)
        for field in fields(section)
        if job.provenance.is_written(f"generation_config.{field.name}")
    }
    check = Check(config=job.config, provenance=job.provenance, world_size=None)
    return written, job.spec.generation, read_generation_file(check).values


def open_stream(job: Job, prompts: Sequence[EncodedPrompt]) -> Stream | None:
    """Where the only text is printed while it is generated; None: nowhere. Called by
    all ranks together: those that do not print watch too."""
    wanted, texts = job.config.stream, len(prompts) * settings(job).num_return_sequences
    if wanted is None:
        wanted = bool(job.world.from_main(job.console.live)) and texts == 1
    elif wanted and texts > 1:
        job.log(f"stream: True has no effect: {texts} texts are generated together")
        wanted = False
    if not wanted:
        return None
    return Stream(job.tokenizer, prompts[0], job.console.write if job.world.is_main else None)


def result_path(job: Job) -> Path:
    """The file of the result."""
    return Path(job.config.save_file or job.output_dir / RESULT_FILE)
