"""Rules about files and directories: what a run mode needs exists.

Only names are checked, no file is opened (`weights` has the rules about weights). A run that only
saves its strategy (`only_save_strategy`) needs no data.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.derived import (
    has_tokenizer,
    named_tokenizer_files,
    tokenizer_dir,
    tokenizer_json_of,
    used_datasets,
    uses_named_tokenizer,
    written_datasets,
)
from launcher.config.provenance import KeyProblem
from launcher.config.schema import CONVERSATION_LOADERS, DataLoaderSection, DatasetSection
from launcher.errors import did_you_mean
from launcher.extensions import DATA_CHECKS, TOKENIZER_TYPES, required
from launcher.json_text import lone_surrogate

NAMES_SHOWN = 5
"""How many names of a directory are listed where none of them is similar."""

TOKEN_LOADERS = frozenset({
    "MindDataset", "BlendedMegatronDatasetDataLoader", "TokenFileDataLoader",
})  # fmt: skip
"""Types of data loaders that read rows of tokens."""

_MEGATRON = "BlendedMegatronDatasetDataLoader"
_OF_RECORDS = ("HFDataLoader", "CommonDataLoader", *CONVERSATION_LOADERS)
_OF_DOCUMENTS = ("TextDataLoader", *_OF_RECORDS)
_BY_TYPE: dict[str, tuple[str, ...]] = {
    "suffixes": ("TextDataLoader",),
    "text_column": ("HFDataLoader", "CommonDataLoader"),
    "split": _OF_RECORDS,
    "path": _OF_RECORDS,
    "data_dir": _OF_RECORDS,
    "subset": _OF_RECORDS,
    "delimiter": _OF_RECORDS,
    "load_func": _OF_RECORDS,
    "column_map": (*_OF_RECORDS, "MindDataset"),
    "transforms": _OF_RECORDS,
    "prompt_template": ("InstructionDataLoader",),
    "train_on_roles": ("InstructionDataLoader",),
    "train_on_turns": ("InstructionDataLoader",),
    "format": CONVERSATION_LOADERS,
    "strict_fields": CONVERSATION_LOADERS,
    "streaming": ("HFDataLoader", "CommonDataLoader", "InstructionDataLoader"),
    "labels": ("MindDataset",),
    "pad_token_id": ("MindDataset",),
    "ignore_token_id": ("MindDataset",),
    "eod_token_id": ("MindDataset", "TokenFileDataLoader"),
    **dict.fromkeys(
        ("config", "sizes", "mindformers_sizes", "phase", "datasets_type"), (_MEGATRON,)
    ),
    "token_dtype": ("TokenFileDataLoader",),
    "num_samples": (*_OF_DOCUMENTS, "MindDataset"),
}
"""Key to the types of loaders that take it; keys that all take are left out."""


def nearest_path(path: str) -> str:
    """`did you mean `data/corpus`?` for the most similar existing path, else what the directory of
    the missing path contains."""
    missing = Path(path)
    while not missing.parent.exists():
        missing = missing.parent
    try:
        names = {child.name: child for child in missing.parent.iterdir()}
    except OSError:
        return ""
    found = did_you_mean(missing.name, names)
    if not found:
        return _holds(missing.parent, names)
    name = found.removeprefix("did you mean `").removesuffix("`?")
    rest = Path(path).relative_to(missing)
    near = names[name] / rest
    return f"did you mean `{near if near.exists() else names[name]}`?"


def _holds(folder: Path, names: Iterable[str]) -> str:
    """A few of the names in a directory."""
    if Path.cwd().is_relative_to(folder.resolve()):
        return ""  # not a directory that was meant
    all_names = sorted(name for name in names if name.isprintable())
    shown = [name for name in all_names if not name.startswith(".")] or all_names
    more = ", ..." if len(shown) > NAMES_SHOWN else ""
    return f"`{folder}` contains {', '.join(shown[:NAMES_SHOWN]) or 'nothing'}{more}"


def run_mode(check: Check) -> Iterator[KeyProblem]:
    """A run mode is set, and so is its input."""
    needs = {
        "train": ("train_dataset", "Add a train_dataset section"),
        "finetune": ("train_dataset", "Add a train_dataset section"),
        "eval": (
            "eval_datasets" if check.config.eval_datasets else "eval_dataset",
            "Add an eval_dataset section",
        ),
        "predict": ("input_data", "Write `--predict_data 'a prompt'`, or --interactive"),
    }
    if not check.mode:
        yield check.wrong(
            "run_mode",
            "",
            what="run_mode is required",
            advice="Write `--run_mode train` (or finetune, eval, predict, resume)",
        )
        return
    if check.config.only_save_strategy:
        if check.mode == "predict":
            yield check.wrong(
                "only_save_strategy",
                "not supported with run_mode predict",
                nearest="Nearest: run_mode train",
                also=("run_mode",),
            )
        return
    key, advice = needs[check.mode]
    if key == "input_data" and check.config.interactive:
        return
    if check.value(key) in (None, "", []):
        yield check.wrong(key, f"{check.mode} requires it", what=f"{key} is missing", advice=advice)


def datasets(check: Check) -> Iterator[KeyProblem]:
    """The data of this mode is set and exists."""
    if check.config.only_save_strategy:
        return
    for name, section in used_datasets(check.config).items():
        yield from _dataset(check, name, section)


def _dataset(check: Check, name: str, section: DatasetSection) -> Iterator[KeyProblem]:
    for key, loader in section.loaders.items():
        yield from _loader(check, f"{name}.{key}", loader)


def _loader(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    for key, kinds in _BY_TYPE.items():
        default = getattr(DataLoaderSection(), key)
        if getattr(loader, key) != default and loader.type not in kinds:
            yield check.wrong(
                f"{prefix}.{key}",
                f"not an argument of {loader.type}",
                nearest=f"It belongs to {kinds[0]}",
                also=(f"{prefix}.type",),
            )
    missing = list(_missing_files(check, prefix, loader))
    yield from missing
    if not missing and loader.type in DATA_CHECKS:
        yield from required(DATA_CHECKS, loader.type, f"{prefix}.type")(check, prefix, loader)


def _missing_files(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    if loader.type == _MEGATRON:
        return  # its files are named in `config`
    keys = tuple(f"{prefix}.{key}" for key in ("dataset_dir", "dataset_files", "data_files"))
    if not loader.paths and not loader.data_files:
        yield check.wrong(
            keys[0],
            "a data set needs files",
            what=f"{prefix.removesuffix('.data_loader')} has no files",
            advice=f"Set {keys[0]} to a file, a directory or a glob pattern",
            also=(*keys, f"{prefix}.type", f"{prefix}.path"),
        )
    if loader.path and not loader.record_format and not Path(loader.path).exists():
        return  # `records.places` reports it
    for key, path in loader.sources():
        if "://" in path:
            continue  # `streaming` has the rules about URLs
        if not Path(path).exists() and not glob.glob(path, recursive=True):
            is_glob = glob.has_magic(path)
            yield check.wrong(
                f"{prefix}.{key}",
                "no file matches this pattern" if is_glob else "no such file or directory",
                what=f"{prefix}.{key} = {path!r}",
                nearest="" if is_glob else nearest_path(path),
                advice="Paths are relative to the current directory",
            )


def tokenizer(check: Check) -> Iterator[KeyProblem]:
    """A tokenizer exists, unless a training reads rows of tokens."""
    if not check.mode or check.config.only_save_strategy or _reads_tokens(check):
        return
    if uses_named_tokenizer(check.config):
        yield from _named_tokenizer(check)
        return
    nested = "processor.tokenizer.pretrained_model_dir"
    key = nested if check.value(nested) else "pretrained_model_dir"
    folder = tokenizer_dir(check.config)
    if not folder:
        yield check.wrong(
            nested,
            "a tokenizer is required",
            what="no tokenizer is given",
            advice=f"Set {nested} or pretrained_model_dir to a Hugging Face directory",
            also=("pretrained_model_dir", "processor", "processor.tokenizer", *_loaders(check)),
        )
    elif not Path(folder).is_dir():
        if key == nested:  # another rule reports the other key
            yield check.wrong(
                key, "no such directory", nearest=nearest_path(folder), also=_loaders(check)
            )
    elif not has_tokenizer(folder):
        yield check.wrong(
            key,
            "contains no tokenizer (tokenizer.json or similar)",
            advice=f"Set {nested} to the directory of the tokenizer",
            also=_loaders(check),
        )


def _reads_tokens(check: Check) -> bool:
    """Whether a training needs no tokenizer: its data are tokens already."""
    return (
        check.trains
        and check.config.train_dataset is not None
        and all(
            loader.type in TOKEN_LOADERS
            for section in used_datasets(check.config).values()
            for loader in section.loaders.values()
        )
    )


def _loaders(check: Check) -> tuple[str, ...]:
    """Keys of a training that decide whether it needs a tokenizer."""
    sections = written_datasets(check.config) if check.trains else {}
    return tuple(
        f"{name}.{key}.type" for name, section in sections.items() for key in section.loaders
    )


def _named_tokenizer(check: Check) -> Iterator[KeyProblem]:
    """The files of a tokenizer exist, and their type is known."""
    section, prefix = check.config.processor.tokenizer, "processor.tokenizer"
    files = named_tokenizer_files(check.config)
    for key, path in files.items():
        if not path.is_file():
            yield check.wrong(
                f"{prefix}.{key}",
                "no such file",
                what=f"{prefix}.{key} = {str(path)!r}",
                nearest=nearest_path(str(path)),
                advice=f"Set it to the file, or {prefix}.pretrained_model_dir to a Hugging Face "
                "directory with a tokenizer",
                also=(prefix, "processor", *_loaders(check)),
            )
    if section.type not in TOKENIZER_TYPES and tokenizer_json_of(files) is None:
        known = ", ".join(TOKENIZER_TYPES)
        yield check.wrong(
            f"{prefix}.type",
            "unknown type of tokenizer" if section.type else "files of a tokenizer need a type",
            what="" if section.type else f"{prefix}.type is missing",
            nearest=did_you_mean(str(section.type), TOKENIZER_TYPES) or f"Known: {known}",
            advice="Or give a tokenizer.json as tokenizer_file",
            also=(prefix, *(f"{prefix}.{key}" for key in files), *_loaders(check)),
        )


def named_paths(check: Check) -> Iterator[KeyProblem]:
    """Directories and files at the top level exist."""
    config = check.config
    if config.pretrained_model_dir and not Path(config.pretrained_model_dir).is_dir():
        yield check.wrong(
            "pretrained_model_dir",
            "no such directory",
            nearest=nearest_path(config.pretrained_model_dir),
            advice="Models are not downloaded: give a local directory",
        )
    strategy = config.src_strategy_path_or_dir
    if strategy and not config.only_save_strategy and not Path(strategy).exists():
        yield check.wrong(
            "src_strategy_path_or_dir",
            "no such file or directory",
            nearest=nearest_path(strategy),
            advice="Give a strategy file, a merged one, or the directory strategy/ of the run that "
            "wrote the weights",
        )
    if config.register_path and not Path(config.register_path).exists():
        yield check.wrong(
            "register_path", "no such file or directory", nearest=nearest_path(config.register_path)
        )
    if Path(config.output_dir).is_file():
        yield check.wrong("output_dir", "must be a directory, this is a file")
    if config.data_cache.dir and Path(config.data_cache.dir).is_file():
        yield check.wrong("data_cache.dir", "must be a directory, this is a file")
    prompt = config.input_data
    for text in [prompt] if isinstance(prompt, str) else prompt or ():
        if wrong := lone_surrogate(text):
            yield check.wrong(
                "input_data",
                f"contains {wrong}, which is not a valid character: a prompt must be valid UTF-8",
                advice="Give the prompt in UTF-8, or as a file of prompts",
            )
    if isinstance(prompt, str) and "/" in prompt and Path(prompt[:255]).is_dir():
        yield check.wrong(
            "input_data", "this is a directory", advice="Give a text file with one prompt per line"
        )
