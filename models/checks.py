"""Checks of the decoder's sizes and rotary embeddings, with the nearest valid values.

Owns the rules of a model's configuration: divisibility, ranges, the old and the new spelling of
rope settings, sliding windows by layer. Pure functions over plain dictionaries; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launcher.errors import did_you_mean
from models.spec import Problems

Describe = Callable[[str], tuple[str, str]]
"""Key of config.json -> (`model.model_config.num_heads = 5`, the key as the user wrote it)."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LAYER_TYPES = ("full_attention", "sliding_attention")
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")
_INTEGERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "max_window_layers", *_OPTIONAL),
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_cache")
_PROBABILITY = "must be at least 0 and less than 1"
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""rope_type -> its required parameters."""


class SizeCheck:
    """The checks of one configuration: single values first, then divisibility."""

    def __init__(self, config: Mapping[str, Any], describe: Describe, problems: Problems) -> None:
        self.config, self.describe, self.problems = config, describe, problems

    def run(self, *, divisible_heads: bool, latent: bool = False) -> None:
        """`divisible_heads`: the heads must divide the hidden size even if head_dim is given.
        `latent`: the sizes of a head are checked elsewhere."""
        before = len(self.problems)
        self._values()
        if self.config.get("layer_types") is not None:
            self._layer_types()
        if len(self.problems) == before and not latent:
            self._heads(divisible_heads)

    def _add(self, key: str, rule: str, near: str = "", advice: str = "") -> None:
        what, written = self.describe(key)
        self.problems.log(what, rule, nearest=near, advice=advice, key=written)

    def _values(self) -> None:
        config = self.config
        for key in _INTEGERS:
            missing = config.get(key) is None and (key in _OPTIONAL or key not in config)
            least = 0 if key == "max_window_layers" else 1
            if not missing and not is_integer(config[key], least):
                self._add(key, f"must be an integer of at least {least}")
        for key in _FLAGS:
            if not isinstance(config.get(key), bool | None):
                self._add(key, "must be True or False")
        for key in ("rms_norm_eps", "initializer_range"):
            if not is_number(config[key]) or config[key] <= 0:
                self._add(key, "must be a number above 0")
        for key in ("attention_dropout", "hidden_dropout"):
            value = config.get(key)
            if value is not None and not (is_number(value) and 0 <= value < 1):
                self._add(key, _PROBABILITY)
        if config["hidden_act"] not in ACTIVATIONS:
            close = did_you_mean(str(config["hidden_act"]), ACTIVATIONS)
            self._add("hidden_act", "unknown activation", close or _known(ACTIVATIONS))

    def _heads(self, divisible_heads: bool) -> None:
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        kv_heads, head_dim = (
            self.config["num_key_value_heads"] or heads,
            self.config.get("head_dim"),
        )
        if hidden % heads and (divisible_heads or head_dim is None):
            below = hidden // heads * heads
            advice = "" if divisible_heads else "Or give head_dim"
            rule = f"cannot be divided by {heads} attention heads"
            self._add("hidden_size", rule, nearest(below, below + heads), advice)
        elif head_dim is None and hidden // heads % 2:
            size = hidden // heads
            rule = f"{heads} attention heads of {size}: rotary embeddings need an even head size"
            self._add("hidden_size", rule, nearest(heads * (size - 1), heads * (size + 1)))
        if head_dim is not None and head_dim % 2:
            rule = "rotary embeddings need an even head size"
            self._add("head_dim", rule, nearest(head_dim - 1, head_dim + 1))
        if heads % kv_heads:
            divisors = [d for d in range(1, heads + 1) if heads % d == 0]
            below = max(d for d in divisors if d <= kv_heads)
            above = min((d for d in divisors if d >= kv_heads), default=below)
            rule = f"{heads} attention heads cannot be divided over {kv_heads} KV heads"
            self._add("num_key_value_heads", rule, nearest(below, above))

    def _layer_types(self) -> None:
        types, layers = self.config["layer_types"], self.config["num_hidden_layers"]
        if not isinstance(types, list | tuple) or any(kind not in LAYER_TYPES for kind in types):
            self._add("layer_types", f"must be a list of {' and '.join(LAYER_TYPES)}")
        elif LAYER_TYPES[1] in types and not self.config.get("use_sliding_window", True):
            self._add("layer_types", "sliding_attention needs use_sliding_window: True")
        elif is_integer(layers) and len(types) != layers:
            self._add("layer_types", f"has {len(types)} entries for {layers} layers")


def rope_of(
    config: Mapping[str, Any], base: Mapping[str, Any], yaml: Mapping[str, Any],
    default: dict[str, Any], *, partial: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The rope settings in the current spelling: `rope_theta`, `rope_type` and parameters in one
    map.

    config.json (`base`) may have either spelling; the YAML's `rope_parameters` replace them, its
    `rope_scaling` replaces the scaling, and its `rope_theta` the theta. `default` is the family's,
    and so is `partial`, the rotated fraction of a head; None: the full head.
    """
    theta = base.get("rope_theta") or default["rope_theta"]
    written = base.get("rope_scaling") or base.get("rope_parameters")
    rope = {"rope_theta": theta} | dict(written) if written else default | {"rope_theta": theta}
    for key in ("rope_parameters", "rope_scaling"):
        if key in yaml:
            given = dict(yaml[key]) if isinstance(yaml[key], Mapping) else {}
            rope = {"rope_theta": rope["rope_theta"]} | given
    if yaml.get("rope_theta") is not None:
        rope["rope_theta"] = yaml["rope_theta"]
    rotated = config.get("partial_rotary_factor", base.get("partial_rotary_factor", partial))
    if rotated != base.get("partial_rotary_factor", partial):
        rope["partial_rotary_factor"] = rotated  # the YAML's
    elif rotated is not None and (partial is not None or rotated != 1):
        rope.setdefault("partial_rotary_factor", rotated)
    old_spelling = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_spelling or "default"
    if rope["rope_type"] in ("llama3", "yarn"):
        if base.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = base["original_max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return rope


def check_rope(
    rope: Mapping[str, Any], written: Mapping[str, str], *, head_dim: int, partial: bool,
    problems: Problems,
) -> None:  # fmt: skip
    """Add problems with the rope settings of `rope_of`. `partial`: the family supports partial
    rotary embeddings."""
    names = ("rope_scaling", "rope_parameters", "rope_theta")
    key = next((written[name] for name in names if name in written), "")
    place = f"model.model_config.{key}" if key else "config.json: rope settings"
    kind = rope["rope_type"]

    def log(what: str, rule: str, near: str = "") -> None:
        problems.log(f"{place}: {what}", rule, nearest=near, key=key)

    if any(isinstance(value, Mapping) for value in rope.values()):
        log("rope settings by layer type", "not built yet")
        return
    if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
        rule = "not built yet" if kind in ("longrope", "proportional") else "unknown rope_type"
        log(
            f"rope_type = {kind}",
            rule,
            did_you_mean(str(kind), _ROPE_NUMBERS) or _known(_ROPE_NUMBERS),
        )
        return
    before = len(problems)
    for number in ("rope_theta", *_ROPE_NUMBERS[kind]):
        if not is_number(rope.get(number)) or rope[number] <= 0:
            log(f"{number} = {rope.get(number)}", f"rope_type {kind} needs a number above 0")
    if len(problems) > before:
        return
    if rope.get("factor", 1) < 1:
        log(f"factor = {rope['factor']}", "must be at least 1", "Nearest: 1.0")
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        low = rope["low_freq_factor"]
        log(
            f"high_freq_factor = {rope['high_freq_factor']}",
            f"must be above low_freq_factor ({low})",
        )
    rotated = rope.get("partial_rotary_factor")
    if not partial and rotated not in (None, 1, 1.0):
        log(f"partial_rotary_factor = {rotated}", "this family rotates the full head",
            "Nearest: 1.0")  # fmt: skip
    elif rotated is not None and rotary_dim(head_dim, rope) not in range(2, head_dim + 1, 2):
        rule = f"the rotated part of a head of {head_dim} must be even"
        log(f"partial_rotary_factor = {rotated}", rule, "Nearest: 1.0")
    if kind == "dynamic" and head_dim <= 2:
        log(
            f"rope_type dynamic with head_dim = {head_dim}",
            "the head size is too small",
            "Nearest: 4",
        )


def rotary_dim(head_dim: int, rope: Mapping[str, Any]) -> int:
    """Number of rotated dimensions of a head; 0 for invalid settings."""
    part = rope.get("partial_rotary_factor")
    if part is None:
        return head_dim
    return int(head_dim * part) if is_number(part) and 0 < part <= 1 else 0


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    integer = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000
    return integer or isinstance(value, float)


def is_integer(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def nearest(*sizes: int) -> str:
    """`Nearest: 2 or 4` of those that are above 0."""
    return "Nearest: " + " or ".join(str(size) for size in dict.fromkeys(sizes) if size > 0)


def _known(names: Iterable[str]) -> str:
    return f"Known: {', '.join(names)}"
