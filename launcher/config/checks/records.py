"""Rules about data loaders of records: where they are, which of them, and what their columns mean.

Only names are checked, no file is opened; columns are compared with the files when these are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.checks.paths import TOKEN_LOADERS, nearest_path
from launcher.config.derived import used_datasets
from launcher.config.provenance import KeyProblem
from launcher.config.schema import JUDGED, PAIRS, DataLoaderSection, DatasetSection
from launcher.config.schema.data import RECORD_FORMATS
from launcher.config.schema.splits import WrongSplit, names_of_split, parse_split
from launcher.config.schema.transforms import WrongTransform, parse_transform
from launcher.errors import did_you_mean

TARGETS = {
    "alpaca": ("instruction", "input", "output", "system", "history", "tools"),
    "messages": ("messages", "system", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
}
"""Format -> the fields that column_map may name."""

PREFERENCE_TARGETS = {
    PAIRS: (
        *("prompt", "chosen", "rejected", "instruction", "input", "system", "history", "tools"),
        *("messages", "rejected_response", "rejected_messages", "conversations"),
    ),
    JUDGED: (
        *("prompt", "completion", "label", "kto_tag", "chosen", "rejected", "instruction", "input"),
        *("output", "system", "history", "tools", "messages", "conversations"),
    ),
}
"""Type of a loader of preferences -> the fields that column_map may name."""

_OTHER_WORDS = {
    "prompt": "instruction", "question": "instruction", "query": "input", "context": "input",
    "response": "output", "answer": "output", "completion": "output", "target": "output",
    "content": "text", "body": "text", "document": "text", "dialogue": "messages",
    "chat": "messages", "conversation": "conversations", "functions": "tools",
}  # fmt: skip
"""What other programs call these fields (`columns` of LLaMA-Factory)."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LOADED_FROM_DISK = ("state.json", "dataset_dict.json")


def _sections(check: Check) -> Iterator[tuple[str, DatasetSection]]:
    """The data sections that this mode reads."""
    if not check.config.only_save_strategy:
        yield from used_datasets(check.config).items()


def _loaders(check: Check) -> Iterator[tuple[str, DataLoaderSection]]:
    for name, section in _sections(check):
        for key, loader in section.loaders.items():
            yield f"{name}.{key}", loader


def places(check: Check) -> Iterator[KeyProblem]:
    """`path` is a format or a local folder, and is not given beside another place."""
    for prefix, loader in _loaders(check):
        yield from _format_of_path(check, prefix, loader)
        if not loader.path or loader.record_format:
            continue
        if not Path(loader.path).exists():
            yield _absent(check, f"{prefix}.path", loader.path)
        others = [key for key in ("dataset_dir", "dataset_files") if getattr(loader, key)]
        if others:
            yield check.wrong(
                f"{prefix}.{others[0]}",
                f"{prefix}.path names the records already ({loader.path!r})",
                advice="Remove one of the two",
                also=(f"{prefix}.path", f"{prefix}.type"),
            )


