"""Weights under the names of MindFormers from Hugging Face weights, and back.

Owns what `convert_weight` writes where: a folder of complete weights, or a single file. Outputs
appear complete, and are streamed: memory is that of a few portions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import UserError, did_you_mean
from launcher.extensions import NAME_WRITERS, required
from launcher.weights.foreign_names import COMPLETE, Named, under_hugging_face_names
from launcher.weights.joined import together
from launcher.weights.log import Log, no_log
from launcher.weights.offline.convert import safetensors_to_ckpt
from launcher.weights.offline.described import NAME, Described, described, write_description
from launcher.weights.offline.export import Exported, write_complete
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.source import Source
from launcher.weights.streaming.new_folder import folder_aside
from launcher.weights.streaming.stream import WORKERS, Progress

MODELS: Mapping[str, tuple[str, ...]] = {
    "llama": ("llama", "mistral"),
    "qwen2": ("qwen2",),
    "qwen2_5": ("qwen2",),
    "qwen2_moe": ("qwen2_moe",),
    "qwen3": ("qwen3",),
    "qwen3_moe": ("qwen3_moe",),
    "mixtral": ("mixtral",),
    "deepseekv3": ("deepseek_v3",),
    "deepseek_v3": ("deepseek_v3",),
    "telechat": ("telechat",),
    "telechat2": ("telechat",),
    "glm_n": ("chatglm", "glm"),
    "glm4": ("chatglm", "glm"),
}
"""Name of a model in the command of MindFormers (`-` counts as `_`) to its `model_type`."""
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16",
          "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # fmt: skip
ONE_FILE = (".safetensors", ".ckpt")
UNLIMITED = 1 << 62


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is converted to what."""

    model: str | None = None
    """A key of `MODELS`, which `model_type` is compared with; None: no comparison."""
    reversed: bool = False
    """From MindFormers to Hugging Face."""
    dtype: str | None = None
    """A key of `DTYPES`; None: unchanged."""
    config: Path | None = None
    """config.json or YAML file of the model; None: config.json beside the weights."""
    strategy: Path | None = None
    suffix: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """`naming`, `qkv_concat`, and keys about the orders of rows."""


def convert_weight(
    input_path: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    conversion: Conversion,
    *,
    overwrite: bool = False,
    workers: int = WORKERS,
    progress: Progress | None = None,
    log: Log = no_log,
) -> Exported:
    """Convert the weights at `input_path`: a folder of complete weights, a file, or rank folders.

    `output_path`: a folder, or a file ending in .safetensors or .ckpt. Raises `UserError`.
    """
    origin, target = Path(input_path), Path(output_path)
    source = open_any_format(origin, conversion.suffix, conversion.strategy, log)
    beside = origin if origin.is_dir() else origin.parent
    model = described(conversion.config, beside)
    if model is None:
        raise UserError(
            f"{beside} has no {NAME}",
            rule="names are mapped by the sizes of the model",
            advice="Give it: --config path/to/config.json, or the YAML file of the run",
        )
    _check_model(conversion.model, model)
    named = _named(source, model, conversion, log)
    form = "huggingface" if conversion.reversed else "mindspore"
    if conversion.reversed and target.suffix == ".ckpt":
        raise UserError(
            f"--output_path {target}",
            rule="Hugging Face weights are safetensors",
            advice="Give a folder, or a file that ends in .safetensors",
        )
    with _target(target, origin, overwrite) as folder:
        exported = write_complete(
            named.source, folder, form=form, metadata=named.metadata, workers=workers,
            dtype=None if conversion.dtype is None else DTYPES[conversion.dtype],
            progress=progress, max_shard_bytes=_limit(target),
        )  # fmt: skip
        if target.suffix in ONE_FILE:
            _one_file(folder, exported, target)
        else:
            write_description(folder, model, conversion.dtype and DTYPES[conversion.dtype])
    return exported


def _limit(target: Path) -> int:
    return UNLIMITED if target.suffix in ONE_FILE else 5_000_000_000


def _named(source: Source, model: Described, conversion: Conversion, log: Log) -> Named:
    source = together(source, model.config)
    given = {**model.keys, **{k: v for k, v in conversion.options.items() if v is not None}}
    if not conversion.reversed:
        write = required(NAME_WRITERS, "mindspore", f"{source.path} is to be renamed")
        named: Named = write(source, model.config, given, log)
        return named
    translated = under_hugging_face_names(source, model.config, {**given, COMPLETE: True}, log)
    if translated is source:
        raise UserError(
            f"{source.path} has no names of MindFormers",
            rule="--reversed converts weights of MindFormers to Hugging Face weights",
            nearest=f"It has `{next(iter(source.tensors), 'no tensor')}`",
            advice="Leave out --reversed for the other way",
        )
    return Named(translated)


def _check_model(name: str | None, model: Described) -> None:
    if name is None:
        return
    families = MODELS.get(name.lower().replace("-", "_"))
    if families is None:
        raise UserError(
            f"--model {name}",
            rule=f"models are {', '.join(MODELS)}",
            nearest=did_you_mean(name, MODELS),
        )
    found = model.config.get("model_type")
    if found not in families:
        raise UserError(
            f"--model {name}, and config.json has model_type {found!r}",
            rule=f"{name} is {' or '.join(families)}",
            advice="Give the weights or the config.json of that model",
        )


@contextmanager
def _target(target: Path, origin: Path, overwrite: bool) -> Iterator[Path]:
    """The folder to write into. A single file is moved out of it when it is complete."""
    if target.suffix not in ONE_FILE:
        with folder_aside(target, origin, overwrite=overwrite, option="--output_path") as folder:
            yield folder
        return
    if os.path.lexists(target) and (not overwrite or target.is_dir()):
        raise UserError(
            f"{target} exists",
            rule="existing files are not replaced by default",
            advice="Give another --output_path, or --overwrite",
        )
    if os.path.exists(target) and os.path.exists(origin) and target.samefile(origin):
        raise UserError(f"{target} is the input", rule="an input is never written to",
                        advice="Give another --output_path")  # fmt: skip
    aside = target.with_name(f".{target.name}.folder")
    with folder_aside(aside, origin, overwrite=True, option="--output_path") as folder:
        yield folder
    os.replace(aside / target.name, target)
    for child in aside.iterdir():
        child.unlink()
    aside.rmdir()


def _one_file(folder: Path, exported: Exported, target: Path) -> None:
    """Make one file of what was written to `folder`. Raises `UserError` where it is several."""
    files = [name for name in exported.files if name.startswith("model-")]
    if len(exported.files) != 1 or not files:
        raise UserError(
            f"--output_path {target}: these weights are {len(exported.files)} files",
            rule="optimizer state and numbers of a run lie beside the weights",
            advice="Give a folder",
        )
    written = folder / files[0]
    if target.suffix == ".ckpt":
        safetensors_to_ckpt(written, folder)
        written.unlink()
        written = written.with_suffix(".ckpt")
    os.replace(written, folder / target.name)
