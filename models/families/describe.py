"""From `model_config` and config.json to a complete description of a model.

Owns how the family's defaults, config.json and the user's keys are merged, and which model types
have a native decoder, run through their transformers module, or are refused. Imports neither torch
nor transformers, and takes milliseconds: the configuration is checked with it before anything heavy
is loaded. All problems are collected and raised together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.errors import did_you_mean
from models.causality import check_causal
from models.chatglm import CHATGLM, as_glm
from models.checks import SizeCheck, check_rope, rope_of, rotary_dim
from models.config_class import (
    COMMON_KEYS,
    ConfigClass,
    class_names,
    config_class,
    is_causal_type,
)
from models.experts_config import ExpertsCheck
from models.families.family import Family
from models.families.table import DECODERS
from models.json_floats import plain_floats
from models.keys import EXPERT_COUNTS, GENERAL, NOT_BUILT
from models.module_config import module_config
from models.module_table import (
    NO_PACKING,
    TRANSFORMERS_MODULES,
    UNSUPPORTED,
    WEIGHTS_NEEDED,
)
from models.positions import position_limit
from models.reading import MUST_BE_MAP, ROPE_MAPS, Reading, read, refuse_features
from models.spec import (
    DecoderConfig,
    ModelConfigError,
    ModelSpec,
    Precision,
    Problems,
)


def supports_packing(spec: ModelSpec) -> bool:
    """Whether attention is separate for documents packed into one row."""
    known = spec.family in DECODERS or spec.family in TRANSFORMERS_MODULES
    return known and spec.family not in NO_PACKING


def needs_weights(spec: ModelSpec) -> bool:
    """Whether the model cannot be initialized randomly: some of its parameters need another
    initialization than `models.initial`, or the model type is not tested."""
    known = spec.family in DECODERS or spec.family in TRANSFORMERS_MODULES
    return not known or spec.family in WEIGHTS_NEEDED


def model_spec(model_config: Mapping[str, Any], config_json: Mapping[str, Any] | None) -> ModelSpec:
    """Describe the model of `model_config` of the YAML, which overrides `config_json` if given.

    Raises ModelConfigError with every problem found: unknown keys, wrong types, impossible sizes,
    families that are not built yet. Keys of `config_json` that are unknown are kept and passed on.
    """
    problems = Problems()
    base: dict[str, Any] = plain_floats(dict(config_json or {}))
    if base.get("model_type") == CHATGLM:
        base = as_glm(base, problems)
    family = _family(model_config, base, problems)
    if family is None:
        raise ModelConfigError(problems)
    own = DECODERS[family].variant(base, model_config) if family in DECODERS else None
    known = config_class(family) if own is None else None
    for key in ROPE_MAPS:
        if not isinstance(base.get(key), Mapping | None):
            problems.log(f"config.json: {key} = {base.pop(key)!r}", MUST_BE_MAP)
    if own is not None:
        base = _in_family_spelling(own, base, problems)
    qkv_has_bias = model_config.get("qkv_has_bias")
    sizes = {k: v for k, v in model_config.items() if k != "qkv_has_bias" or own is None}
    experts = _has_experts(family, own, known)
    reading = read(sizes, own, known, problems, experts=experts)
    reading.notes += refuse_features(
        model_config, base, own, problems, experts=experts, advice_for_experts=_mixtures()
    )
    base.pop("quantization_config", None)  # the weights of the model are not quantized
    decoder = None
    if own is not None:
        base, ignored = _split(own, base, reading, problems)
        hf_config = _complete(own, base, reading)
        _check(own, family, hf_config, base, reading, qkv_has_bias, problems)
        if not problems:
            decoder = _decoder(own, family, hf_config, base, reading)
            check_rope(
                hf_config["rope_parameters"], reading.written, head_dim=decoder.head_dim,
                partial=own.partial_rotary_factor is not None, problems=problems,
            )  # fmt: skip
        hf_config = ignored | hf_config
    else:
        assert known is not None
        hf_config = module_config(family, known, base, reading, problems)
    check_causal(family, known, hf_config, reading.written, problems)
    if problems:
        raise ModelConfigError(problems)
    return ModelSpec(
        family=family,
        hf_config=hf_config,
        decoder=decoder,
        precision=Precision(**reading.precision),
        seq_length=reading.seq_length,
        generation=reading.generation,
        notes=tuple(reading.notes),
    )


def _has_experts(family: str, own: Family | None, known: ConfigClass | None) -> bool:
    if own is not None:
        return own.expert_count is not None
    has = known is not None and any(known.has(key) for key in EXPERT_COUNTS)
    return has and family in TRANSFORMERS_MODULES


def _mixtures() -> str:
    """`Set type: MixtralConfig, Qwen3MoeConfig, ...`: the families that have experts."""
    return f"Set type: {', '.join(f.config_class for f in DECODERS.values() if f.expert_count)}"


def _split(
    own: Family, base: Mapping[str, Any], reading: Reading, problems: Problems
) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of a family in `DECODERS`: the keys of its class in transformers, and those that
    the class ignores.

    The latter are noted once, and kept for an exported config.json.
    """
    understood = own.own_keys | GENERAL | COMMON_KEYS | _OLD_ROPE
    understood -= {"hidden_dropout"} - own.own_keys  # elsewhere a key of model_config alone
    derived = (
        {"head_dim", "qk_head_dim"} if own.has_latent else set()
    )  # transformers writes them too
    ignored = {k: v for k, v in base.items() if k not in understood | derived}
    named = [
        key for key, value in ignored.items()
        if value is not None and not key.startswith("_") and key not in _REPORTED_ELSEWHERE
    ]  # fmt: skip
    if named:
        reading.notes.append(f"config.json: {', '.join(named)}: {own.config_class} has no such key")
    if ignored.get("per_layer_config"):
        problems.log("config.json: per_layer_config", "layers of different sizes: not built yet")
    return {k: v for k, v in base.items() if k in understood - derived}, ignored


