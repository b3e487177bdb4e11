"""Complete weights as MindSpore stores them: safetensors files and `param_name_map.json`."""

from __future__ import annotations

from launcher.mindspore.names import GRADIENTS, SCALARS, STEPS
from launcher.weights.forms import CompleteForm

FORM = CompleteForm(
    name="mindspore",
    index="param_name_map.json",
    metadata="ms",
    also=("ms.ckpt",),
    indent=4,
    lists_optimizer=True,
    may_be_flat=True,
    transient=(GRADIENTS,),
    scalars=SCALARS,
    steps=STEPS,
)
