"""The table of families with a native decoder."""

from __future__ import annotations

from models.families.deepseek import DEEPSEEK_V3
from models.families.family import Family
from models.families.glm import GLM, GLM4
from models.families.glm4_moe import GLM4_MOE
from models.families.gpt_oss import GPT_OSS
from models.families.llama import LLAMA, MISTRAL
from models.families.mixtral import MIXTRAL
from models.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from models.families.telechat import TELECHAT

DECODERS: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "deepseek_v3": DEEPSEEK_V3,
    "glm": GLM,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "telechat": TELECHAT,
}
"""model_type -> family. Qwen2.5 is qwen2."""
