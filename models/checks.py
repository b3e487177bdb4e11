"""Which sizes and rotary embeddings are possible for the decoder, and the nearest that are.

Owns the arithmetic of a model's configuration: divisibility, ranges, the old and the new spelling
of rope settings, sliding windows by layer. Pure functions over plain dictionaries; no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launcher.errors import did_you_mean
from models.spec import Problems

Describe = Callable[[str], tuple[str, str]]
"""From a config.json key to (`model.model_config.num_heads = 5`, the key as the user wrote it)."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LAYER_TYPES = ("full_attention", "sliding_attention")
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window")
_WHOLE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "max_window_layers", *_OPTIONAL),
)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_cache")
_PROBABILITY = "must be a number from 0 up to, and without, 1"
_ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""rope_type -> the numbers it cannot do without."""


class SizeCheck:
    """The checks of one configuration: single values first, how they divide only after that."""

    def __init__(self, config: Mapping[str, Any], describe: Describe, problems: Problems) -> None:
        self.config, self.describe, self.problems = config, describe, problems

    def run(self, *, whole_heads: bool, latent: bool = False) -> None:
        """`whole_heads`: the hidden size must divide by the heads even where head_dim is given.
        `latent`: the sizes of a head are checked elsewhere."""
        before = len(self.problems)
        self._values()
        if self.config.get("layer_types") is not None:
            self._layer_types()
        if len(self.problems) == before and not latent:
            self._heads(whole_heads)

    def _add(self, key: str, rule: str, near: str = "", advice: str = "") -> None:
        what, written = self.describe(key)
        self.problems.log(what, rule, nearest=near, advice=advice, key=written)

    def _values(self) -> None:
        config = self.config
        for key in _WHOLE:
            missing = config.get(key) is None and (key in _OPTIONAL or key not in config)
            least = 0 if key == "max_window_layers" else 1
            if not missing and not is_integer(config[key], least):
                self._add(key, f"must be a whole number of at least {least}")
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
            self._add("hidden_act", "no such activation", close or _known(ACTIVATIONS))

    def _heads(self, whole_heads: bool) -> None:
        hidden, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        shared, head_dim = self.config["num_key_value_heads"] or heads, self.config.get("head_dim")
        if hidden % heads and (whole_heads or head_dim is None):
            below = hidden // heads * heads
            advice = "" if whole_heads else "Or give head_dim"
            rule = f"cannot be divided by {heads} attention heads"
            self._add("hidden_size", rule, nearest(below, below + heads), advice)
        elif head_dim is None and hidden // heads % 2:
            size = hidden // heads
            rule = f"{heads} attention heads of {size}: rotary embeddings need an even head size"
            self._add("hidden_size", rule, nearest(heads * (size - 1), heads * (size + 1)))
        if head_dim is not None and head_dim % 2:
            rule = "rotary embeddings need an even head size"
            self._add("head_dim", rule, nearest(head_dim - 1, head_dim + 1))
        if heads % shared:
            divisors = [d for d in range(1, heads + 1) if heads % d == 0]
            below = max(d for d in divisors if d <= shared)
            above = min((d for d in divisors if d >= shared), default=below)
            rule = f"{heads} attention heads cannot be shared out over {shared} key/value heads"
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
    """The rope settings in today's spelling: `rope_theta`, `rope_type` and numbers in one map.

    config.json (`base`) may have either spelling; the YAML's `rope_parameters` replace them, its
    `rope_scaling` replaces the scaling, and its `rope_theta` the theta. `default` is the family's,
    and so is `partial`, the part of a head that is rotated; None: all of it.
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
    """Problems with rope settings as `rope_of` gives them. `partial`: the family can rotate a part
    of a head."""
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
        rule = "not built yet" if kind in ("longrope", "proportional") else "no such rope_type"
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
        log(f"partial_rotary_factor = {rotated}", "this family rotates the whole head",
            "Nearest: 1.0")  # fmt: skip
    elif rotated is not None and rotary_dim(head_dim, rope) not in range(2, head_dim + 1, 2):
        log(f"partial_rotary_factor = {rotated}", f"heads of {head_dim} need an even part",
            "Nearest: 1.0")  # fmt: skip
    if kind == "dynamic" and head_dim <= 2:
        log(f"rope_type dynamic with head_dim = {head_dim}", "it needs larger heads", "Nearest: 4")


def rotary_dim(head_dim: int, rope: Mapping[str, Any]) -> int:
    """How many numbers of a head are rotated; 0 where the settings make no sense."""
    part = rope.get("partial_rotary_factor")
    if part is None:
        return head_dim
    return int(head_dim * part) if is_number(part) and 0 < part <= 1 else 0


def is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000
    return whole or isinstance(value, float)


def is_integer(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def nearest(*sizes: int) -> str:
    """`Nearest: 2 or 4` of those that are above 0."""
    return "Nearest: " + " or ".join(str(size) for size in dict.fromkeys(sizes) if size > 0)


def _known(names: Iterable[str]) -> str:
    return f"Known: {', '.join(names)}"
