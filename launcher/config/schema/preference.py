"""`preference`: training on pairs of answers, or on answers that were judged."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.field import effective, section

PREFERENCE_TRAINERS: dict[str, tuple[str, ...]] = {
    "DPOTrainer": ("dpo", "robust", "ipo", "hinge", "orpo", "simpo", "cpo", "kto"),
    "ORPOTrainer": ("orpo",),
    "KTOTrainer": ("kto",),
    "SimPOTrainer": ("simpo",),
    "CPOTrainer": ("cpo", "simpo"),
}
"""Trainers of preferences to the losses they may have, the usual one first."""
TRAINERS_ELSEWHERE = {
    **{loss: kind for kind, (loss, *_) in PREFERENCE_TRAINERS.items()},
    **dict.fromkeys(("ppo", "grpo", "rlhf", "reward", "rm"), ""),
    **dict.fromkeys(
        ("ppotrainer", "grpotrainer", "rlootrainer", "rewardtrainer", "prmtrainer"), ""
    ),
}
"""Other words for trainers, in lower case, to the trainer; empty: there is none of this kind."""
_LOSSES_ELSEWHERE = {
    "sigmoid": "dpo", "cdpo": "dpo", "slic": "hinge", "kto_pair": "kto",
    **dict.fromkeys(("exo_pair", "nca_pair", "bco_pair", "apo_zero", "apo_down"), ""),
}  # fmt: skip
PREFERENCE_LOSSES = PREFERENCE_TRAINERS["DPOTrainer"]
WITH_REFERENCE = ("dpo", "robust", "ipo", "hinge", "kto")
"""Losses that compare the model with the one that training started from."""
PREFERENCE_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "label_smoothing": ("dpo", "robust", "simpo", "cpo"),
    "simpo_gamma": ("simpo",),
    "sft_weight": ("dpo", "robust", "ipo", "hinge", "orpo", "simpo", "cpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": WITH_REFERENCE,
}
"""Keys of `preference` to the losses that use them; `beta` is used by all."""
PAIRS, JUDGED = "PreferenceDataLoader", "FeedbackDataLoader"
"""Types of data loaders: pairs of answers, and answers with a judgement."""


@dataclass(frozen=True, kw_only=True)
class ReferenceSection:
    """`preference.reference`: the model that the trained one is compared with."""

    weights: str = ""
    """Its weights, a file or a directory. Left out: those that training starts from; below a LoRA
    adapter the base model, which then needs no second pass over the data before training."""


@dataclass(frozen=True, kw_only=True)
class PreferenceSection:
    """`preference`: the loss of trainer.type DPOTrainer, ORPOTrainer, KTOTrainer, SimPOTrainer and
    CPOTrainer."""

    loss: str | None = effective(None, choices=PREFERENCE_LOSSES, words=_LOSSES_ELSEWHERE)
    """`dpo` (with label_smoothing: conservative DPO), `robust` (DPO, unbiased under swapped pairs),
    `ipo`, `hinge`, `orpo`, `simpo`, `cpo`: on pairs. `kto`: on single answers, judged good or bad.
    Left out: that of trainer.type."""
    beta: float | None = effective(None, above=0)
    """How strongly the model is held to its reference; the temperature of simpo and cpo, the weight
    of the odds ratio in orpo. Left out: 0.1, for simpo 2."""
    label_smoothing: float = effective(0.0, minimum=0, maximum=0.499)
    """dpo, robust, simpo, cpo: the share of pairs that may be the wrong way round."""
    simpo_gamma: float = effective(0.5, minimum=0)
    """simpo: the margin that the reward of the chosen answer should have."""
    sft_weight: float | None = effective(None, minimum=0)
    """Weight of the loss of the chosen answer by itself (its mean over the tokens, as `rpo_alpha`
    and `cpo_alpha` of TRL and `pref_ftx` of LLaMA-Factory). Left out: 1 for orpo and cpo, else
    0."""
    desirable_weight: float = effective(1.0, above=0)
    """kto: weight of the loss of good answers."""
    undesirable_weight: float = effective(1.0, above=0)
    """kto: weight of the loss of bad answers."""
    reference: ReferenceSection = section(ReferenceSection)
    """dpo, robust, ipo, hinge, kto: the model to compare with."""
