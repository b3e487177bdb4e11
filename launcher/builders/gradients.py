"""Gradients of a job: which are reduced after the backward pass, and which rank counts them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from launcher.builders.job import Job
from launcher.config.schema import Config
from launcher.parallel.gradients import Gradients
from launcher.parallel.model_parts import ModelParts
from launcher.parallel.tied import TiedReplicas, tied_replicas
from launcher.train.run import BuiltModel
from models.build import input_embedding
from models.plan import EMBEDDING, is_partial


def gradients_of(job: Job, built: BuiltModel) -> Gradients:
    """What this rank does with gradients after its backward pass."""
    named, layout, rank = built.parts.named_parameters(), built.layout, job.world.rank
    trained = {name: p for name, p in named.items() if name in built.trained}
    decoder = job.spec.decoder
    tied_replicated = (
        decoder is not None
        and decoder.tie_word_embeddings
        and job.config.parallel_config.vocab_emb_dp
    )
    sequence = job.config.parallel_config.use_seq_parallel
    partial_names = {
        name for name in trained
        if decoder is not None
        and is_partial(name, layout.spec_of(name), decoder, tp=job.mesh.tp,
                       sequence_parallel=sequence, tied_unsharded_embedding=tied_replicated)
    }  # fmt: skip
    copies = [copy for first, copy in built.parts.replicas()]
    owned = [p for name, p in trained.items() if layout.is_owner(name, rank)]
    return Gradients(
        device=job.world.device,
        owned=owned,
        embedding=_among(owned, built.parts) if watches_health(job.config) else None,
        partial=[p for name, p in trained.items() if name in partial_names]
        + (copies if tied_replicated else []),
        partial_group=job.meshes.group("tp"),
        grad_all_reduce=built.parts.grad_all_reduce,
        tied=_tied_replicas(job, built.parts),
    )


def watches_health(config: Config) -> bool:
    """Whether saves are judged by the norm of the embedding's gradient."""
    monitor = config.checkpoint_monitor
    by_monitor = monitor is not None and monitor.use_checkpoint_health_monitor
    return config.use_checkpoint_health_monitor or by_monitor


def _among(owned: Sequence[nn.Parameter], parts: ModelParts) -> list[nn.Parameter]:
    """The input embedding, if it is among `owned`."""
    tables = {id(input_embedding(module)) for module in parts.modules}
    return [parameter for parameter in owned if id(parameter) in tables]


def _tied_replicas(job: Job, parts: ModelParts) -> TiedReplicas | None:
    if job.split is None or job.spec.decoder is None or not job.spec.decoder.tie_word_embeddings:
        return None
    copies = [p for name, p in parts.all_named() if name == EMBEDDING]
    return tied_replicas(job.mesh, job.split, copies)
