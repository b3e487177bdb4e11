"""Families: the supported model types, and the step from a configuration to a model description.

`table.DECODERS` lists the model types with a native decoder, one file a family or group of similar
families; `models.module_table` lists those that run through their transformers module. To add one,
write a file here, list it in `table`, and remove its name from `module_table`.
"""

from models.families.describe import model_spec, needs_weights, supports_packing
from models.families.table import DECODERS
from models.module_table import TRANSFORMERS_MODULES, UNSUPPORTED
from models.spec import DecoderConfig, ModelConfigError, ModelProblem, ModelSpec, Precision

__all__ = [
    "DECODERS", "TRANSFORMERS_MODULES", "UNSUPPORTED", "DecoderConfig", "ModelConfigError",
    "ModelProblem", "ModelSpec", "Precision", "model_spec", "needs_weights", "supports_packing",
]  # fmt: skip