def _family(
    model_config: Mapping[str, Any], base: Mapping[str, Any], problems: Problems
) -> str | None:
    """The model_type, from `type`, `model_type` or config.json; None and a problem otherwise."""
    classes = class_names()
    by_class = {kind: name for name, kind in classes.items() if name in UNSUPPORTED}
    built = {classes[name]: name for name in reversed(TRANSFORMERS_MODULES) if name in classes}
    built |= {family.config_class: name for name, family in DECODERS.items()}
    by_class |= built
    key = "type" if model_config.get("type") else "model_type"
    typed, found = model_config.get(key), base.get("model_type")
    if typed is None and found is None:
        advice = "Set it, for example to Qwen3Config, or set pretrained_model_dir"
        problems.log("model.model_config.type is missing", advice=advice, key="type")
        return None
    name = str(found) if typed is None else by_class.get(str(typed), str(typed))
    what = f"config.json: model_type = {found}"
    if typed is not None:
        what = f"model.model_config.{key} = {typed}"
    culprit = key if typed is not None else ""
    missing = UNSUPPORTED.get(name)
    if missing is None and base.get("text_config"):
        missing = "multimodal models"
    if missing is not None:
        advice = f"Supported: {', '.join(DECODERS)}, and those of transformers in docs/models.md"
        problems.log(f"{what} needs {missing}", "not built yet", advice=advice, key=culprit)
    elif typed is not None and name not in (*DECODERS, *TRANSFORMERS_MODULES):
        nearest = did_you_mean(str(typed), [*built, *DECODERS, *TRANSFORMERS_MODULES])
        nearest = nearest or f"Known: {', '.join(built)}"
        problems.log(what, "unknown model type", nearest=nearest, key=culprit)
    elif name not in DECODERS and config_class(name) is None:
        nearest = did_you_mean(name, classes)
        problems.log(what, "transformers has no such model type", nearest=nearest, key=culprit)
    elif name not in (*DECODERS, *TRANSFORMERS_MODULES) and not is_causal_type(name):
        advice = "Supported: the model types in docs/models.md"
        problems.log(what, "transformers has no causal language model of this type", advice=advice,
                     key=culprit)  # fmt: skip
    elif typed is not None and found is not None and name != found:
        rule = f"config.json of pretrained_model_dir has model_type {found}"
        advice = f"Remove model.model_config.{key}, or set the directory of that model"
        problems.log(what, rule, advice=advice, key=culprit)
    else:
        return name
    return None


