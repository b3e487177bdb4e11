"""Families: what a model type is, and from a configuration to a complete description of a model.

`table.DECODERS` lists the model types that run in the decoder of Slipway, a file each (or a file
for a group that differs in little); `models.module_table` has those that run through their
transformers module. To add one, write a file beside these, list it in `table`, and take its name
out of `module_table`.
"""

from models.families.describe import model_spec, needs_weights, supports_packing
from models.families.table import DECODERS
from models.module_table import TRANSFORMERS_MODULES, UNSUPPORTED
from models.spec import DecoderConfig, ModelConfigError, ModelProblem, ModelSpec, Precision

__all__ = [
    "DECODERS", "TRANSFORMERS_MODULES", "UNSUPPORTED", "DecoderConfig", "ModelConfigError",
    "ModelProblem", "ModelSpec", "Precision", "model_spec", "needs_weights", "supports_packing",
]  # fmt: skip
