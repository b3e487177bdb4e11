"""The adapter that a configuration describes."""

from __future__ import annotations

from launcher.config.schema import Config
from models.lora_config import LoraConfig


def lora_of(config: Config) -> LoraConfig | None:
    """The adapter of the configuration; None: the full model is trained."""
    section = config.pet_config
    if not section.is_on:
        return None

    def names(value: str | list[str]) -> str | tuple[str, ...]:
        return value if isinstance(value, str) else tuple(value)

    return LoraConfig(
        rank=section.lora_rank,
        alpha=section.lora_alpha,
        dropout=section.lora_dropout,
        target_modules=names(section.target_modules),
        exclude_modules=names(section.exclude_modules),
        modules_to_save=tuple(section.modules_to_save),
        use_rslora=section.use_rslora,
        use_dora=section.use_dora or section.pet_type == "dora",
        layers=None if section.layers_to_transform is None else tuple(section.layers_to_transform),
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
    )
