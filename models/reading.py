"""Reading `model_config`: keys are sorted by their meaning.

Owns the step from the user's spellings to Hugging Face keys, precisions, generation settings and
notes. Unknown keys are problems for the families in `DECODERS`; those of a family that runs through
its transformers module are checked against its configuration class in `models.module_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.errors import did_you_mean
from launcher.weights.scales import block_of
from models import keys
from models.checks import is_integer
from models.config_class import ConfigClass
from models.spec import Problems

if TYPE_CHECKING:
    from models.families.family import Family


@dataclass(kw_only=True)
class Reading:
    """`model_config`, sorted. `written`: key of config.json -> its spelling in the YAML."""

    values: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    seq_length: int | None = None
    notes: list[str] = field(default_factory=list)

    def store(self, target: str, key: str, value: Any, problems: Problems) -> None:
        """Store the value of a config.json key; two spellings of one key must agree."""
        other = self.written.setdefault(target, key)
        if self.values.setdefault(target, value) != value:
            rule = (
                f"conflicts with model.model_config.{other} = {self.values[target]}, the same key"
            )
            problems.add(key, value, rule, advice="Keep one of them")


def read(
    model_config: Mapping[str, Any], own: Family | None, known: ConfigClass | None,
    problems: Problems, *, experts: bool,
) -> Reading:  # fmt: skip
    """Sort the keys of `model_config`. `own`: the family, if it has a native decoder; None for a
    family that runs through its transformers module, whose keys are all kept, under the names of
    its configuration class `known`. `experts`: whether the family has experts."""
    reading = Reading()
    own_keys = _keys_of(own)
    spellings = keys.ALIASES | (own.spellings if own else {})
    if known is not None:
        spellings |= _spellings_of(known)
    for key, value in model_config.items():
        target = spellings.get(key, key)
        if key in ("type", "model_type", *keys.STAGES) or _is_feature(key, experts):
            continue  # read elsewhere
        if known is not None and known.has(key) and key not in _READ_HERE:
            reading.store(known.key(key), key, value, problems)
        elif key in keys.PRECISIONS:
            _precision(key, value, reading, problems)
        elif key in keys.GENERATION:
            reading.generation["max_length" if key == "max_decode_length" else key] = value
        elif key == "seq_length":
            if value is not None and not is_integer(value):
                problems.add(key, value, "must be an integer of at least 1")
            else:
                reading.seq_length = value
        elif target in keys.ROPE:
            reading.written[target] = key
            if target in ROPE_MAPS and not isinstance(value, Mapping | None):
                problems.add(key, value, MUST_BE_MAP)
            else:
                reading.rope[target] = value
        elif own_keys is not None and target not in own_keys:
            nearest = did_you_mean(key, {*keys.every_key(), *own_keys} - {key})
            problems.add(key, value, "unknown key for this model", nearest=nearest)
        else:
            reading.store(known.key(target) if known else target, key, value, problems)
    return reading


ROPE_MAPS = ("rope_scaling", "rope_parameters")
MUST_BE_MAP = "must be a map such as {rope_type: linear, factor: 2.0}"
_READ_HERE = frozenset({*keys.PRECISIONS, *keys.ROPE, "seq_length"})
"""Keys that mean the same in every family, even if its configuration class has them too."""


def _spellings_of(known: ConfigClass) -> dict[str, str]:
    """MindFormers' spellings of keys that differ by configuration class."""
    count = next((key for key in sorted(keys.EXPERT_COUNTS) if key in known.defaults), None)
    spellings = dict.fromkeys(keys.EXPERT_COUNTS, count) if count else {}
    spellings |= {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    return {key: target for key, target in spellings.items() if target and not known.has(key)}


def refuse_features(
    model_config: Mapping[str, Any],
    config_json: Mapping[str, Any],
    own: Family | None,
    problems: Problems,
    *,
    experts: bool,
    advice_for_experts: str,
) -> list[str]:
    """Add problems with enabled features that are not built yet, or not by this family.

    Returns notes about those that are ignored.
    """
    notes = []
    for key in (*keys.NOT_BUILT, *keys.EXPERT_COUNTS):
        if not _is_feature(key, experts):
            continue
        feature, rule = keys.NOT_BUILT.get(key, "mixture of experts"), "not built yet"
        advice = keys.FEATURE_ADVICE.get(key, "")
        if own is not None and key in keys.EXPERT_COUNTS:
            rule, advice = f"{own.architecture} has no experts", advice_for_experts
        written = model_config.get(key)
        same = key in config_json and written == config_json[key]  # reported once
        if not keys.is_switched_off(key, written) and not same:
            what = f"model.model_config.{key} needs {feature}"
            problems.log(what, rule, advice=advice, key=key)
        elif not keys.is_switched_off(key, config_json.get(key)):
            what, value = f"config.json: {key}", config_json[key]
            of_module = own is None and experts and key == "num_nextn_predict_layers"
            if of_module or (own is not None and key in own.defaults):
                notes.append(f"{what} = {value}: {feature} is ignored")
            elif key == "quantization_config" and block_of(value) is not None:
                notes.append(f"{what}: FP8 weights are dequantized when they are read")
            elif key == "quantization_config" and own is not None and own.reads_mxfp4 and (
                isinstance(value, Mapping) and value.get("quant_method") == "mxfp4"
            ):  # fmt: skip
                notes.append(f"{what}: MXFP4 weights are dequantized when they are read")
            else:
                problems.log(f"{what} needs {feature}", rule, advice=advice)
    return notes


def _keys_of(own: Family | None) -> set[str] | None:
    """Keys of config.json that the user may set for the family; None: all."""
    if own is None:
        return None
    return (own.own_keys | keys.GENERAL) - ({"head_dim"} if own.has_latent else set())


def _is_feature(key: str, experts: bool) -> bool:
    """Whether a key enables a feature that the family, or every family, does not support."""
    return key in keys.NOT_BUILT or (key in keys.EXPERT_COUNTS and not experts)


def _precision(key: str, value: Any, reading: Reading, problems: Problems) -> None:
    if value is None:
        return
    name = str(value).removeprefix("torch.")
    dtype = keys.DTYPES.get(name)
    if dtype is None:
        nearest = did_you_mean(name, keys.DTYPES) or "Known: float32, bfloat16, float16"
        problems.add(key, value, "unknown dtype", nearest=nearest)
        return
    reading.precision[keys.PRECISIONS[key]] = dtype
    if keys.PRECISIONS[key] == "softmax_compute_dtype":
        reading.notes.append(
            f"model.model_config.{key} = {value}: used only with attention dropout; otherwise the "
            "attention kernel decides"
        )
