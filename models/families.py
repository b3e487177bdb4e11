"""The family table: from `model_config` and config.json to a complete description of a model.

Owns which model types have a decoder of ours, their defaults (those of the transformers config
classes; a test compares), which types run through the transformers module, and which are refused.
Imports neither torch nor transformers, and takes milliseconds: the configuration is checked with it
before anything heavy is loaded. All problems are gathered and raised together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.errors import did_you_mean
from models import keys
from models.checks import SizeCheck, check_rope, rope_of, sliding_windows
from models.reading import Reading, read, refuse_features
from models.spec import (
    DecoderConfig,
    ModelConfigError,
    ModelProblem,
    ModelSpec,
    Precision,
    Problems,
)

__all__ = [
    "DECODERS", "TRANSFORMERS_MODULES", "UNSUPPORTED", "DecoderConfig", "ModelConfigError",
    "ModelProblem", "ModelSpec", "Precision", "model_spec", "supports_packing",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type with a decoder of ours, and what its configuration class says by default."""

    config_class: str
    architecture: str
    defaults: dict[str, Any]
    qkv_bias: bool | None = None
    """True or False where the family fixes it, None where `attention_bias` decides (for the output
    too)."""
    qk_norm: bool = False
    window_by_layer: bool = False
    """Sliding windows by `layer_types`; otherwise `sliding_window` counts for every layer."""


_COMMON: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True,
    "pad_token_id": None, "tie_word_embeddings": False, "attention_dropout": 0.0, "head_dim": None,
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
_SPECIAL_1_2 = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

DECODERS: dict[str, Family] = {
    "llama": Family(
        config_class="LlamaConfig",
        architecture="LlamaForCausalLM",
        defaults=_COMMON | _SPECIAL_1_2 | {
            "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
            "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
        },
    ),
    "mistral": Family(
        config_class="MistralConfig",
        architecture="MistralForCausalLM",
        defaults=_COMMON | _SPECIAL_1_2 | {
            "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "sliding_window": 4096,
        },
        qkv_bias=False,
    ),
    "qwen2": Family(
        config_class="Qwen2Config",
        architecture="Qwen2ForCausalLM",
        defaults={key: value for key, value in _QWEN.items() if key != "head_dim"},
        qkv_bias=True,
        window_by_layer=True,
    ),
    "qwen3": Family(
        config_class="Qwen3Config",
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN | {"head_dim": 128, "attention_bias": False},
        qk_norm=True,
        window_by_layer=True,
    ),
}  # fmt: skip
"""model_type -> family. Qwen2.5 is qwen2."""

TRANSFORMERS_MODULES: dict[str, str] = {
    "arcee": "ArceeConfig", "biogpt": "BioGptConfig", "bloom": "BloomConfig",
    "codegen": "CodeGenConfig", "cohere": "CohereConfig", "cohere2": "Cohere2Config",
    "cwm": "CwmConfig", "ernie4_5": "Ernie4_5Config", "exaone4": "Exaone4Config",
    "falcon": "FalconConfig", "gemma": "GemmaConfig", "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig", "glm": "GlmConfig", "glm4": "Glm4Config",
    "gpt2": "GPT2Config", "gpt_bigcode": "GPTBigCodeConfig", "gpt_neo": "GPTNeoConfig",
    "gpt_neox": "GPTNeoXConfig", "gptj": "GPTJConfig", "granite": "GraniteConfig",
    "helium": "HeliumConfig", "hunyuan_v1_dense": "HunYuanDenseV1Config",
    "ministral": "MinistralConfig", "mpt": "MptConfig", "nanochat": "NanoChatConfig",
    "nemotron": "NemotronConfig", "olmo": "OlmoConfig", "olmo2": "Olmo2Config",
    "olmo3": "Olmo3Config", "opt": "OPTConfig", "persimmon": "PersimmonConfig",
    "phi": "PhiConfig", "phi3": "Phi3Config", "seed_oss": "SeedOssConfig",
    "smollm3": "SmolLM3Config", "stablelm": "StableLmConfig",
    "starcoder2": "Starcoder2Config", "xglm": "XGLMConfig",
}  # fmt: skip
"""model_type -> config class, of causal language models that run through their transformers module.
"""

UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys((
        "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe",
        "gpt_oss", "granitemoe", "hunyuan_v1_moe", "jamba", "llama4", "llama4_text", "minimax",
        "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    ), "mixture of experts"),
    **dict.fromkeys((
        "gemma3", "gemma3n", "gemma4", "llava", "mistral3", "mllama", "paligemma",
        "phi4_multimodal", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "whisper",
    ), "multimodal models"),
    **dict.fromkeys(
        ("apertus", "diffllama"), "parameters that are neither weights, norms nor biases"
    ),
    **dict.fromkeys((
        "falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv", "xlstm", "zamba2",
    ), "recurrent models"),
    **dict.fromkeys((
        "bart", "bert", "electra", "marian", "mbart", "pegasus", "roberta", "t5",
    ), "encoders and encoder-decoders"),
}  # fmt: skip
"""model_type -> what it needs that is not built yet."""

_NO_PACKING = frozenset({"biogpt", "bloom", "falcon", "mpt", "opt", "xglm"})
"""Families that build their masks or positions without regard to packed documents. A test goes
through all."""


def supports_packing(spec: ModelSpec) -> bool:
    """Whether documents packed into one row stay apart."""
    known = spec.family in DECODERS or spec.family in TRANSFORMERS_MODULES
    return known and spec.family not in _NO_PACKING


def model_spec(model_config: Mapping[str, Any], config_json: Mapping[str, Any] | None) -> ModelSpec:
    """Describe the model that `model_config` of the YAML asks for, over `config_json` if there is
    one.

    Raises ModelConfigError with every problem found: unknown keys, wrong types, impossible sizes,
    families that are not built yet. Keys of `config_json` that are unknown are kept and passed on.
    """
    problems = Problems()
    base = dict(config_json or {})
    family = _family(model_config, base, problems)
    if family is None:
        raise ModelConfigError(problems)
    own = DECODERS.get(family)
    qkv_has_bias = model_config.get("qkv_has_bias")
    sizes = {k: v for k, v in model_config.items() if k != "qkv_has_bias" or own is None}
    reading = read(sizes, {*own.defaults, *keys.GENERAL} if own else None, problems)
    refuse_features(model_config, base, problems)
    decoder = None
    if own is not None:
        hf_config = _complete(own, base, reading)
        _check(own, family, hf_config, base, reading, qkv_has_bias, problems)
        if not problems:
            decoder = _decoder(own, family, hf_config, base, reading)
            check_rope(hf_config["rope_parameters"], reading.written, head_dim=decoder.head_dim,
                       problems=problems)  # fmt: skip
    else:
        hf_config = base | reading.values | reading.rope | {"model_type": family}
    if problems:
        raise ModelConfigError(problems)
    return ModelSpec(
        family=family,
        hf_config=hf_config,
        decoder=decoder,
        precision=Precision(**reading.precision),
        seq_length=reading.seq_length,
        generation=reading.generation,
        written_keys=() if decoder is not None else tuple(reading.values),
        notes=tuple(reading.notes),
    )


def _family(
    model_config: Mapping[str, Any], base: Mapping[str, Any], problems: Problems
) -> str | None:
    """The model_type, from `type`, `model_type` or config.json; None with a problem otherwise."""
    by_class = {family.config_class: name for name, family in DECODERS.items()}
    by_class |= {config: name for name, config in TRANSFORMERS_MODULES.items()}
    key = "type" if model_config.get("type") else "model_type"
    typed, found = model_config.get(key), base.get("model_type")
    if typed is None and found is None:
        advice = "Write it, for example Qwen3Config, or set pretrained_model_dir"
        problems.say("model.model_config.type is missing", advice=advice, key="type")
        return None
    name = str(found) if typed is None else by_class.get(str(typed), str(typed))
    what = f"config.json: model_type = {found}"
    if typed is not None:
        what = f"model.model_config.{key} = {typed}"
    blamed = key if typed is not None else ""
    missing = UNSUPPORTED.get(name) or UNSUPPORTED.get(_snake(name))
    if missing is None and base.get("text_config"):
        missing = "multimodal models"
    if missing is not None:
        advice = f"Built: {', '.join(DECODERS)}, and dense models of transformers"
        problems.say(f"{what} needs {missing}", "not built yet", advice=advice, key=blamed)
    elif typed is not None and name not in by_class.values():
        nearest = did_you_mean(str(typed), [*by_class, *by_class.values()])
        nearest = nearest or f"Known: {', '.join(by_class)}"
        problems.say(what, "no such model type", nearest=nearest, key=blamed)
    elif typed is not None and found is not None and name != found:
        rule = f"config.json of pretrained_model_dir says model_type {found}"
        advice = f"Leave out model.model_config.{key}, or name that model's directory"
        problems.say(what, rule, advice=advice, key=blamed)
    else:
        return name
    return None


def _snake(config_class: str) -> str:
    """`Qwen3MoeConfig` -> `qwen3_moe`, `DeepseekV3Config` -> `deepseek_v3`: enough to find a
    refusal."""
    stem = config_class.removesuffix("Config")
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(stem))


