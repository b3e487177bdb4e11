"""The table of model types that run through their transformers module, or are refused, and why.

Owns what a configuration class does not contain: which types give the same results here as in
transformers, which a test verifies for all of them. Plain data.
"""

from __future__ import annotations

from typing import Any

TRANSFORMERS_MODULES: tuple[str, ...] = (
    "afmoe", "apertus", "apertus1p5_text", "arcee", "aria_text", "axk1", "bailing_hybrid",
    "bamba", "beam", "bert", "bert-generation", "big_bird", "biogpt", "bitnet", "bloom",
    "camembert", "codegen", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "ctrl",
    "cwm", "data2vec-text", "deepseek_v2", "diffllama", "doge", "dots1", "electra", "ernie",
    "ernie4_5", "ernie4_5_moe", "exaone", "exaone4", "exaone_moe", "falcon", "falcon_h1",
    "falcon_mamba", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text",
    "gemma4_text", "gemma4_unified_text", "glm4_moe_lite", "gpt2",
    "gpt-sw3", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj",
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax",
    "inkling_text", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kimi_linear",
    "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama4_text", "longcat_flash", "mamba",
    "mamba2", "megatron-bert", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "modernbert-decoder", "moshi", "mpt",
    "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe",
    "openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2_moe", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "sarvam_mla", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "youtu", "zamba", "zamba2", "zaya",
)  # fmt: skip
"""Causal language models that run through their transformers module."""

_ENCODER_DECODERS = "encoders and encoder-decoders"
_MULTIMODAL = "multimodal models"
_INDEXER = "an attention indexer, which is trained with its own loss"
_OTHER_TENSORS = "tensors in files that differ from those of the module"

UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys((
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp",
        "pegasus", "plbart", "prophetnet", "t5", "trocr",
    ), _ENCODER_DECODERS),
    **dict.fromkeys((
        "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git",
        "got_ocr2", "llama4", "llava", "mistral3", "mllama", "moss_transcribe_diarize", "musicgen",
        "musicgen_melody", "paligemma", "phi4_multimodal", "qwen2_5_vl", "qwen2_vl", "qwen3_5",
        "qwen3_5_moe", "qwen3_vl", "qwen4_exp", "whisper",
    ), _MULTIMODAL),
    **dict.fromkeys((
        "axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text", "glm_moe_dsa", "hy_v4",
        "qwen4_exp_text",
    ), _INDEXER),
    **dict.fromkeys((
        "hrm_text", "inkling2_loop_text", "inkling2_text", "lara_mini", "sarvam_moe",
    ), _OTHER_TENSORS),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "its target model"),
    **dict.fromkeys(("rwkv", "xlstm"), "recurrent models"),
    "blt": "byte patches instead of a tokenizer",
    "cpmant": "attention to later tokens",
    "dbrx": "another mixture of experts",
    "dory": "generation without a cache",
    "reformer": "reversible layers and hashed attention",
    "xmod": "a language id for every row of a batch",
}  # fmt: skip
"""model_type -> the feature it needs that is not built yet."""

CAUSAL_WHEN: dict[str, tuple[str, Any]] = {
    **dict.fromkeys((
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
        "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
        "xlm-roberta", "xlm-roberta-xl",
    ), ("is_decoder", True)),
    "xlm": ("causal", True),
    "xlnet": ("attn_type", "uni"),
}  # fmt: skip
"""model_type -> the key of config.json, and the value, without which attention is not causal."""

NOT_CAUSAL_WHEN: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "use_bidirectional_attention": (True, "all"),
}
"""Keys of config.json of any model type -> their values with which attention is not causal."""

NO_PACKING = frozenset({
    "afmoe", "bailing_hybrid", "bamba", "bert", "bert-generation", "big_bird", "biogpt", "bloom",
    "camembert", "data2vec-text", "electra", "ernie", "falcon", "falcon_h1", "falcon_mamba",
    "granitemoehybrid", "inkling_text", "jamba", "kimi_linear", "lfm2", "lfm2_moe",
    "lfm3", "mamba", "mamba2", "megatron-bert", "minimax", "mpt", "nemotron_h", "olmo_hybrid",
    "openai-gpt", "opt", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xglm", "xlm",
    "xlm-roberta", "xlm-roberta-xl", "xlnet", "zamba", "zamba2", "zaya",
})  # fmt: skip
"""Families whose masks or positions ignore packed documents, or whose recurrent state crosses their
borders. Verified by a test of all families."""

WEIGHTS_NEEDED = frozenset({
    "afmoe", "apertus", "apertus1p5_text", "bailing_hybrid", "bamba", "diffllama", "doge",
    "falcon_h1", "falcon_mamba", "flint", "gemma3n_text", "granite_swa",
    "granitemoe_swa", "granitemoehybrid", "jamba", "kimi_linear", "mamba", "mamba2",
    "mimo_v2_flash", "minimax_m3_vl_text", "modernbert-decoder", "nemotron_h", "olmo_hybrid",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "roformer", "xlnet",
    "youtu", "zamba", "zamba2", "zaya",
})  # fmt: skip
"""Families with parameters that need another initialization than `models.initial`: they can only
start from weights."""

LEARNED_POSITIONS: dict[str, int | None] = {
    **dict.fromkeys((
        "bert", "bert-generation", "big_bird", "biogpt", "codegen", "ctrl", "electra", "ernie",
        "gpt2", "gpt-sw3", "gpt_bigcode", "gpt_neo", "gptj", "megatron-bert", "mpt", "openai-gpt",
        "opt", "rembert", "roc_bert", "roformer", "xlm",
    ), 0),
    **dict.fromkeys((
        "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta",
        "xlm-roberta-xl",
    ), None),
}  # fmt: skip
"""Families with a position embedding, which limits the length of rows -> its unused entries; None:
all up to that of the padding token, as positions start after it."""
