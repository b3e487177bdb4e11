"""Tiny models in the forms that MindFormers wrote, each beside its Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parents[1] / "fixtures" / "mindformers"
ALL = Path(__file__).parents[3] / "shared" / "fixtures" / "mindformers"
"""The whole tree of golden weights, where a checkout has it beside it."""
PLAIN_QKV = ("--mindformers_qkv_order", "plain")
PLAIN_MLP = ("--mindformers_mlp_order", "plain")
OF_1_9 = ("--mindformers_qkv_order", "group", "--mindformers_mlp_order", "pair")


@dataclass(frozen=True)
class Twin:
    """One form of a family."""

    family: str
    form: str
    options: tuple[str, ...] = ()
    """What the files do not show, as the command line says it."""

    @property
    def name(self) -> str:
        """`qwen3-mcore`."""
        return f"{self.family}-{self.form}"


def folder_of(family: str, form: str) -> Path:
    """The folder of a form; `hf` is the Hugging Face directory."""
    return next((f for root in (HERE, ALL) if (f := root / family / form).is_dir()), HERE)


_LISTED = (
    *(Twin("llama2", form) for form in ("legacy", "legacy_concat", "online", "online_concat")),
    *(Twin("llama3_1", form) for form in ("legacy_concat", "legacy", "online", "online_concat")),
    *(Twin("qwen2_5", form) for form in ("online_concat", "legacy_concat", "legacy", "online")),
    *(Twin("mixtral", form) for form in ("legacy", "legacy_gmm")),
    Twin("qwen3", "mcore", OF_1_9),
    Twin("qwen3", "mcore_contiguous", (*PLAIN_QKV, *PLAIN_MLP)),
    Twin("qwen3_moe", "mcore"),
    Twin("qwen3_moe", "mcore_contiguous", PLAIN_QKV),
    *(Twin("deepseek_v3", form) for form in ("legacy", "legacy_bmm", "mcore", "mcore_old")),
    *(Twin("glm4_9b", form) for form in ("legacy", "legacy_concat", "online_concat")),
    Twin("glm4_9b", "legacy_rearranged", ("--mindformers_rearranged_rope", "True")),
    *(Twin("telechat2", form) for form in ("legacy", "legacy_concat")),
)
TWINS = tuple(twin for twin in _LISTED if folder_of(twin.family, twin.form) != HERE)
"""Those whose files are here."""
