"""TokenFileDataLoader: plain files of token ids, read in place.

Owns the way from the section to rows. Nothing is prepared but the check of the files. The content
that a resumed run compares is `sampled_hash` of each file (launcher/data/file_hash.py, which lists
what it covers).
"""

from __future__ import annotations

import json

from xxhash import xxh3_128

from launcher.data.file_hash import sampled_hash
from launcher.data.loaders.base import Recipe, RowLoader, warn_without_end_token
from launcher.data.rows import RowDataset
from launcher.data.token_files.files import check_shapes, end_token, token_files
from launcher.data.token_files.header import TokenFile, side_path
from launcher.data.token_files.rows import TokenFileRows
from launcher.errors import UserError


def prepare(recipe: Recipe) -> str:
    """Check the files. Raises UserError."""
    files, rows = _rows(recipe)
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
    end = end_token(recipe.loader, files)
    if end is not None and recipe.section.packing:
        warn_without_end_token(rows, end, "data_loader.eod_token_id", recipe.log)
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
