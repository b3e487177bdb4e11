"""Adapters offline: a directory of PEFT from a checkpoint, and a model with an adapter merged in.

Torch-free; memory: the adapter, and a few portions of the base. Invariants: a folder appears
complete or not at all, an input is never written to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.weights.adapters.config import Content, checked
from launcher.weights.adapters.copies import check_copies, without_copies
from launcher.weights.adapters.found import (
    FoundAdapter,
    entry_of,
    find_adapter,
    no_adapter,
    state_of_save,
)
from launcher.weights.adapters.merging import merging
from launcher.weights.adapters.peft_files import (
    check_ties,
    in_form_of_peft,
    modules_of,
    open_peft,
    write_peft,
)
from launcher.weights.adapters.tensors import Tensor, read_tensors
from launcher.weights.content import content_of
from launcher.weights.formats.tokenizer_files import TOKENIZER_EXTRA_FILES, TOKENIZER_FILES
from launcher.weights.log import Log, no_log
from launcher.weights.offline.described import described
from launcher.weights.offline.directory import (
    GENERATION_NAME,
    Chosen,
    Directory,
    choose_save,
    choose_weights,
    write_directory,
)
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.ranks.saves import model_folder
from launcher.weights.source import Source, detect
from launcher.weights.streaming.new_folder import check_apart, folder_aside

_OF_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")
"""Layers that PEFT moves to the routed experts of a model that has some."""
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""Keys of config.json."""


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter whose files are known."""

    found: FoundAdapter
    source: Source
    """Names of rank files; those of a directory of PEFT without their prefix."""
    family: str
    """`model_type` of the model, as far as the adapter shows it; empty for a directory of PEFT."""
    rank_file: Path | None = None
    """One of the rank files; None for a directory of PEFT."""
    has_experts: bool = False
    """Whether the model has routed experts, as far as it is known."""

    @property
    def warning(self) -> str:
        """Why PEFT would compute something else with it; empty where it does not."""
        dense = [module for module in modules_of(self.source.tensors)
                 if module.endswith(_OF_EXPERTS) and ".experts." not in module]  # fmt: skip
        if not self.has_experts or not dense:
            return ""
        return (
            f"PEFT (0.21) takes the adapter of `{dense[0]}` and {len(dense) - 1} others for one of "
            "routed experts, and computes something else: merge it (launcher.tools.merge_lora), or "
            "leave dense MLPs out of target_modules"
        )

    def tensors(self) -> tuple[dict[str, Tensor], Content]:
        """Its tensors and description, with the modules that files of the model have."""
        read = read_tensors(self.source, lambda name: not is_optimizer_state(name))
        read |= {alias: read[name] for alias, name in self.found.tied.items() if name in read}
        if self.found.is_peft:
            return read, self.found.config
        return in_form_of_peft(read, self.found.config, self.family)


def open_adapter(
    path: Path, suffix: str | None = None, *, best: bool = False, log: Log = no_log
) -> OpenAdapter:
    """The adapter at `path`: a directory of PEFT, a folder of checkpoints (the newest save, or the
    one that `suffix` or `best` choose) or one of its rank files. Raises `UserError`."""
    found = find_adapter(path)
    if found is not None and found.is_peft:
        checked(found.config, str(found.file))
        return OpenAdapter(found, open_peft(found.path, "", found.config), "")
    if detect(path) != "distributed":
        raise no_adapter(path)
    chosen = choose_save(path, suffix, best=best, log=log)
    assert chosen.rank_file is not None
    entry = entry_of(state_of_save(chosen.rank_file), path, chosen.rank_file)
    if entry is None:
        raise no_adapter(path)
    model = described(None, model_folder(chosen.rank_file))
    config = model.config if model else {}
    return OpenAdapter(
        entry, chosen.source, str(config.get("model_type", "")), chosen.rank_file,
        has_experts=any(bool(config.get(key)) for key in _EXPERTS),
    )  # fmt: skip


def export_adapter(
    path: Path, output_dir: Path, *, suffix: str | None = None, best: bool = False,
    overwrite: bool = False, log: Log = no_log,
) -> list[str]:  # fmt: skip
    """Write the adapter of a checkpoint as a directory of PEFT, with the tokenizer of its run.
    Returns the names of its tensors. Raises `UserError`."""
    adapter = open_adapter(path, suffix, best=best, log=log)
    if adapter.warning:
        log(f"warning: {adapter.warning}")
    with folder_aside(output_dir, path, overwrite=overwrite) as folder:
        return write_adapter(adapter, folder)


def write_adapter(adapter: OpenAdapter, folder: Path) -> list[str]:
    """Write an adapter into the empty `folder` as a directory of PEFT. Returns the names of its
    tensors. Raises `UserError`."""
    found = adapter.found
    names = write_peft(adapter.source, found.config, adapter.family, folder, found.tied)
    if adapter.rank_file is not None:
        _copy_tokenizer(model_folder(adapter.rank_file), folder)
    return names


def _copy_tokenizer(origin: Path, folder: Path) -> None:
    for name in (*TOKENIZER_FILES, *TOKENIZER_EXTRA_FILES):
        if (origin / name).is_file():
            shutil.copy2(origin / name, folder / name)


def merge_adapter(
    path: Path, output_dir: Path, *, base: Path | None = None, suffix: str | None = None,
    best: bool = False, overwrite: bool = False, log: Log = no_log,
    finish: Callable[[Path, Chosen, Directory], None] | None = None, **options: Any,
) -> Directory:  # fmt: skip
    """Write the model under the adapter at `path`, with the adapter merged in, as a complete
    Hugging Face directory. `base`: the directory of the model; None: that the adapter names.
    `finish`: called with the folder before it appears. Other options: `write_directory`. Raises
    `UserError`."""
    adapter = open_adapter(path, suffix, best=best, log=log)
    chosen = _base(adapter.found, base, log)
    check_apart(output_dir, chosen.source.path)
    copies = [f"{module}.weight" for module in modules_of(adapter.source.tensors)
              if f"{module}.weight" in adapter.source.tensors]  # fmt: skip
    check_copies(adapter.source, chosen.source, copies)
    adapter = replace(adapter, source=without_copies(adapter.source, copies))
    tensors, config = adapter.tensors()
    if adapter.found.is_peft:
        check_ties(tensors, config, [_tied(chosen, tensors)], str(adapter.source.path))
    place = None if adapter.rank_file is None else model_folder(adapter.rank_file)
    options = {
        "tokenizer": _tokenizer(adapter, place), "generation": _generation(place),
        "config": _config(chosen, place), **options,
    }  # fmt: skip
    with folder_aside(output_dir, path, overwrite=overwrite) as folder:
        directory = write_directory(
            chosen, folder, edits=lambda source: merging(source, tensors, config), log=log,
            **{key: value for key, value in options.items() if value is not None},
        )  # fmt: skip
        if finish is not None:
            finish(folder, Chosen(chosen.source, adapter.rank_file, chosen.name), directory)
    return directory


def _tied(chosen: Chosen, tensors: Mapping[str, Tensor]) -> list[str]:
    """The embedding and the head, where the base ties them and the adapter has them in full: two
    names, or one. Known by their rows: config.json has no names of tensors."""
    source = chosen.source
    folder = source.path if source.path.is_dir() else source.path.parent
    model = described(None, folder)
    rows = None if model is None else model.config.get("vocab_size")
    if model is None or rows is None:
        return []
    ends = [name for name in source.tensors if source.shape(name)[:1] == (rows,)]
    if len(ends) > 1 and not model.config.get("tie_word_embeddings"):
        return []
    return [name for name, tensor in tensors.items() if name.endswith(".weight")
            and tensor.words.shape[:1] == (rows,) and ".lora_" not in name]  # fmt: skip


def _tokenizer(adapter: OpenAdapter, place: Path | None) -> Path | None:
    """The directory of the tokenizer that the adapter was trained with; None: that of the base."""
    folder = adapter.found.path if place is None else place
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def _generation(place: Path | None) -> Path | None:
    """The settings of generation of the run that trained the adapter; None: those of the base."""
    path = None if place is None else place / GENERATION_NAME
    return path if path is not None and path.is_file() else None


def _config(chosen: Chosen, place: Path | None) -> Path | None:
    """The config.json of the run, where none lies with the base."""
    folder = chosen.source.path if chosen.source.path.is_dir() else chosen.source.path.parent
    own = model_folder(chosen.rank_file) if chosen.rank_file is not None else folder
    if (own / "config.json").is_file() or place is None:
        return None
    return place / "config.json"


def _base(found: FoundAdapter, given: Path | None, log: Log) -> Chosen:
    """The weights of the base, compared with those that the adapter was trained on."""
    path = given or (Path(found.base.path) if found.base.path else None)
    if path is None or (given is None and not path.exists()):
        known = (
            f"it was drawn from seed {found.base.seed}" if found.base.seed is not None else
            f"{path} is not there" if path is not None else "the adapter does not name it"
        )  # fmt: skip
        raise UserError(
            f"no base for the adapter in {found.path}: {known}",
            rule="an adapter is merged into the weights that it was trained on",
            advice="Give their directory: --pretrained_model_dir DIR",
        )
    chosen = choose_weights(path, log=log)
    content = content_of(chosen.source) if found.base.content else ""
    if content != found.base.content:
        problem = (
            f"{path} has {content}, the adapter was trained on {found.base.path} with "
            f"{found.base.content}"
        )
        if given is None:
            raise UserError(
                problem, rule="the base has changed since",
                advice="Give the directory of that base: --pretrained_model_dir DIR",
            )  # fmt: skip
        log(f"warning: {problem}")
    return chosen
