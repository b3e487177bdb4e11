"""TokenFileDataLoader: plain files of token ids, read in place.

Owns the way from the section to rows. Nothing is prepared but the check of the files. The content
that a resumed run compares is `sampled_hash` of each file (launcher/data/file_hash.py, which lists
what it covers).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from xxhash import xxh3_128

from launcher.config.schema import DataLoaderSection
from launcher.data.file_hash import sampled_hash
from launcher.data.files import find_files
from launcher.data.loaders.base import Recipe, RowLoader
from launcher.data.rows import RowDataset
from launcher.data.token_files.header import SUFFIXES, TokenFile, describe, side_path
from launcher.data.token_files.rows import TokenFileRows
from launcher.errors import UserError


def token_files(section: DataLoaderSection) -> list[TokenFile]:
    """The files of a section, in order. Raises UserError for one that is damaged."""
    found = find_files(
        section.paths, SUFFIXES, suffix_advice="TokenFileDataLoader reads .npy, .bin, .u16, ..."
    )
    return [describe(file.path, section.token_dtype) for file in found]


def end_token(section: DataLoaderSection, files: Sequence[TokenFile]) -> int | None:
    """The token at the end of each document. Raises UserError where side files do not agree."""
    if section.eod is not None:
        return section.eod
    for file in files:
        if file.eod != files[0].eod:
            raise UserError(
                f"its end token is {file.eod}, that of {files[0].path} is {files[0].eod}",
                where=str(file.path),
                rule="all files of a data set have the same end token",
                advice="Set data_loader.eod",
            )
    return files[0].eod


def check_shapes(files: Sequence[TokenFile], seq_length: int | None) -> None:
    """All files are streams, or rows of seq_length or seq_length + 1. Raises UserError."""
    for file in files:
        if file.columns != files[0].columns:
            raise UserError(
                f"it has {_shape(file)}, {files[0].path} has {_shape(files[0])}",
                where=str(file.path),
                rule="the files of a data set are all streams, or have rows of one length",
            )
    columns = files[0].columns
    if columns is None or seq_length is None or columns in (seq_length, seq_length + 1):
        return
    raise UserError(
        f"its rows have {columns} tokens",
        where=str(files[0].path),
        rule=f"seq_length is {seq_length}: a row has as many tokens, or one more for a last label",
        nearest=f"Nearest: seq_length: {columns - 1}",
        advice="Or save a 1-D array: a stream is cut at any length",
    )


def _shape(file: TokenFile) -> str:
    return "a stream of tokens" if file.columns is None else f"rows of {file.columns} tokens"


def prepare(recipe: Recipe) -> str:
    """Check the files. Raises UserError."""
    files, rows = _rows(recipe)
    end_token(recipe.loader, files)
    if len(rows) == 0:
        raise UserError(
            f"data_loader: {len(files)} file(s) with {rows.tokens} token(s)",
            where=str(files[0].path),
            rule="a dataset needs at least two tokens",
        )
    recipe.log(
        f"data: {len(files):,} file(s) of tokens, {rows.tokens:,} tokens, {len(rows):,} rows of "
        f"{recipe.seq_length}"
    )
    for file in files:
        if file.unknown_keys:
            recipe.log(
                f"warning: {side_path(file.path)} has keys that are not used: "
                f"{', '.join(file.unknown_keys[:20])}"
            )
    return ""


def open_rows(recipe: Recipe, prepared: str) -> RowDataset:
    """The rows of the files of a recipe."""
    files, rows = _rows(recipe)
    content = [
        [sampled_hash(file.path) for file in files],
        [[file.dtype, file.byte_order, file.begin, file.count, file.columns] for file in files],
        end_token(recipe.loader, files),
    ]
    return RowDataset(
        rows=rows,
        seq_length=recipe.seq_length,
        packed=recipe.section.packing,
        content=xxh3_128(json.dumps(content).encode()).hexdigest(),
        name=", ".join(recipe.loader.paths),
    )


def _rows(recipe: Recipe) -> tuple[list[TokenFile], TokenFileRows]:
    files = token_files(recipe.loader)
    check_shapes(files, recipe.seq_length)
    rows = TokenFileRows(
        files,
        recipe.seq_length,
        packed=recipe.section.packing,
        eod=end_token(recipe.loader, files),
    )
    return files, rows


TOKEN_FILE_LOADER = RowLoader(prepare=prepare, open=open_rows)
