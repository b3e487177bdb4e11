"""An adapter and its base: the weights a job starts from, and what its checkpoints record of them.

Owns the choice of the base and the entry `adapter` of state files. Checkpoints of a run with an
adapter hold the adapter alone; the base is named there, by its path and a fingerprint, and found
again: in pretrained_model_dir, else at that path. Invariant: where a fingerprint is known, only a
base with the same one is used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.builders.adapter_config import adapter_config
from launcher.builders.job import Job
from launcher.checkpoint.resolve import open_complete_weights, open_weights
from launcher.errors import UserError
from launcher.parallel.all_ranks import on_all_ranks
from launcher.train.run import TrainRun
from launcher.weights.adapters.config import DEFAULTS, unknown_fields
from launcher.weights.adapters.found import ADAPTER, Base, FoundAdapter, entry_of, state_of_save
from launcher.weights.adapters.peft_files import open_peft
from launcher.weights.content import content_of
from launcher.weights.source import Source, holds_complete
from models.build import tied_names
from models.lora import has_transposed_adapters


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a job starts from."""

    source: Source | None
    """Of the model, that is the base of an adapter; None: random, from `base.seed`."""
    adapter: Source | None = None
    """Of the adapter; None: there is none, or a new one."""
    base: Base = field(default_factory=Base)
    """What checkpoints record about `source`, where there is an adapter."""

    @property
    def trained(self) -> Source | None:
        """Of the two, what was trained last."""
        return self.adapter or self.source

    @property
    def path(self) -> Path | None:
        """Where they are; None for random ones."""
        return None if self.trained is None else self.trained.path

    @property
    def inputs(self) -> set[Path]:
        """Their files."""
        sources = [source for source in (self.source, self.adapter) if source is not None]
        return {file for source in sources for file in source.headers}


def open_adapter(job: Job, found: FoundAdapter) -> Source:
    """The tensors of an adapter on disk, by the names of rank files. Called by all ranks together;
    raises `UserError`."""
    if found.is_peft:
        source = on_all_ranks(
            job.world, lambda: open_peft(found.path, job.spec.family, found.config)
        )
        if unknown := unknown_fields(found.config):
            job.log(f"{found.file}: not known, no effect: {', '.join(unknown)}")
    else:
        source = open_weights(found.path, job.world, job.log)
        on_all_ranks(job.world, lambda: _check_entry(found, source))
    job.log(f"adapter: {found.path}")
    return source


def _check_entry(found: FoundAdapter, source: Source) -> None:
    """Check that the save that is read has the adapter that the model was built with."""
    first = min(source.headers)
    entry = entry_of(state_of_save(first), found.path, first)
    if entry is None or entry.config != found.config:
        raise UserError(
            f"{first} is not of the save that {found.file} describes",
            rule="an adapter is built as its state file describes it",
            advice="Name a rank file of the save",
        )


def base_of(job: Job, base: Base, candidates: Collection[Path]) -> tuple[Source | None, Base]:
    """The weights of the base of an adapter, and what is known of them: in the first of
    `candidates`, or at its recorded path. Called by all ranks together; raises `UserError`."""
    if base.seed is not None:
        return None, base
    places = [path for path in candidates if job.world.from_main(path.exists())]
    recorded = Path(base.path) if base.path else None
    if recorded is not None and job.world.from_main(recorded.exists()):
        places += [recorded] if recorded.resolve() not in {p.resolve() for p in places} else []
    others = []
    for path in places:
        source = _opened(job, path)
        content = fingerprint(job, source)
        if not base.content or not content or content == base.content:
            job.log(f"base of the adapter: {path}" + (f" ({content})" if content else ""))
            same = recorded is not None and path.resolve() == recorded.resolve()
            known = base if same and base.content else _base(path, source, content)
            return source, known
        others.append(f"{path} has {content}")
    raise _no_base(job, base, others)


def _opened(job: Job, path: Path) -> Source:
    if path.is_dir() and holds_complete(path):
        return open_complete_weights(path, job.world, job.log)
    return open_weights(path, job.world, job.log)


