"""The files of a section of TokenFileDataLoader: which they are, their end token, their shape.

Standard library only: the check of a configuration asks for the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.config.schema import DataLoaderSection
from launcher.data.files import find_files
from launcher.data.token_files.header import SUFFIXES, TokenFile, describe
from launcher.errors import UserError


def token_files(section: DataLoaderSection) -> list[TokenFile]:
    """The files of a section, in order. Raises UserError for one that is damaged."""
    found = find_files(
        section.paths, SUFFIXES, suffix_advice="TokenFileDataLoader reads .npy, .bin, .u16, ..."
    )
    return [describe(file.path, section.token_dtype) for file in found]


def end_token(section: DataLoaderSection, files: Sequence[TokenFile]) -> int | None:
    """The token at the end of each document. Raises UserError where side files do not agree."""
    if section.eod_token_id is not None:
        return section.eod_token_id
    for file in files:
        if file.eod != files[0].eod:
            raise UserError(
                f"its end token is {file.eod}, that of {files[0].path} is {files[0].eod}",
                where=str(file.path),
                rule="all files of a data set have the same end token",
                advice="Set data_loader.eod_token_id",
            )
    return files[0].eod


def check_shapes(files: Sequence[TokenFile], seq_length: int | None) -> None:
    """All files are streams, or rows of seq_length or seq_length + 1. Raises UserError."""
    for file in files:
        if file.columns != files[0].columns:
            raise UserError(
                f"it is {_shape(file)}, {files[0].path} is {_shape(files[0])}",
                where=str(file.path),
                rule="the files of a data set are all streams, or all have rows of one length",
            )
    columns = files[0].columns
    if columns is None or seq_length is None or columns in (seq_length, seq_length + 1):
        return
    raise UserError(
        f"its rows have {columns} tokens",
        where=str(files[0].path),
        rule=f"seq_length is {seq_length}: a row has as many tokens, or one more for a last label",
        nearest=f"Nearest: seq_length: {columns - 1}" if columns > 2 else "",
        advice="Or save a 1-D array: a stream is cut at any length",
    )


def _shape(file: TokenFile) -> str:
    if file.columns is None:
        return "a stream of tokens"
    return f"an array with rows of {file.columns} tokens"
