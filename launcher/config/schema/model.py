"""Sections about the model and what surrounds it: tokenizer, generation, the task."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launcher.config.schema.field import effective, no_effect, not_built, section
from launcher.config.schema.preference import PREFERENCE_TRAINERS


@dataclass(frozen=True, kw_only=True)
class TokenizerSection:
    """`processor.tokenizer`."""

    pretrained_model_dir: str = ""
    """Hugging Face tokenizer directory. Left out: the top-level pretrained_model_dir."""
    type: str | None = None
    """Type of a tokenizer given by its files: Qwen2Tokenizer, LlamaTokenizer, LlamaTokenizerFast,
    Llama3Tokenizer, ChatGLM4Tokenizer or TelechatTokenizer."""
    vocab_file: str | None = ""
    """vocab.json, or a tokenizer.model of SentencePiece or tiktoken. It is used instead of a
    directory, also of the top-level pretrained_model_dir."""
    merges_file: str | None = ""
    """merges.txt of a byte-level BPE."""
    tokenizer_file: str | None = ""
    """tokenizer.json, of any type."""
    bos_token: str | None = ""
    """First token of a text. Of a tokenizer given by its files, as all keys below; left out: that
    of the type; null: none."""
    eos_token: str | None = ""
    """Token at the end of a text."""
    pad_token: str | None = ""
    """Padding."""
    unk_token: str | None = ""
    """Token for unknown text."""
    add_bos_token: bool | None = None
    """Whether texts begin with bos_token. Left out: as the type does."""
    add_eos_token: bool | None = None
    """Whether prompts end with eos_token."""
    chat_template: str | None = None
    """Jinja template of conversations."""
    model_max_length: int | None = effective(None, minimum=1)
    """Written into tokenizer_config.json; the length of rows is that of the data section."""
    padding_side: str | None = effective(None, choices=("left", "right"))
    """Written into tokenizer_config.json; training pads right, predict left."""


@dataclass(frozen=True, kw_only=True)
class ProcessorSection:
    """`processor`: from text to tokens and back."""

    tokenizer: TokenizerSection = section(TokenizerSection)
    """The tokenizer."""


@dataclass(frozen=True, kw_only=True)
class GenerationSection:
    """`generation_config` (alias `generation`): how predict continues a prompt.

    A key left out here and written in model.model_config is taken from there.
    """

    max_length: int = effective(20, minimum=1)
    """Maximum length in tokens, prompt included."""
    max_new_tokens: int | None = effective(None, minimum=1)
    """Maximum of new tokens; takes precedence over max_length."""
    min_length: int = effective(0, minimum=0)
    """Minimum length in tokens, prompt included."""
    min_new_tokens: int | None = effective(None, minimum=0)
    """Minimum of new tokens; takes precedence over min_length."""
    do_sample: bool = False
    """True: sample. False: greedy decoding."""
    temperature: float = effective(1.0, above=0)
    """Divides the logits before sampling."""
    top_k: int = effective(50, minimum=0)
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = effective(1.0, above=0, maximum=1)
    """Sample among the most likely tokens whose probabilities sum to this."""
    repetition_penalty: float = effective(1.0, above=0)
    """Above 1: makes tokens already seen less likely."""
    seed: int | None = effective(None, minimum=0)
    """Seed of sampling. Left out: the top-level seed."""
    eos_token_id: int | list[int] | None = None
    """Tokens that end a text. Left out: the model's or the tokenizer's."""
    bos_token_id: int | None = None
    """First token of an empty prompt. Left out: the model's or the tokenizer's."""
    pad_token_id: int | None = None
    """Padding of shorter prompts. Left out: the tokenizer's, else the end token."""
    no_repeat_ngram_size: int = effective(0, minimum=0)
    """No sequence of this many tokens occurs twice; 0: off."""
    bad_words_ids: list[Any] | None = None
    """Lists of token ids that are never generated."""
    suppress_tokens: list[int] | None = None
    """Tokens that are never generated."""
    begin_suppress_tokens: list[int] | None = None
    """Tokens that are never the first new one."""
    min_p: float | None = effective(None, minimum=0, maximum=1)
    """Sample among tokens of at least this share of the likeliest one's probability."""
    typical_p: float = effective(1.0, above=0, maximum=1)
    """Sample among the most typical tokens that have this much probability together; 1: off."""
    epsilon_cutoff: float = effective(0.0, minimum=0, maximum=1)
    """Sample among tokens of at least this probability; 0: off."""
    eta_cutoff: float = effective(0.0, minimum=0, maximum=1)
    """As epsilon_cutoff, lowered where probabilities are spread; 0: off."""
    cuda_graphs: bool = True
    """Launch the kernels of a decoding step together, where the model is on one CUDA device and has
    no experts. False: one by one."""
    num_beams: int = not_built(1, "Set it to 1: greedy or sampled", minimum=1)
    """Beams of beam search."""
    num_beam_groups: int = not_built(1, "Set it to 1", minimum=1)
    """Groups of beams."""
    num_return_sequences: int = effective(1, minimum=1)
    """Texts of each prompt; more than one with do_sample only."""
    encoder_repetition_penalty: float = effective(1.0, above=0)
    """Above 1: makes tokens of the prompt likelier."""
    encoder_no_repeat_ngram_size: int = effective(0, minimum=0)
    """No sequence of this many tokens of the prompt occurs again; 0: off."""
    top_h: float | None = effective(None, above=0, maximum=1)
    """Sample among the most likely tokens that have this share of the entropy."""
    penalty_alpha: float | None = not_built(None, "Remove it", harmless=(0, 0.0))
    """Contrastive search."""
    guidance_scale: float | None = not_built(None, "Remove it", harmless=(1, 1.0))
    """Classifier-free guidance."""
    sequence_bias: list[Any] | None = None
    """Pairs of a list of token ids and a number that is added to the score of the last of them
    where it would follow the others."""
    forced_bos_token_id: int | None = None
    """The token after a prompt of one token, whatever the scores."""
    forced_eos_token_id: int | list[int] | None = None
    """The last token of a text of maximum length, the likeliest of several."""
    exponential_decay_length_penalty: list[Any] | None = None
    """A number of new tokens and a factor: after that many, the score of the end tokens grows by
    the factor with each further one."""
    constraints: Any = not_built(None, "Remove it")
    """Constrained beam search."""
    force_words_ids: Any = not_built(None, "Remove it")
    """Words that must occur."""
    stop_strings: str | list[str] | None = None
    """A text ends with the token that completes one of these; it is kept."""
    max_time: float | None = effective(None, above=0)
    """Seconds after which the texts of a batch end, at the next token."""
    watermarking_config: Any = not_built(None, "Remove it")
    """Marks texts as generated."""
    token_healing: bool = not_built(False, "Set it to False")
    """Replaces the last token of the prompt."""
    dola_layers: Any = not_built(None, "Remove it")
    """Contrasts the scores of layers."""
    renormalize_logits: bool = no_effect(False, "probabilities are always normalised")
    """Normalise after all changes."""
    output_scores: bool = no_effect(False, "predict writes text and token ids")
    """Return scores."""
    output_logits: bool = no_effect(False, "predict writes text and token ids")
    """Return logits."""
    return_dict_in_generate: bool = no_effect(False, "predict writes text and token ids")
    """Form of the result."""


@dataclass(frozen=True, kw_only=True)
class TrainerSection:
    """`trainer`."""

    type: str = effective(
        "CausalLanguageModelingTrainer",
        choices=("CausalLanguageModelingTrainer", *PREFERENCE_TRAINERS),
        planned=(
            *("GeneralTaskTrainer", "MaskedLanguageModelingTrainer", "QuestionAnsweringTrainer"),
            *("TextClassificationTrainer", "TokenClassificationTrainer"),
            *("ImageClassificationTrainer", "ImageToTextGenerationTrainer"),
            *("MaskedImageModelingTrainer", "VisualQuestionAnsweringTrainer"),
        ),
    )
    """The task: the next token of text, or preferences between answers (`preference`)."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """`model`: what is trained."""

    model_config: dict[str, Any] = field(default_factory=dict)
    """Open: the keys of config.json or MindFormers' spellings of them, checked against the model
    family. They take precedence over config.json in pretrained_model_dir. Generation keys are
    allowed too."""
