"""Weights under names of other programs, for a model with Hugging Face names.

Owns the question whether some known translation applies; what they are is up to the entries of
`launcher.extensions.NAME_TRANSLATIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.extensions import NAME_TRANSLATIONS, installed
from launcher.weights.forms import may_be_foreign
from launcher.weights.log import Log
from launcher.weights.source import Source


@dataclass(frozen=True)
class Named:
    """Weights under the names of another program."""

    source: Source
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of their files about them."""


KEYS = (
    "mindformers_qkv_order", "mindformers_mlp_order", "mindformers_tensor_parallel",
    "mindformers_use_gmm", "mindformers_rearranged_rope",
)  # fmt: skip
"""Keys of the configuration that describe what files do not show."""
COMPLETE = "complete"
"""Key of a conversion, which no load follows: the weights must be all of a model and nothing else.
"""


def under_hugging_face_names(
    source: Source, config: Mapping[str, Any] | None, keys: Mapping[str, Any], log: Log
) -> Source:
    """`source` under Hugging Face names; itself where it has them, or names that nothing knows.

    `config`: the content of config.json; None where it is not known, names are kept then. `keys`:
    values of `KEYS`, None or absent where the files decide, and `COMPLETE`. Raises `UserError`
    where names are known and do not fit the model.
    """
    if not may_be_foreign(source.tensors):
        return source
    for translate in installed(NAME_TRANSLATIONS).values():
        source = translate(source, config, keys, log)
    return source
