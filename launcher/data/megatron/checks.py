"""Rules about the section of BlendedMegatronDatasetDataLoader, before anything heavy is imported:
its keys, and the headers of its `.idx` files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.derived import read_config_json
from launcher.config.provenance import KeyProblem
from launcher.config.schema import DataLoaderSection, MegatronConfigSection
from launcher.data.megatron.data_path import parse_data_path
from launcher.data.megatron.header import FLOATS, damaged, index_path, read_header
from launcher.errors import UserError
from models.families import supports_packing

PHASES = ("train", "valid", "test")
_APART = ("reset_attention_mask", "create_compressed_eod_mask")


def check_loader(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    """The problems of one section. `prefix`: its key."""
    config = loader.config or MegatronConfigSection()
    yield from _other_keys(check, prefix, loader)
    yield from _row_length(check, prefix, config)
    yield from _sizes(check, prefix, loader)
    yield from _documents(check, prefix, config)
    phase = loader.phase or ("valid" if prefix.startswith("eval_dataset") else "train")
    yield from _files(check, prefix, config, phase)


def _other_keys(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    for key in ("dataset_dir", "dataset_files", "data_files"):
        if getattr(loader, key):
            yield check.wrong(
                f"{prefix}.{key}",
                "not an argument of BlendedMegatronDatasetDataLoader",
                nearest=f"Nearest: {prefix}.config.data_path",
                also=(f"{prefix}.type",),
            )


def _row_length(check: Check, prefix: str, config: MegatronConfigSection) -> Iterator[KeyProblem]:
    section = prefix.partition(".data_loader")[0]
    length = check.value(f"{section}.seq_length")
    if config.seq_length is not None and length is not None and config.seq_length != length:
        yield check.wrong(
            f"{prefix}.config.seq_length",
            f"differs from {section}.seq_length = {length} "
            f"({check.provenance.nearest(f'{section}.seq_length')})",
            advice="Remove one of the two",
            also=(f"{section}.seq_length",),
        )


def _sizes(check: Check, prefix: str, loader: DataLoaderSection) -> Iterator[KeyProblem]:
    sizes, key = loader.sizes, f"{prefix}.sizes"
    if sizes is None:
        return
    if len(sizes) != len(PHASES) or any(size is not None and size < 0 for size in sizes):
        filled = [max(size or 0, 0) for size in [*sizes, 0, 0, 0][: len(PHASES)]]
        yield check.wrong(
            key, "it has the samples of train, valid and test", nearest=f"Nearest: {filled}"
        )


def _documents(check: Check, prefix: str, config: MegatronConfigSection) -> Iterator[KeyProblem]:
    on = config.needs_eod
    if on and config.eod is None:
        known = _end_token(check)
        yield check.wrong(
            f"{prefix}.config.{on[0]}",
            "it needs config.eod, the token id at the end of each document",
            nearest=f"Nearest: eod: {known}, the eos_token_id of the model" if known else "",
            advice=f"Set {prefix}.config.eod to the id that the data was made with, or to -1 if "
            "documents have no end token",
        )
    apart = next((key for key in _APART if getattr(config, key)), None)
    section = prefix.partition(".")[0]
    if apart and check.spec is not None and not supports_packing(check.spec):
        yield check.wrong(
            f"{prefix}.config.{apart}",
            f"packing for {check.spec.family} models is not built yet",
            advice="Set it to False: attention then crosses documents",
        )
    if not apart and check.value(f"{section}.packing"):
        yield check.wrong(
            f"{section}.packing",
            "rows of BlendedMegatronDatasetDataLoader always have several documents, which its own "
            "keys keep apart",
            nearest=f"Nearest: {prefix}.config.reset_attention_mask: True and "
            "reset_position_ids: True",
            also=(f"{prefix}.type",),
        )


def _end_token(check: Check) -> int | None:
    """The end token of config.json, for a message."""
    try:
        found: Any = (read_config_json(check.config) or {}).get("eos_token_id")
    except UserError:
        return None
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, int) else None


def _files(
    check: Check, prefix: str, config: MegatronConfigSection, phase: str
) -> Iterator[KeyProblem]:
    name = f"{prefix}.config"
    split_keys = [f"{p}_data_path" for p in PHASES if getattr(config, f"{p}_data_path") is not None]
    if config.data_path is not None and split_keys:
        yield check.wrong(
            f"{name}.{split_keys[0]}", "data_path and split are used instead",
            nearest="Nearest: remove data_path and split, or this key",
            also=(f"{name}.data_path",),
        )  # fmt: skip
    if config.split is not None:
        yield from _split(check, f"{name}.split", config, phase)
    key, value = config.paths_of(phase)
    if not value:
        yield check.wrong(
            f"{name}.data_path",
            "a data set needs files",
            what=f"{prefix.partition('.')[0]} has no files for {phase}",
            advice=f"Set {name}.data_path to the path of .bin and .idx files without extension, or "
            f"{phase}_data_path",
            also=(name, f"{prefix}.type"),
        )
        return
    try:
        blend = parse_data_path(value, f"{name}.{key}")
    except UserError as error:
        problem = error.problems[0]
        yield check.wrong(
            f"{name}.{key}", problem.rule, nearest=problem.nearest, advice=problem.advice
        )
        return
    if isinstance(value, str) and " " in value and not index_path(value).exists():
        yield check.wrong(
            f"{name}.{key}",
            "a text is the path of one dataset",
            what=f"{name}.{key} = {value!r}",
            nearest=f"Nearest: [{', '.join(value.replace(',', ' ').split())}]",
        )
        return
    for path in dict.fromkeys(blend.prefixes):
        yield from _file(check, f"{name}.{key}", path)
    if blend.weights is not None and (len(blend.prefixes) > 1 or key == "data_path"):
        yield from _blend_size(check, prefix, phase)


def _file(check: Check, key: str, path: str) -> Iterator[KeyProblem]:
    try:
        header = read_header(path)
        if header.code in FLOATS:
            raise damaged(index_path(path), 17, f"type of tokens {header.dtype}",
                          "token ids are integers")  # fmt: skip
    except UserError as error:
        problem = error.problems[0]
        yield check.wrong(
            key,
            problem.rule,
            what=f"{key}: {problem.where}: {problem.what}",
            nearest=problem.nearest,
            advice=problem.advice,
        )


def _split(
    check: Check, key: str, config: MegatronConfigSection, phase: str
) -> Iterator[KeyProblem]:
    split = config.split if isinstance(config.split, list) else None
    words = split if split is not None else re.split(r"[,\s]+", str(config.split).strip(" ,[]"))
    try:
        shares = [float(word) for word in words]
    except ValueError:
        shares = []
    shares += [0.0] * (len(PHASES) - len(shares)) if shares else []
    if len(shares) != len(PHASES) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        yield check.wrong(
            key,
            "it has the shares of train, valid and test, of which one is above 0",
            nearest="Nearest: '90, 8, 2'",
        )
    elif shares[PHASES.index(phase)] == 0 and config.data_path is not None:
        yield check.wrong(
            key,
            f"the {phase} split has no share, and {key.partition('.')[0]} reads it",
            nearest="Nearest: '90, 10, 0'",
            advice=f"Give it a share, or set {phase}_data_path instead of data_path",
        )


def _blend_size(check: Check, prefix: str, phase: str) -> Iterator[KeyProblem]:
    sizes = check.value(f"{prefix}.sizes")
    if sizes is not None and len(sizes) != len(PHASES):
        return  # reported already
    size = sizes[PHASES.index(phase)] if sizes is not None else None
    if not size:
        yield check.wrong(
            f"{prefix}.sizes",
            f"sizes is the length of a data_path with weights, and it has no samples of {phase}",
            nearest=f"Nearest: set entry {PHASES.index(phase)} of sizes to a number above 0",
            advice="Or remove the weights, to read all samples",
            also=(f"{prefix}.type",),
        )