def _complete(own: Family, base: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """config.json with the family's defaults below and the user's keys above."""
    config = own.defaults | dict(base) | reading.values
    given = base.keys() | reading.values.keys()
    stale = not reading.values.keys().isdisjoint(_LAYER_TYPES_FOLLOW)
    if own.window_by_layer and stale:
        config["layer_types"] = reading.values.get("layer_types")
    if reading.seq_length and "max_position_embeddings" not in given:
        config["max_position_embeddings"] = max(
            reading.seq_length, config["max_position_embeddings"]
        )
    return config


def _check(
    own: Family, family: str, config: dict[str, Any], base: Mapping[str, Any], reading: Reading,
    qkv_has_bias: Any, problems: Problems,
) -> None:  # fmt: skip
    """Problems with the completed config.json of one of our families."""

    def describe(key: str) -> tuple[str, str]:
        shown = repr(config[key]) if isinstance(config[key], str) else config[key]
        if key in reading.written:
            spelling = reading.written[key]
            return f"model.model_config.{spelling} = {shown}", spelling
        if key in base:
            return f"config.json: {key} = {shown}", ""
        return f"{key} = {shown} (the default of {family})", ""

    before = len(problems)
    # transformers refuses a Llama whose heads do not divide its width, even with head_dim given.
    SizeCheck(config, describe, problems).run(whole_heads=family == "llama")
    if len(problems) == before and (reading.seq_length or 0) > config["max_position_embeddings"]:
        what, _ = describe("max_position_embeddings")
        problems.add("seq_length", reading.seq_length, f"the model has fewer positions ({what})",
                     nearest=f"Nearest: {config['max_position_embeddings']}",
                     advice="Or raise model.model_config.max_position_embeddings")  # fmt: skip
    has = bool(config.get("attention_bias")) if own.qkv_bias is None else own.qkv_bias
    if qkv_has_bias is not None and bool(qkv_has_bias) != has:
        rule = (
            f"q, k and v of {own.architecture} {'have' if has else 'have no'} biases of their own"
        )
        nearest = "Nearest: type: Qwen2Config" if qkv_has_bias else "Nearest: type: LlamaConfig"
        problems.add("qkv_has_bias", qkv_has_bias, rule, nearest=nearest)


def _decoder(
    own: Family, family: str, config: dict[str, Any], base: Mapping[str, Any], reading: Reading
) -> DecoderConfig:
    """The decoder's numbers. Fills in `config` what transformers derives: head counts, windows,
    rope."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if "head_dim" in config:
        config["head_dim"] = head_dim
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    windows = sliding_windows(config, by_layer=own.window_by_layer)
    rope = rope_of(config, base, reading.rope)
    hidden_dropout = config.pop("hidden_dropout", None)
    stored_dtype = config.pop("torch_dtype", None)
    for old in ("rope_theta", "rope_scaling", "original_max_position_embeddings"):
        config.pop(old, None)
    if stored_dtype is not None:
        config.setdefault("dtype", stored_dtype)
    config |= {"rope_parameters": rope, "model_type": family, "architectures": [own.architecture]}
    bias = bool(config.get("attention_bias")) if own.qkv_bias is None else own.qkv_bias
    return DecoderConfig(
        **{key: config[key] for key in _PLAIN},
        head_dim=head_dim,
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=rope["rope_theta"],
        rope_scaling=None if rope["rope_type"] == "default" else rope,
        tie_word_embeddings=bool(config["tie_word_embeddings"]),
        attention_bias=bias,
        output_bias=bias and own.qkv_bias is None,
        mlp_bias=bool(config.get("mlp_bias")) and "mlp_bias" in own.defaults,
        qk_norm=own.qk_norm,
        sliding_window=windows,
        initializer_range=float(config["initializer_range"]),
        attention_dropout=float(config["attention_dropout"] or 0.0),
        hidden_dropout=float(hidden_dropout or 0.0),
    )


_LAYER_TYPES_FOLLOW = {"num_hidden_layers", "use_sliding_window", "max_window_layers"}
"""Keys that, written over config.json, make its `layer_types` stale."""

_PLAIN = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
)