def _no_base(job: Job, base: Base, others: list[str]) -> UserError:
    key = "pretrained_model_dir"
    if not others:
        known = (
            f"its base was {base.path}, and is not there" if base.path else "its base is unknown"
        )
        return UserError(
            f"there are no weights for the base of the adapter: {known}",
            where=job.provenance.nearest(key), rule="an adapter is a change of a model",
            advice=f"Set {key} to the directory of that model",
        )  # fmt: skip
    return UserError(
        f"the base is not that of the adapter: {', '.join(others)}",
        where=job.provenance.nearest(key),
        rule=f"the adapter was trained on {base.path or 'random weights'} with "
        f"{base.content or f'seed {base.seed}'}",
        advice=f"Set {key} to the directory of that model",
    )


def fingerprint(job: Job, source: Source) -> str:
    """The fingerprint of weights, the same on all ranks; empty where no rank has all files."""
    if source.is_spread:
        return ""
    found = on_all_ranks(job.world, lambda: content_of(source) if job.world.is_main else "")
    return str(job.world.from_main(found))


def base_record(job: Job, source: Source) -> Base:
    """What checkpoints record about the base of a new adapter."""
    path = min(source.headers) if source.kind == "distributed" else source.path
    return _base(path, source, fingerprint(job, source))


def _base(path: Path, source: Source, content: str) -> Base:
    place = min(source.headers) if source.kind == "distributed" else path
    return Base(path=str(place.resolve()), content=content)


def record_adapter(run: TrainRun, job: Job, base: Base) -> None:
    """Put the entry of the adapter, if there is one, into the metadata for the state files of a
    run."""
    if job.spec.lora is None:
        return
    built, saved = run.model, run.shapes_in_files(optimizer=False)
    names = tied_names(built.parts.modules[-1])
    tied = {alias: name for alias, name in names.items() if name in saved}
    config = adapter_config(
        job.spec, built.layout.shapes, built.mappings_of, tied=tied,
        transposed=any(map(has_transposed_adapters, built.parts.modules)),
    )  # fmt: skip
    named = {"base_model_name_or_path": base.path or None}
    run.metadata[ADAPTER] = {"config": config | named, "base": base.as_json(), "tied": tied}


def saved_base(job: Job, state: Mapping[str, Any], where: str) -> Base | None:
    """The base in the state file of a checkpoint with an adapter; None for one of a full model.
    Raises `UserError` where the run has an adapter and the checkpoint has none, or vice versa."""
    found = entry_of(state, Path(where), Path(where))
    if (found is None) == (job.spec.lora is None):
        return None if found is None else found.base
    if found is None:
        raise UserError(
            f"{where} is of a run without an adapter",
            where=job.provenance.nearest("pet_config"),
            rule="a run that resumes trains what its checkpoint has",
            advice="To begin an adapter on its weights, give them as load_checkpoint, with "
            "run_mode finetune and resume_training: False",
        )
    raise UserError(
        f"{where} holds an adapter, and the configuration has none",
        where=job.provenance.nearest("pet_config"),
        rule="a run that resumes trains what its checkpoint has",
        advice="Write the pet_config of that run; to train the full model, merge the adapter into "
        "its base first (python -m launcher.tools.merge_lora)",
    )


def check_same_adapter(job: Job, run: TrainRun, state: Mapping[str, Any], where: str) -> None:
    """Check that the adapter of a run that resumes is that of its checkpoint."""
    found = entry_of(state, Path(where), Path(where))
    if found is None:
        return
    present = run.metadata[ADAPTER]["config"]
    for name in DEFAULTS:
        before, now = found.config.get(name), present.get(name)
        if before != now and name != "lora_dropout":
            raise UserError(
                f"the adapter has {name} = {now!r}",
                where=job.provenance.nearest(f"pet_config.{_KEYS.get(name, name)}"),
                rule=f"that of the checkpoint {where} has {before!r}",
                advice="Write the pet_config of that run",
            )


_KEYS = {"r": "lora_rank"}
"""Field of adapter_config.json to the key of pet_config, where they differ."""
