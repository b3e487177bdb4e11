"""What a table of names depends on beside the sizes: choices that the files may not show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user knows about the files; None: by the files."""

    qkv_order: str | None = None
    """`group` (per key/value group: its query heads, key, value) or `plain` (query, key, value)."""
    mlp_order: str | None = None
    """`pair` (row j of gate, row j of up) or `plain` (gate, up)."""
    tensor_parallel: int | None = None
    """Degree of the run that wrote plain orders: they are plain within each of its ranks."""
    use_gmm: bool | None = None
    """Whether stacked experts have input rows and output columns (`moe_config.use_gmm`)."""
    rearranged_rope: bool | None = None
    """Whether rows of query and key are stored even ones first (`use_rearrange_rope`)."""


@dataclass(frozen=True, kw_only=True)
class Orders:
    """The choices made. Values as in `Options`."""

    qkv: str = "group"
    mlp: str = "pair"
    blocks: int = 1
    gmm: bool = False
    rearranged: bool = False
    experts: str = "two dims"
    """Form of grouped experts that is written, a key of `stacks.FORMS`."""
