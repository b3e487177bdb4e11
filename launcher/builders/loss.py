"""The loss of a job: of logits, or of the input of the head in chunks of tokens; compiled or not.

Owns the choice, which depends on sizes that the configuration gives, so that it is the same for
every batch of a run.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from launcher.builders.job import Job
from launcher.builders.open_dataset import seq_length
from launcher.config.derived import evaluation_datasets, micro_batch_size
from launcher.parallel import vocabulary
from launcher.parallel.compiling import Compiler
from launcher.train.head_loss import HeadLoss, chunk_size, saves_memory
from launcher.train.loss import Loss, compiled_token_loss_sum, token_loss_sum
from models.decoder import Decoder
from models.layers import Linear, TiedHead


def loss_of(job: Job, last: nn.Module, compiler: Compiler | None) -> Loss:
    """The loss of the output of `last`, the module of this rank with the last layers: it is made to
    return the input of its head where the loss applies the head in chunks."""
    logits = token_loss_of(job, compiler)
    if not isinstance(last, Decoder) or not last.ends:
        return logits
    chunk = _chunk_tokens(job, last)
    if not chunk:
        return logits
    last.applies_head = False
    return HeadLoss(last.head_module, logits, chunk)


def token_loss_of(job: Job, compiler: Compiler | None) -> Loss:
    """The loss of the logits that the head computes: all columns, or those of this rank."""
    group = job.meshes.group("tp")
    if group is not None:
        return partial(vocabulary.token_loss_sum, group=group)
    if compiler is None:
        return token_loss_sum
    return compiled_token_loss_sum(partial(compiler.compiled, dynamic=None))


def _chunk_tokens(job: Job, model: Decoder) -> int:
    """Tokens of a chunk; 0: all logits at once."""
    written, head = job.config.loss_chunk_tokens, model.head_module
    if _drops(head):
        if written:
            job.log(
                "accepted, no effect: loss_chunk_tokens: dropout of the adapter on the head needs "
                "full rows"
            )
        return 0
    if written is not None:
        return written
    # The shape follows from the layout: a view of sharded rows would gather them.
    chunk = chunk_size(model.config.vocab_size // job.mesh.tp, job.world.device)
    saves = saves_memory(
        tokens_of_batch(job), chunk, model.config.hidden_size, job.compute_dtype,
        trained=head.weight.requires_grad,
    )  # fmt: skip
    return chunk if saves else 0


def tokens_of_batch(job: Job) -> int:
    """Tokens of a micro-batch on this rank, after sequence parallelism has gathered them: of
    training, or of evaluation where there is no training data."""
    config = job.config
    section, samples = config.train_dataset, micro_batch_size(config)
    if section is None:
        section = next(iter(evaluation_datasets(config).values()), None)
        samples = config.runner_config.batch_size
    if section is None:
        return 0
    sequences = 1 if config.preference_loss is None else 2
    return samples * sequences * seq_length(job, section) // job.mesh.cp


def _drops(head: Linear | TiedHead) -> bool:
    adapter = head.adapter if isinstance(head, Linear) else None
    return adapter is not None and bool(adapter.dropout)
