"""Precisions that MindFormers names and the implementation does not have as a key.

Owns the keys beyond those of `models.keys.PRECISIONS`. The residual stream has the compute dtype,
the router scores in float32: another value is accepted and noted, it is never an error.
"""

from __future__ import annotations

from launcher.mindspore.model_section.keys import ModelKeys

_REASONS = {
    "the residual stream has the compute dtype": (
        "res_dtype", "residual_dtype", "fp32_residual_connection",
    ),
    "embeddings have the dtype of the parameters": ("embedding_init_type", "embedding_init_dtype"),
    "routers score experts in float32": ("router_dense_type", "moe_router_dtype"),
    "softmax is computed in float32": ("attention_softmax_in_fp32",),
    "norms are fused by the compiler": ("fused_rms_norm", "fused_norm", "rmsnorm_compute_2d"),
}  # fmt: skip

KEYS = tuple(name for names in _REASONS.values() for name in names)


def translate(keys: ModelKeys) -> None:
    """Drop the keys that have no effect."""
    for why, names in _REASONS.items():
        for name in names:
            if not keys.is_own(name):
                keys.drop(name, why)
