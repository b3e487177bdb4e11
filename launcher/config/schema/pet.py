"""`pet_config`: what is trained instead of the full model."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.field import effective


@dataclass(frozen=True, kw_only=True)
class PetSection:
    """`pet_config`, also under model.model_config: a low-rank adapter (LoRA, DoRA) that is trained
    while the weights of the model stay as they are. Its checkpoints hold the adapter alone."""

    pet_type: str | None = effective(
        None, choices=("lora", "dora"), planned=("qlora", "slora", "ptuning2", "prefixtuning")
    )
    """`lora`, or `dora`: also the lengths of the rows of the weights are trained. Left out:
    lora, if another key of this section is written; else the full model is trained."""
    lora_rank: int = effective(8, minimum=1)
    """Rank of the two matrices of a layer."""
    lora_alpha: float = effective(16.0, above=0)
    """The result of a layer's matrices is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = effective(0.0, minimum=0, maximum=0.999)
    """Dropout on the inputs of the adapter. Not on experts."""
    target_modules: str | list[str] = "all-linear"
    """The layers with an adapter: names or endings of names (`q_proj`), one regular expression for
    full names, or `all-linear`: every linear layer but the head, the router and routed experts.
    Routed experts get one where their projections are named."""
    exclude_modules: str | list[str] = effective([])
    """Layers without an adapter, written as target_modules; `exclude_layers` is the same key."""
    modules_to_save: list[str] = effective([])
    """Modules that are trained in full and saved with the adapter, by name: `embed_tokens`. They
    get no adapter."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(lora_rank) instead."""
    use_dora: bool = False
    """The same as pet_type: dora."""
    layers_to_transform: list[int] | None = None
    """Numbers of the layers with adapters. Left out: all. A full name in target_modules counts in
    any layer."""
    rank_pattern: dict[str, int] = effective({})
    """Ending of a module name, or a regular expression for it -> its rank."""
    alpha_pattern: dict[str, float] = effective({})
    """Ending of a module name, or a regular expression for it -> its lora_alpha."""
    load_adapter: str = ""
    """Adapter to start from: a directory of PEFT, or a checkpoint with an adapter. Its own rank,
    alpha, dropout and layers count."""
    save_peft_adapter: bool = True
    """At the end of training also write the adapter to {output_dir}/adapter, as a directory that
    PEFT opens."""

    @property
    def is_on(self) -> bool:
        """Whether there is an adapter."""
        return self.pet_type is not None