def _in_family_spelling(own: Family, base: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """config.json with the keys of the family's `defaults`: versions of transformers write the
    number of experts under different ones, and some families have their own."""
    for key, written in own.config_keys.items():
        if key in base and base.get(written, base[key]) != base[key]:
            problems.log(f"config.json: {written} = {base[written]}",
                         f"conflicts with {key} = {base[key]}, the same key",
                         advice="Keep one of them")  # fmt: skip
    renamed = {own.spellings.get(key, key): value for key, value in base.items()}
    return {key: base.get(key, value) for key, value in renamed.items()}


def _complete(own: Family, base: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """config.json with the family's defaults, overridden by the user's keys."""
    config = {**own.defaults, **own.beyond, **base, **reading.values}
    given = base.keys() | reading.values.keys()
    stale = not reading.values.keys().isdisjoint(_LAYER_TYPES_FOLLOW)
    if "layer_types" in own.defaults and stale:
        config["layer_types"] = reading.values.get("layer_types")
    if reading.seq_length and "max_position_embeddings" not in given:
        config["max_position_embeddings"] = max(
            reading.seq_length, config["max_position_embeddings"]
        )
    if own.has_latent and "num_key_value_heads" not in given:
        config["num_key_value_heads"] = None
    return config


def _check(
    own: Family, family: str, config: dict[str, Any], base: Mapping[str, Any], reading: Reading,
    qkv_has_bias: Any, problems: Problems,
) -> None:  # fmt: skip
    """Add problems with the completed config.json of a family in `DECODERS`."""

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
    SizeCheck(config, describe, problems).run(
        divisible_heads=family == "llama", latent=own.has_latent
    )
    if own.expert_count is not None:
        ExpertsCheck(own, config, describe, problems).run()
    elif len(problems) == before:

        def add(key: str, rule: str, near: str, advice: str) -> None:
            what, written = describe(key)
            problems.log(what, rule, nearest=near, advice=advice, key=written)

        own.check(config, add)
    if len(problems) == before:
        rope = {"rope_parameters": _rope(own, config, base, reading)}
        limit = position_limit(family, config | {"rope_scaling": None} | rope)
        longest = limit.longest_row if limit is not None else None
        if longest is not None and (reading.seq_length or 0) > longest:
            what, _ = describe("max_position_embeddings")
            problems.add("seq_length", reading.seq_length,
                         f"the model has fewer positions ({what})", nearest=f"Nearest: {longest}",
                         advice="Or raise model.model_config.max_position_embeddings")  # fmt: skip
    has = own.has_qkv_bias(config)
    if qkv_has_bias is not None and bool(qkv_has_bias) != has:
        rule = f"q, k and v of {own.architecture} {'have' if has else 'have no'} biases"
        nearest = "Nearest: type: Qwen2Config" if qkv_has_bias else "Nearest: type: LlamaConfig"
        problems.add("qkv_has_bias", qkv_has_bias, rule, nearest=nearest)


def _decoder(
    own: Family, family: str, config: dict[str, Any], base: Mapping[str, Any], reading: Reading
) -> DecoderConfig:
    """The decoder's configuration. Adds to `config` what transformers derives: head counts,
    windows, rope."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if "head_dim" in config:
        config["head_dim"] = head_dim
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    windows = own.windows(config)
    rope = _rope(own, config, base, reading)
    hidden_dropout = config.get("hidden_dropout")
    if "hidden_dropout" not in own.defaults:
        config.pop("hidden_dropout", None)
    stored_dtype = config.pop("torch_dtype", None)
    for old in _OLD_ROPE - {"rope_parameters", "quantization_config"}:
        config.pop(old, None)
    if stored_dtype is not None:
        config.setdefault("dtype", stored_dtype)
    experts = own.experts(config)
    for key, neutral in own.beyond.items():
        if config[key] == neutral:
            del config[key]
        else:
            reading.notes.append(f"{key} = {config[key]}: transformers ignores it for {family}")
    config |= {"rope_parameters": rope, "model_type": family, "architectures": [own.architecture]}
    bias = own.has_qkv_bias(config)
    fields: dict[str, Any] = {
        **{key: config[key] for key in _PLAIN},
        "head_dim": head_dim,
        "rotary_dim": rotary_dim(head_dim, rope),
        "rms_norm_eps": float(config["rms_norm_eps"]),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "tie_word_embeddings": bool(config["tie_word_embeddings"]),
        "attention_bias": bias,
        "output_bias": bias and own.output_bias,
        "sliding_window": windows,
        "initializer_range": float(config["initializer_range"]),
        "attention_dropout": float(config["attention_dropout"] or 0.0),
        "hidden_dropout": float(hidden_dropout or 0.0),
        "experts": experts,
        "parameters": own.parameters,
    }
    return DecoderConfig(**fields | own.options(config))


def _rope(
    own: Family, config: Mapping[str, Any], base: Mapping[str, Any], reading: Reading
) -> dict[str, Any]:
    return rope_of(config, base, reading.rope, own.rope, partial=own.partial_rotary_factor)


_OLD_ROPE = {
    "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
    "partial_rotary_factor", "quantization_config",
}  # fmt: skip
"""Keys of config.json that are read for every family in `DECODERS`, besides its own."""

_REPORTED_ELSEWHERE = frozenset({"per_layer_config", *NOT_BUILT})
"""Ignored keys that other checks report."""

_LAYER_TYPES_FOLLOW = {"num_hidden_layers", "use_sliding_window", "max_window_layers"}
"""Keys that, overridden by the user, make `layer_types` of config.json stale."""

_PLAIN = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
)
