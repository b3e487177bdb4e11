"""Names that MindSpore and MindFormers put into files of weights."""

from __future__ import annotations

GRADIENTS = "accu_grads"
"""Prefix of accumulated gradients, which are saved and never read."""
STEPS = ("step_num", "global_step")
"""Steps done: of the run, and of the optimizer, which skips steps that overflowed."""
BATCH, SCALE, EPOCH = "global_batch_size", "loss_scale", "epoch_num"
SCALARS = frozenset({
    *STEPS, BATCH, SCALE, EPOCH, "learning_rate",
    "current_iterator_step", "last_overflow_iterator_step",
})  # fmt: skip
"""Numbers of a run that lie beside the tensors of the model."""
COUNTERS = (EPOCH, "step_num", "global_step")
"""Scalars that are equal in all files of one save."""
TRANSIENT = (
    GRADIENTS, "fi_parameter", "zeros_k_pe", "zeros_k_nope", "zeros_value_states", "_cache",
    "_device_local_norm", "_device_local_loss", "expert_load", "max_logits_val",
)  # fmt: skip
"""Parts of the names of run-time buffers; MindFormers itself does not load them."""
