"""Training on preferences: trainer and loss, the arguments of a loss, and the data it needs."""

from __future__ import annotations

from tests.config.tables import Error, Row

TRAINER = "  type: CausalLanguageModelingTrainer\nprocessor"
LOADER = "    type: TextDataLoader\n    dataset_dir: corpus\n"
PACKED = "  packing: True\n"


def trained(trainer: str, loader: str = "PreferenceDataLoader", *more: str) -> dict[str, str]:
    """The right configuration with another trainer and data loader."""
    lines = "".join(f"    {line}\n" for line in more)
    return {
        TRAINER: f"  type: {trainer}\nprocessor",
        LOADER: f"    type: {loader}\n    dataset_files: corpus/a.txt\n{lines}",
        PACKED: "",
    }


TABLE = (
    Row(
        name="preferences without their trainer",
        add="preference: {loss: dpo, beta: 0.3}\n",
        errors=(Error("preference.loss is set", at="preference:",
                      near="trainer.type: DPOTrainer"),),
    ),
    Row(
        name="a loss of another trainer",
        replace=trained("KTOTrainer", "PreferenceDataLoader"),
        add="preference: {loss: dpo}\n",
        errors=(Error("preference.loss = 'dpo'", at="preference:",
                      near="trainer.type: DPOTrainer"),),
    ),
    Row(
        name="a loss and a trainer that do not exist",
        replace=trained("DPOTrianer"),
        add="preference: {loss: dop}\n",
        errors=(
            Error("trainer.type = 'DPOTrianer'", at="DPOTrianer", near="DPOTrainer"),
            Error("preference.loss = 'dop'", at="preference:", near="dpo"),
        ),
    ),
    Row(
        name="arguments that a loss does not use",
        replace=trained("SimPOTrainer"),
        add="preference: {desirable_weight: 2, reference: {weights: corpus}}\n",
        errors=(
            Error("preference.desirable_weight = 2.0", at="preference:",
                  near=("preference.beta, preference.label_smoothing, preference.simpo_gamma, "
                        "preference.sft_weight",)),
            Error("preference.reference is set", at="preference:",
                  near=("preference.beta, preference.label_smoothing, preference.simpo_gamma, "
                        "preference.sft_weight",)),
        ),
    ),
    Row(
        name="numbers of a loss on preferences",
        replace=trained("DPOTrainer"),
        add="preference:\n  beta: 0\n  label_smoothing: 0.5\n  sft_weight: -1\n",
        errors=(
            Error("preference.beta = 0", at="beta: 0"),
            Error("preference.label_smoothing = 0.5", at="label_smoothing"),
            Error("preference.sft_weight = -1", at="sft_weight"),
        ),
    ),
    Row(
        name="words of other tools for preferences",
        add="preference:\n  loss_type: sigmoid\n  rpo_alpha: 1\n  ref_model: corpus\n"
        "pref_ftx: 0.1\nkto_chosen_weight: 2\n",
        errors=(
            Error("`preference.loss_type`", at="loss_type", near="preference.loss"),
            Error("`preference.rpo_alpha`", at="rpo_alpha", near="preference.sft_weight"),
            Error("`preference.ref_model`", at="ref_model", near="preference.reference.weights"),
            Error("`pref_ftx`", at="pref_ftx", near="preference.sft_weight"),
            Error("`kto_chosen_weight`", at="kto_chosen", near="preference.desirable_weight"),
        ),
    ),
    Row(
        name="data of another kind for a loss on preferences",
        replace=trained("KTOTrainer") | {PACKED: PACKED},
        errors=(
            Error("train_dataset.data_loader.type = 'PreferenceDataLoader'", at="type: Preference",
                  near="FeedbackDataLoader"),
            Error("train_dataset.packing = True", at="packing: True", near="False"),
        ),
    ),
    Row(
        name="pairs for the next token",
        replace=trained("CausalLanguageModelingTrainer"),
        errors=(Error("train_dataset.data_loader.type = 'PreferenceDataLoader'",
                      at="type: Preference", near="trainer.type: DPOTrainer"),),
    ),
    Row(
        name="plain text as a form of conversations",
        replace={LOADER: "    type: InstructionDataLoader\n    dataset_files: corpus/a.txt\n"
                         "    format: text\n"},
        errors=(Error("train_dataset.data_loader.format = 'text'", at="format: text",
                      near="alpaca, messages, sharegpt"),),
    ),
    Row(
        name="a stream and a column of preferences",
        replace=trained("DPOTrainer", "PreferenceDataLoader", "streaming: True",
                        "column_map: {chosne: good}"),
        errors=(
            Error("train_dataset.data_loader.streaming = True", at="streaming: True",
                  near="HFDataLoader"),
            Error("runner_config.max_steps is missing", at="runner_config:"),
            Error("column_map.chosne = 'good'", at="chosne", near="chosen"),
        ),
    ),
    Row(
        name="weights of a reference that are not there",
        replace=trained("DPOTrainer"),
        add="preference: {reference: {weights: qwne}}\n",
        errors=(Error("preference.reference.weights = 'qwne'", at="preference:", near="qwen"),),
    ),
    Row(
        name="an evaluation without a reference",
        replace=trained("DPOTrainer"),
        add="eval_dataset:\n  data_loader: {type: PreferenceDataLoader, dataset_files: "
        "corpus/a.txt}\n",
        argv=("--run_mode", "eval"),
        errors=(Error("preference.reference.weights is missing"),),
    ),
)  # fmt: skip
