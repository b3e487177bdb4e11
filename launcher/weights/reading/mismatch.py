"""Weights that do not fit a model: the table of all differences, and what the weights are.

Owns that error. Names often show the cause: a wrapper around the saved model (data parallel,
compile, PEFT), or a model around it (the language model of a multimodal one), adds a prefix to the
names of all tensors, and other programs have names of their own. `strict_load: False` is not
advised in these cases, nor where no name fits: it would train random weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.errors import Problem, UserError
from launcher.extensions import MODEL_NAMES, installed
from launcher.layout.box import Shape
from launcher.weights.complete import may_be_left_out
from launcher.weights.source import Source

ROWS_SHOWN = 20
SAMPLED = 50
"""Names that are searched for a prefix."""

WRAPPERS: Mapping[str, str] = {
    "module": "DistributedDataParallel or DeepSpeed (`model.module` is the model itself)",
    "_orig_mod": "torch.compile (`model._orig_mod` is the model itself)",
    "_fsdp_wrapped_module": "FullyShardedDataParallel (use its full state dict)",
    "_checkpoint_wrapped_module": "a wrapper for activation checkpointing",
    "base_model": "PEFT (`model.merge_and_unload()` gives the model itself)",
    "base_layer": "PEFT (`model.merge_and_unload()` gives the model itself)",
    "language_model": "a multimodal model, whose language model this is",
    "text_model": "a multimodal model, whose language model this is",
}
"""Part of a name to what adds it."""


class Foreign(NamedTuple):
    """Names by which weights of another program are recognized."""

    names: re.Pattern[str]
    what: str
    advice: str


FOREIGN: tuple[Foreign, ...] = (
    Foreign(re.compile(r"\blora_(A|B|embedding)"), "an adapter of PEFT (LoRA)",
            "Give its directory, with adapter_config.json, or merge it into its base model first: "
            "`PeftModel.from_pretrained(base, folder)"
            ".merge_and_unload().save_pretrained(new_folder)`"),
    Foreign(re.compile(r"\.(qweight|qzeros|g_idx)$"), "weights quantized by GPTQ or AWQ",
            "Give weights that are not quantized"),
    Foreign(re.compile(r"\.(absmax|quant_map|nested_absmax|quant_state\.\S+)$"),
            "weights quantized by bitsandbytes", "Give weights that are not quantized"),
    Foreign(re.compile(r"^(tok_embeddings\.|layers\.\d+\.attention\.w[qkvo]\.)"),
            "weights under the names of Meta or Mistral (consolidated)",
            "Give the Hugging Face weights of the model"),
    Foreign(re.compile(r"^(model\.)?(decoder\.layers\.\d+\.self_attention\.linear_qkv|"
                       r"embedding\.word_embeddings)\."),
            "weights under the names of Megatron", "Export them to Hugging Face first"),
)  # fmt: skip


@dataclass(frozen=True)
class Differences:
    """Why weights cannot be loaded."""

    expected: Mapping[str, Shape]
    found: Collection[str]
    """Those of `expected` that the files have."""
    missing: Sequence[str]
    extra: Sequence[str]
    unfit: Mapping[str, tuple[str, str]]
    """Name to (what the files have, what the model needs)."""

    @property
    def fit_none(self) -> bool:
        """Whether the files have no tensor of the model."""
        return not self.found and bool(self.expected)


def mismatch(source: Source, differences: Differences) -> UserError:
    """The error for weights of `source` that do not fit the model."""
    missing, extra, unfit = differences.missing, differences.extra, differences.unfit
    counts = f"{len(missing)} missing, {len(extra)} extra, {len(unfit)} of another shape or dtype"
    is_adapter = any(".lora_" in name for name in differences.expected) and differences.found
    explained = None if is_adapter else _explained(missing, extra)
    usual = "Give the weights of this model, or correct model.model_config"
    if is_adapter:
        nearest = "They are an adapter, of another model or of other layers"
        advice = "Give the model that the adapter was trained on (pretrained_model_dir)"
    elif explained:
        nearest, advice = explained
    elif differences.fit_none:
        nearest = "No tensor of the model is in the files: these are weights of another model"
        advice = usual
    else:
        nearest = ""
        advice = f"{usual}; " + (
            "shapes and dtypes must agree" if unfit else "strict_load: False loads what fits"
        )
    return UserError(
        Problem(
            where=str(source.path),
            what=f"the weights do not fit the model ({counts})",
            rule="every parameter is written exactly once",
            nearest=nearest,
            advice=f"{advice}\n" + "\n".join(_table(source, differences)) + "\n",
        )
    )


def _table(source: Source, differences: Differences) -> list[str]:
    """The differences, one line each, some of each kind."""
    expected = differences.expected
    kinds = {
        "missing": [(name, "missing", str(list(expected[name]))) for name in differences.missing],
        "unknown": [(n, str(list(source.shape(n))), "unknown") for n in differences.extra],
        "of another shape or dtype": [(n, *both) for n, both in differences.unfit.items()],
    }
    shown = {kind: rows[:room] for (kind, rows), room in zip(
        kinds.items(), _rooms([len(rows) for rows in kinds.values()]), strict=True)}  # fmt: skip
    width = max(len(name) for rows in shown.values() for name, _, _ in rows)
    lines = [f"  {'tensor':{width}}  {'in the files':>16}  {'in the model':>16}"]
    for kind, rows in shown.items():
        lines += [f"  {name:{width}}  {disk:>16}  {model:>16}" for name, disk, model in rows]
        if more := len(kinds[kind]) - len(rows):
            lines.append(f"  ... and {more} more {kind}")
    return lines


def _rooms(lengths: Sequence[int]) -> list[int]:
    """How many rows of each kind are shown: `ROWS_SHOWN` in all, as evenly as possible."""
    rooms, left = [0] * len(lengths), ROWS_SHOWN
    while left and any(room < length for room, length in zip(rooms, lengths, strict=True)):
        for index, length in enumerate(lengths):
            if left and rooms[index] < length:
                rooms[index], left = rooms[index] + 1, left - 1
    return rooms


def _explained(missing: Sequence[str], extra: Sequence[str]) -> tuple[str, str] | None:
    """(what the weights are, advice), where names show it; None where they do not."""
    for table in installed(MODEL_NAMES).values():
        for foreign in table:
            if any(foreign.names.search(name) for name in extra):
                return f"They are {foreign.what}", foreign.advice
    if not missing or not extra:
        return None
    return _wrapped(missing, extra) or _prefixed(missing, extra) or _bare(missing, extra)


def _wrapped(missing: Sequence[str], extra: Sequence[str]) -> tuple[str, str] | None:
    """For names that differ only in the parts that wrappers add."""
    parts = sorted({part for name in extra for part in name.split(".") if part in WRAPPERS})
    for form in (_as_it_is, _in_peft, _of_base_model) if parts else ():
        named = {_without(name, parts): name for name in extra}
        pairs = {name: named.get(form(name), named.get(name)) for name in missing}
        if all(pairs.values()) or (form is _of_base_model and _all_but_heads(pairs)):
            what = "; ".join(dict.fromkeys(WRAPPERS[part] for part in parts))
            shown = " and ".join(f"`{part}.`" for part in parts)
            name, other = next(pair for pair in pairs.items() if pair[1])
            return (
                f"The names in the files have {shown} in them, which comes from {what}"
                f"{_others(len(extra) - len({*pairs.values()} - {None}))}",
                f"Save the tensors under the names of the model itself (`{name}`, not `{other}`)",
            )
    return None


def _as_it_is(name: str) -> str:
    return name


def _in_peft(name: str) -> str:
    """`base_model.model.` has one part more than the wrapper."""
    return f"model.{name}"


def _of_base_model(name: str) -> str:
    """Files of a base model, without head, have names without the first part."""
    return name.partition(".")[2]


def _all_but_heads(pairs: Mapping[str, str | None]) -> bool:
    return any(pairs.values()) and all(
        other or may_be_left_out(name) for name, other in pairs.items()
    )


def _without(name: str, parts: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _prefixed(missing: Sequence[str], extra: Sequence[str]) -> tuple[str, str] | None:
    """For files with one more prefix than the model."""
    prefix = _common_prefix(missing, extra)
    if prefix is None or not {f"{prefix}{name}" for name in missing} <= {*extra}:
        return None
    return (
        f"The names in the files begin with `{prefix}`, of a module around the model"
        f"{_others(len(extra) - len(missing))}",
        f"Save the tensors without it (`{missing[0]}`, not `{prefix}{missing[0]}`)",
    )


def _bare(missing: Sequence[str], extra: Sequence[str]) -> tuple[str, str] | None:
    """For files that lack a prefix of the model."""
    prefix = _common_prefix(extra, missing)
    if prefix is None or not {f"{prefix}{name}" for name in extra} <= {*missing}:
        return None
    return (
        f"The names in the files lack the `{prefix}` that those of the model begin with"
        f"{_others(len(missing) - len(extra), 'are missing')}",
        f"Save the tensors with it (`{prefix}{extra[0]}`, not `{extra[0]}`)",
    )


def _others(number: int, verb: str = "belong to other parts") -> str:
    return f" ({number} further tensors {verb})" if number > 0 else ""


def _common_prefix(short: Sequence[str], long: Sequence[str]) -> str | None:
    """The most frequent prefix of the names `long` before a name of `short`."""
    prefixes = Counter(
        other.removesuffix(name)
        for name in short[:SAMPLED]
        for other in long
        if other.endswith(f".{name}")
    )
    return prefixes.most_common(1)[0][0] if prefixes else None
