"""A complete Hugging Face directory from any weights: what `transformers`, vLLM and llama.cpp open.

    model-0000x-of-0000y.safetensors, model.safetensors.index.json      streamed, cast if asked for
    config.json                       of the run that saved, with the dtype of the files
    tokenizer files, chat template    of the run, or of another directory that is given
    generation_config.json            of the run; special tokens that it lacks, from the tokenizer

Owns which save and which files these are. Torch-free; memory: a few tensors. Invariants: the folder
appears complete or not at all, an input is never written to, nothing that is read is executed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.weights.foreign_names import COMPLETE, under_hugging_face_names
from launcher.weights.formats.tokenizer_files import TOKENIZER_EXTRA_FILES, TOKENIZER_FILES
from launcher.weights.joined import together
from launcher.weights.log import Log, no_log
from launcher.weights.offline.described import NAME as CONFIG_NAME
from launcher.weights.offline.described import described, write_description
from launcher.weights.offline.export import DEFAULT_SHARD_BYTES, Exported, write_complete
from launcher.weights.offline.merge import DTYPES
from launcher.weights.offline.slicing import copy_side_files
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.ranks.manifests import BEST_FILE
from launcher.weights.ranks.rank_folders import first_file, save_of, saves
from launcher.weights.ranks.saves import copy_model_files, model_folder, open_save, rank_files
from launcher.weights.source import Source, check_one_kind, detect, no_weights, open_complete
from launcher.weights.streaming.new_folder import check_apart, folder_aside
from launcher.weights.streaming.stream import WORKERS, Edit, Progress

GENERATION_NAME = "generation_config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector")
"""In the names of tensors of an adapter, as `peft` writes them."""
NAMED_TEMPLATES = "additional_chat_templates"
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")
TRAINABLE = "checkpoint_trainable"
_DTYPE_NAMES = {name: key for key, name in DTYPES.items()}


@dataclass(frozen=True)
class Chosen:
    """The weights that are exported."""

    source: Source
    rank_file: Path | None
    """One of their rank files; None for complete weights."""
    name: str
    """In messages."""


@dataclass(frozen=True)
class Directory:
    """What an export wrote into its folder."""

    exported: Exported
    config: Mapping[str, Any]
    """Content of its config.json."""
    generation: Mapping[str, Any]
    """Content of its generation_config.json."""
    parameters: int
    has_tokenizer: bool
    has_template: bool


def choose_weights(
    path: Path, *, suffix: str | None = None, best: bool = False, log: Log = no_log
) -> Chosen:
    """The weights at `path`: complete ones, those of a rank file, or a save of a folder of
    checkpoints: the newest, the one `suffix` (`1_20`), or with `best` that of `best.json`.

    Raises `UserError` for a path without weights, and for an adapter, which has no base.
    """
    if (path / ADAPTER_CONFIG).is_file():
        raise _adapter(path)
    kind = detect(path)
    if kind == "nothing":
        raise no_weights(path)
    if kind != "distributed":
        if suffix is not None or best:
            option = "--best" if best else "--file_suffix"
            raise UserError(
                f"{option}: {path} holds complete weights", rule="it chooses among saves of a run",
                advice=f"Leave out {option}",
            )  # fmt: skip
        chosen = Chosen(open_complete(path), None, str(path))
    else:
        chosen = choose_save(path, suffix, best=best, log=log)
    _check_weights(path, chosen.source)
    return chosen


def choose_save(
    path: Path, suffix: str | None = None, *, best: bool = False, log: Log = no_log
) -> Chosen:
    """A save of the folder of checkpoints at `path`, or that of a rank file, whatever it holds: as
    `choose_weights`."""
    check_one_kind(path)
    root = path.parent.parent if path.is_file() else path
    if root.name == TRAINABLE and (root.parent / "checkpoint").is_dir():
        raise UserError(
            f"{root} has the trained weights alone", rule="a directory has all of them",
            nearest=f"did you mean `{root.parent / 'checkpoint'}`?",
        )  # fmt: skip
    if suffix is not None and not path.is_file():
        files = rank_files(root, suffix)
    else:
        file = _best_file(root) if best else first_file(path)
        if file is None:
            raise no_weights(path)
        files = save_of(file).in_rank_order
    source = open_save(root, files, log=log)
    label = save_of(files[0]).label
    others = len(saves(root)) - 1
    if others and not path.is_file():
        which = "the best" if best else "as asked for" if suffix is not None else "the newest"
        log(f"{root}: {label}, {which} of {others + 1} saves")
    return Chosen(source, files[0], f"{root} ({label})")


def _best_file(root: Path) -> Path:
    """The file of rank 0 of the save that `best.json` names."""
    place = root / BEST_FILE
    try:
        relative = Path(json.loads(place.read_bytes())["file"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"--best: {place} does not exist or cannot be read",
            rule="a run with `keep_best: True` in CheckpointMonitor writes it",
            advice="Choose a save with --file_suffix; list_checkpoints shows them",
        ) from None
    file = root / relative.parent.name / relative.name
    if not file.is_file():
        raise UserError(f"--best: {file} does not exist", where=str(place),
                        advice="Choose a save with --file_suffix")  # fmt: skip
    return file


def _check_weights(path: Path, source: Source) -> None:
    names = [name for name in source.tensors if not is_optimizer_state(name)]
    if any(part in name for name in names for part in ADAPTER_PARTS):
        raise _adapter(path)


def _adapter(path: Path) -> UserError:
    return UserError(
        f"{path} holds an adapter",
        rule="a complete directory has the weights of the base with the adapter merged into them",
        nearest=f"python -m launcher.tools.merge_lora --load_checkpoint {path} --output_dir DIR",
        advice="python -m launcher.tools.export_adapter writes the adapter alone, as PEFT opens it",
    )


def write_directory(
    chosen: Chosen,
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: Path | None = None,
    generation: Path | None = None,
    config: Path | None = None,
    keys: Mapping[str, Any] | None = None,
    workers: int = WORKERS,
    progress: Progress | None = None,
    edits: Callable[[Source], Edit] | None = None,
    log: Log = no_log,
) -> Directory:
    """Write the directory into the empty `folder`. Optimizer state is left out.

    `dtype`: a key of `DTYPES`, that floating weights are cast to. `tokenizer`: a directory whose
    tokenizer is taken instead of that of the run. `generation`: a generation_config.json that is
    taken instead of that of the run. `config`: config.json or YAML of the model, where none lies
    with the weights. `keys`: about the orders of rows, see `foreign_names.KEYS`.
    `edits`: the weights, under the names they get, to what is written instead of them. Raises
    `UserError`, also without a config.json.
    """
    places = [_model_folder(chosen)]
    model = described(config, *places)
    if model is None:
        raise UserError(
            f"{chosen.name} has no config.json", rule="it describes the model of the weights",
            advice="Give --config: a config.json, its folder, or the YAML file of the run",
        )  # fmt: skip
    given = {**model.keys, **{key: value for key, value in (keys or {}).items()
                              if value is not None}, COMPLETE: True}  # fmt: skip
    source = under_hugging_face_names(
        together(chosen.source, model.config), model.config, given, log
    )
    exported = write_complete(
        source, folder, keep=lambda name: not is_optimizer_state(name), workers=workers,
        max_shard_bytes=max_shard_bytes, dtype=None if dtype is None else DTYPES[dtype],
        progress=progress, edit=None if edits is None else edits(source),
    )  # fmt: skip
    write_description(folder, model)
    _copy_files(chosen, folder, tokenizer)
    if generation is not None:
        shutil.copy2(generation, folder / GENERATION_NAME)
    written = _finish_config(folder / CONFIG_NAME, dtype or _dtype_of(source))
    return Directory(
        exported, written, _write_generation(folder, written), _parameters(source),
        _has_tokenizer(folder), _has_template(folder),
    )  # fmt: skip


def export_directory(
    path: Path, output_dir: Path, *, overwrite: bool = False, suffix: str | None = None,
    best: bool = False, finish: Callable[[Path, Chosen, Directory], None] | None = None,
    log: Log = no_log, **options: Any,
) -> Directory:  # fmt: skip
    """Export the weights at `path` (see `choose_weights`) to `output_dir`, which appears when it is
    complete. `finish`: called with the folder before that. Other options: `write_directory`.

    Raises `UserError`: an existing `output_dir` that is not empty needs `overwrite`.
    """
    chosen = choose_weights(path, suffix=suffix, best=best, log=log)
    for given in (options.get("tokenizer"), options.get("config")):
        if given is not None and given.is_dir():
            check_apart(output_dir, given)
    with folder_aside(output_dir, path, overwrite=overwrite) as folder:
        directory = write_directory(chosen, folder, log=log, **options)
        if finish is not None:
            finish(folder, chosen, directory)
    return directory


def _model_folder(chosen: Chosen) -> Path:
    """Where config.json and the tokenizer are."""
    if chosen.rank_file is not None:
        return model_folder(chosen.rank_file)
    path = chosen.source.path
    return path if path.is_dir() else path.parent


def _copy_files(chosen: Chosen, folder: Path, tokenizer: Path | None) -> None:
    if chosen.rank_file is not None:
        copy_model_files(chosen.rank_file, folder)
    else:
        copy_side_files(_model_folder(chosen), folder)
    if tokenizer is None:
        return
    if not _has_tokenizer(tokenizer):
        raise UserError(
            f"--tokenizer {tokenizer}: no tokenizer there",
            rule=f"a directory with {', '.join(TOKENIZER_FILES[:3])} or another file of one",
            advice="Give the directory of the tokenizer that the data was encoded with",
        )
    for name in (*TOKENIZER_FILES, *TOKENIZER_EXTRA_FILES):
        (folder / name).unlink(missing_ok=True)
        if (tokenizer / name).is_file():
            shutil.copy2(tokenizer / name, folder / name)
    shutil.rmtree(folder / NAMED_TEMPLATES, ignore_errors=True)
    for path in sorted(tokenizer.glob(f"{NAMED_TEMPLATES}/*.jinja")):
        (folder / NAMED_TEMPLATES).mkdir(exist_ok=True)
        shutil.copy2(path, folder / NAMED_TEMPLATES / path.name)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _has_template(folder: Path) -> bool:
    in_config = _read(folder / "tokenizer_config.json").get("chat_template")
    return (folder / "chat_template.jinja").is_file() or bool(in_config)


def _dtype_of(source: Source) -> str | None:
    """The dtype that most of the floating weights have; None where no key of `DTYPES` fits."""
    sizes: dict[str, int] = {}
    for name in source.tensors:
        if not is_optimizer_state(name):
            dtype = source.dtype(name)
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(source.shape(name))
    return _DTYPE_NAMES.get(max(sizes, key=lambda dtype: sizes[dtype], default=""))


def _parameters(source: Source) -> int:
    return sum(
        math.prod(source.shape(name)) for name in source.tensors if not is_optimizer_state(name)
    )


def _finish_config(path: Path, dtype: str | None) -> dict[str, Any]:
    """Set the dtype in config.json, and the older spellings of its keys. Returns its content."""
    before = _read(path)
    content = {**before, **older_spellings(before)}
    if dtype is not None and content.get("dtype") != dtype:
        content.pop("torch_dtype", None)
        content["dtype"] = dtype
    if content != before:
        _write(path, content)
    return content


def older_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys before transformers 5 for the rotary embedding, where config.json has the newer
    ones alone: readers that do not know `rope_parameters` would take their defaults silently."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return {}  # none, or one for each kind of layer, which had no older spelling
    outer = ("rope_theta", "partial_rotary_factor")
    found = {key: rope[key] for key in outer if rope.get(key) is not None}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: rope[key] for key in rope if key not in outer}
    return {key: value for key, value in found.items() if config.get(key) is None}


def _write_generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Add to generation_config.json the special tokens it lacks: those of config.json, else those
    of the tokenizer, as prediction takes them. Returns its content."""
    path = folder / GENERATION_NAME
    content = _read(path)
    ids = special_token_ids(folder)
    added = {}
    for token in SPECIAL_TOKENS:
        key = f"{token}_id"
        value = config.get(key) if config.get(key) is not None else ids.get(token)
        if content.get(key) is None and value is not None:
            added[key] = value
    if added or not path.is_file():
        content = {**content, **added}
        _write(path, content)
    return content


def special_token_ids(folder: Path) -> dict[str, int]:
    """The ids of the special tokens that the tokenizer files in `folder` name."""
    config = _read(folder / "tokenizer_config.json")
    named = {**_read(folder / "special_tokens_map.json"), **config}
    ids: dict[str, int] = {}
    tokenizer = _read(folder / "tokenizer.json")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        ids |= {text: number for text, number in vocabulary.items() if isinstance(number, int)}
    for entry in tokenizer.get("added_tokens") or []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            ids[str(entry.get("content"))] = entry["id"]
    decoder = config.get("added_tokens_decoder")
    for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(entry, dict) and str(number).isdecimal():
            ids[str(entry.get("content"))] = int(number)
    found = {}
    for token in SPECIAL_TOKENS:
        value = named.get(token)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text in ids:
            found[token] = ids[text]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
