"""The section about training in FP8."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.field import effective


@dataclass(frozen=True, kw_only=True)
class Fp8Section:
    """`fp8_config`: products of the linear layers in FP8, by torchao (the extra `fp8`)."""

    recipe: str | None = effective(
        None, choices=("tensorwise", "rowwise", "rowwise_with_gw_hp"),
        words={**dict.fromkeys(("dynamic", "tensor", "delayed", "current"), "tensorwise"),
               "row": "rowwise"},
    )  # fmt: skip
    """How operands are scaled to FP8 before each product: with one scale a tensor (fastest), one a
    row, or rows with the gradients of weights in high precision (most accurate). Weights, optimizer
    and checkpoints stay as they are. Left out: no FP8. Not bit by bit what bfloat16 computes, so it
    needs `deterministic: False`, and a GPU of compute capability 8.9 or more."""
    exclude: list[str] = effective([])
    """Linear layers that are left as they are: regular expressions for their names in a layer
    (`self_attn\\..*`, `mlp.down_proj`). Always left: the head, router and experts, adapters, and
    sizes on a rank that are not multiples of 16."""
    emulate: bool = False
    """Round to FP8 and multiply in high precision, on any device: slow, to try things out."""