def _format_of_path(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    """A format needs files; `load_from_disk` needs the folder that it opens."""
    folder = Path(loader.root or loader.dataset_dir)
    if loader.load_func == "load_from_disk" and (
        loader.record_format
        or (folder.is_dir() and not any((folder / name).exists() for name in _LOADED_FROM_DISK))
    ):
        yield check.wrong(
            f"{prefix}.load_func",
            f"{loader.record_format or folder} was not written by Dataset.save_to_disk: it has no "
            f"{' or '.join(_LOADED_FROM_DISK)}",
            nearest="Nearest: load_dataset",
            advice=f"Give such a folder as {prefix}.path",
            also=(f"{prefix}.path", f"{prefix}.dataset_dir"),
        )
    if loader.subset and (not loader.path or loader.record_format):
        yield check.wrong(
            f"{prefix}.subset", "a subset is a folder below path", advice=f"Set {prefix}.path"
        )


def _absent(check: Check, key: str, path: str) -> KeyProblem:
    """The problem of a `path` that does not exist: a format, a name on a hub, or a wrong path."""
    near = did_you_mean(path.lower(), RECORD_FORMATS)
    formats = ", ".join(RECORD_FORMATS)
    if near or "/" not in path:
        return check.wrong(
            key, f"neither a format ({formats}) nor a local folder",
            nearest=near or nearest_path(path),
            advice="Relative paths start at the current directory",
        )  # fmt: skip
    if not _HUB_NAME.fullmatch(path) or Path(path).parent.is_dir():
        return check.wrong(
            key, "no such file or directory", nearest=nearest_path(path),
            advice="Relative paths start at the current directory",
        )  # fmt: skip
    folder = path.rpartition("/")[2]
    return check.wrong(
        key,
        "no local folder has this name, and nothing is downloaded from a hub",
        advice=f"Run `hf download --repo-type dataset {path} --local-dir {folder}` on a machine "
        f"with a network, and set {key} to {folder}",
    )


def tables(check: Check) -> Iterator[KeyProblem]:
    """The delimiter of a table is one character."""
    words = {"tab": "\\t", "comma": ",", "semicolon": ";", "pipe": "|", "\\t": "\\t"}
    for prefix, loader in _loaders(check):
        sign = loader.delimiter
        if sign is not None and (len(sign) != 1 or sign in '"\r\n'):
            near = words.get(sign.lower(), sign[0] if sign and sign[0] not in '"\r\n' else ";")
            yield check.wrong(
                f"{prefix}.delimiter", "must be one character, and no quote or line break",
                nearest=f'Nearest: "{near}"', also=(f"{prefix}.type",),
            )  # fmt: skip


def splits(check: Check) -> Iterator[KeyProblem]:
    """`split` can be read, and data_files by split have it."""
    for prefix, loader in _loaders(check):
        try:
            parse_split(loader.split)
        except WrongSplit as error:
            yield check.wrong(f"{prefix}.split", error.rule, nearest=error.nearest)
            continue
        if isinstance(loader.data_files, dict):
            yield from _files_by_split(check, prefix, loader, loader.data_files)


def _files_by_split(
    check: Check, prefix: str, loader: DataLoaderSection, files: dict[str, object]
) -> Iterator[KeyProblem]:
    for name, value in files.items():
        paths = value if isinstance(value, list) else [value]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            key = f"{prefix}.data_files.{name}"
            rule = "a split has a file, a glob or a list of them"
            yield check.wrong(key, rule, what=f"{key} = {value!r}")
    for name in names_of_split(loader.split):
        if name not in files:
            yield check.wrong(
                f"{prefix}.split",
                f"{prefix}.data_files has no files of the split `{name}`",
                nearest=did_you_mean(name, files) or f"Splits: {', '.join(files) or 'none'}",
                also=(f"{prefix}.data_files",),
            )


def columns(check: Check) -> Iterator[KeyProblem]:
    """column_map maps fields that are read to names of columns. Files of tokens have rules of their
    own, in DATA_CHECKS."""
    for prefix, loader in _loaders(check):
        if loader.type in TOKEN_LOADERS:
            continue
        for target, source in (loader.column_map or {}).items():
            key = f"{prefix}.column_map.{target}"
            what = f"{key} = {source!r}"  # a name may have dots
            known = _targets(loader)
            if target not in known:
                word = _OTHER_WORDS.get(target, "")
                near = f"did you mean `{word}`?" if word in known else did_you_mean(target, known)
                yield check.wrong(
                    key,
                    f"{_reader(loader)} reads no field of this name",
                    what=what,
                    nearest=_turned(target, source, known) or near or f"Fields: {', '.join(known)}",
                    advice="Write `field that is read: column of the file`",
                    also=(f"{prefix}.type",),
                )
            elif not isinstance(source, str) or not source:
                yield check.wrong(key, "must be the name of a column of the files", what=what)
        text = (loader.column_map or {}).get("text")
        if text and loader.text_column not in ("text", text):
            yield check.wrong(
                f"{prefix}.text_column",
                f"{prefix}.column_map.text = {text!r} names another column",
                advice="Remove one of the two",
            )  # fmt: skip


def _turned(target: str, source: object, known: tuple[str, ...]) -> str:
    """A hint where a pair was written the wrong way round."""
    return f"did you mean `{source}: {target}`?" if source in known else ""


def _targets(loader: DataLoaderSection) -> tuple[str, ...]:
    if loader.type in PREFERENCE_TARGETS:
        return PREFERENCE_TARGETS[loader.type]
    if loader.type != "InstructionDataLoader":
        return ("text",)
    if loader.format:
        return TARGETS.get(loader.format, ())
    return tuple(dict.fromkeys(name for names in TARGETS.values() for name in names))


def _reader(loader: DataLoaderSection) -> str:
    named = loader.format and loader.type not in PREFERENCE_TARGETS
    return f"the format {loader.format}" if named else loader.type


def transforms(check: Check) -> Iterator[KeyProblem]:
    """Every step is known and has its arguments."""
    for prefix, loader in _loaders(check):
        for index, entry in enumerate(loader.transforms or ()):
            found = parse_transform(entry)
            for wrong in found if isinstance(found, list) else ():
                yield _wrong_step(check, f"{prefix}.transforms.{index}", entry, wrong)


def _wrong_step(check: Check, key: str, entry: object, wrong: WrongTransform) -> KeyProblem:
    value = entry
    if wrong.key and isinstance(entry, dict):
        key, value = f"{key}.{wrong.key}", entry.get(wrong.key)
    what = f"{key} = {value!r}"
    return check.wrong(key, wrong.rule, what=what, nearest=wrong.nearest, advice=wrong.advice)


def prompts(check: Check) -> Iterator[KeyProblem]:
    """A prompt of fixed text is made of alpaca records."""
    for prefix, loader in _loaders(check):
        if loader.prompt_template and loader.format not in (None, "alpaca"):
            yield check.wrong(
                f"{prefix}.format", "prompt_template is made of alpaca records",
                nearest="Nearest: alpaca", advice="Remove prompt_template to use the chat template",
                also=(f"{prefix}.type",),
            )  # fmt: skip


def packing(check: Check) -> Iterator[KeyProblem]:
    """packing_strategy needs packing."""
    for name, section in _sections(check):
        if section.packing_strategy and not section.packing:
            yield check.wrong(
                f"{name}.packing_strategy", "it is used with packing",
                advice=f"Set {name}.packing: True",
            )  # fmt: skip
