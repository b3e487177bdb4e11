"""Tokenize text, JSON lines, Parquet or MindRecord into a Megatron dataset (`.bin`/`.idx`).

    python -m launcher.tools.tokenize --input my_text --tokenizer my_tokenizer \\
        --output_prefix data/my_text_document

Each document becomes one sequence that ends with the end token of the tokenizer. Work is done in
parts: a run that was killed goes on after the last complete one with the same command. The result
is read back before it gets its name.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import EXIT_OK, UserError
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, count

if TYPE_CHECKING:
    from launcher.data.files import DataFile
    from launcher.data.loaders.base import Recipe
    from launcher.data.progress import Meter, OnProgress
    from launcher.data.tally import Tally
    from launcher.data.tokenized_corpus import Corpus

TEXT, TOKENS = "TextDataLoader", "MindDataset"
"""The type of text files, and that whose files hold tokens already."""
TYPES = (TEXT, "HFDataLoader", TOKENS)
TOKEN_ENDINGS = (".npy", ".bin", ".idx", ".u16", ".u32", ".uint16", ".uint32", ".int32")
RECORD_ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow")
ROWS_AT_ONCE = 1024


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("tokenize", "Tokenize documents into a Megatron dataset (.bin and .idx).")
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, folders or globs")
    add("--output_prefix", "--output-prefix", type=Path, required=True, metavar="PREFIX",
        help="path of the dataset, without .bin and .idx")  # fmt: skip
    add("--tokenizer", "--tokenizer-dir", type=Path, metavar="DIR",
        help="Hugging Face directory with a tokenizer; MindRecord files need none")  # fmt: skip
    add("--type", choices=TYPES, help="how files are read (default: by their names)")
    add(
        "--text_column",
        "--json-keys",
        metavar="NAME",
        help="column of the text (text)",
    )
    add("--suffixes", nargs="+", metavar="SUFFIX", help="endings of text files taken from folders")
    add("--column", metavar="NAME",
        help="column of MindRecord files that has the tokens (input_ids)")  # fmt: skip
    add(
        "--dtype", choices=("uint16", "int32"), help="default: uint16 for a vocabulary below 65,500"
    )
    add("--num_samples", type=count, metavar="N", help="only the first N documents")
    add("--workers", type=count, metavar="N", help="processes that tokenize (default: all cores)")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser.parse(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _tokenize(parse(arguments), console))


def _tokenize(options: argparse.Namespace, console: Console) -> int:
    from launcher.data.tokenized_corpus import write_corpus

    corpus, tally = _corpus(options, console)
    written = write_corpus(corpus, overwrite=options.overwrite)
    for line in tally.warnings():
        console.log(line)
    if written.continued_after:
        console.log(f"continued after {written.continued_after:,} documents of an earlier run")
    console.log(
        f"{options.output_prefix}: {written.documents:,} documents, {written.tokens:,} tokens, "
        f"{written.total_bytes / 1e6:,.1f} MB, verified"
    )
    return EXIT_OK


def _corpus(options: argparse.Namespace, console: Console) -> tuple[Corpus, Tally]:
    """The corpus of a command line, and the counts of what is left out."""
    import numpy as np

    from launcher.data.megatron.writer import token_dtype
    from launcher.data.progress import Meter
    from launcher.data.tally import Tally
    from launcher.data.tokenized_corpus import Corpus

    _check_inputs(options.input)
    kind = options.type or (TEXT if options.suffixes else _type_of(options.input))
    tally = Tally()
    _check_columns(options, kind)
    recipe = _recipe(options, kind, console)
    files = _files(recipe)
    vocabulary = len(recipe.tokenizer) if recipe.tokenizer is not None else None
    dtype = np.dtype(options.dtype) if options.dtype else token_dtype(vocabulary)
    job = {
        "type": kind,
        "files": [[str(f.path.resolve()), f.size, f.mtime_ns] for f in files],
        "text_column": recipe.loader.text_column,
        "column": options.column or "input_ids",
        "num_samples": options.num_samples,
        "dtype": dtype.name,
        "tokenizer": _tokenizer_key(recipe.tokenizer),
    }

    meter = Meter("tokenize", sum(file.size for file in files), _shown(console))

    def batches(done: int) -> Iterator[list[Any]]:
        if kind == TOKENS:
            return _rows(recipe, options.column or "input_ids", done, meter)
        return _batches(recipe, files, done, tally, meter)

    return Corpus(prefix=options.output_prefix, dtype=dtype, job=job, batches=batches), tally


def _type_of(inputs: Sequence[str]) -> str:
    """The type of the loader for these names."""
    from launcher.data.files import find_files

    kinds = dict[str, Path]()
    for file in find_files(inputs, [""]):
        if kind := _type_of_file(file):
            kinds.setdefault(kind, file.path)
    if len(kinds) > 1:
        found = " and ".join(f"{path} ({kind})" for kind, path in kinds.items())
        raise UserError(
            f"the files are of several kinds: {found}", where="command line",
            rule="all files of a dataset are read in one way",
            advice="Choose one with --type, or name only files of one kind",
        )  # fmt: skip
    return next(iter(kinds), TEXT)


def _type_of_file(file: DataFile) -> str | None:
    """The type of the loader for a file; None for one in a folder that no loader takes from it.
    Raises UserError for a file of tokens that the user named."""
    from launcher.data.loaders.text import TEXT_SUFFIXES

    name = file.path.name.lower()
    if ".mindrecord" in name:
        return TOKENS
    plain = name.removesuffix(".gz")
    if plain.endswith(RECORD_ENDINGS):
        return "HFDataLoader"
    if not file.below and name.endswith(TOKEN_ENDINGS):
        raise UserError(
            "it is a file of tokens", where=str(file.path),
            rule="text and records are tokenized, and rows of MindRecord files are converted",
            advice="Train on it as it is, with TokenFileDataLoader or "
            "BlendedMegatronDatasetDataLoader",
        )  # fmt: skip
    return TEXT if not file.below or plain.endswith(TEXT_SUFFIXES) else None


def _check_columns(options: argparse.Namespace, kind: str) -> None:
    """Columns are named for files that have them."""
    kinds = {"text_column": "HFDataLoader", "column": TOKENS}
    for option, its_kind in kinds.items():
        if getattr(options, option) and kind != its_kind:
            raise UserError(
                f"--{option} {getattr(options, option)}: the files are read by {kind}",
                where="command line", rule=f"it is an option of {its_kind}",
                advice="Remove it, or choose how files are read with --type",
            )  # fmt: skip


def _check_inputs(inputs: Sequence[str]) -> None:
    from launcher.config.checks.paths import nearest_path

    for place in inputs:
        if not Path(place).expanduser().exists() and not glob.glob(place, recursive=True):
            raise UserError(
                f"--input {place}: no such file, folder or glob", where="command line",
                rule="the documents are read from there", nearest=nearest_path(place),
                advice="Relative paths are relative to the current directory",
            )  # fmt: skip


def _recipe(options: argparse.Namespace, kind: str, console: Console) -> Recipe:
    from launcher.config.schema import DataLoaderSection, DatasetSection
    from launcher.data.loaders.base import Recipe

    if kind != TOKENS and options.tokenizer is None:
        raise UserError(
            "--tokenizer is missing", where="command line", rule="text is tokenized with it",
            advice="Write --tokenizer DIR, a Hugging Face directory",
        )  # fmt: skip
    section = DataLoaderSection(
        type=kind, dataset_files=list(options.input), text_column=options.text_column or "text",
        suffixes=options.suffixes, num_samples=options.num_samples,
    )  # fmt: skip
    return Recipe(
        section=DatasetSection(data_loader=section),
        tokenizer=None if options.tokenizer is None else _tokenizer(options.tokenizer),
        seq_length=0,
        cache_dir=options.output_prefix.parent / ".tokenize_cache",
        log=console.log,
        workers=options.workers or os.cpu_count() or 1,
    )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from launcher.config.derived import has_tokenizer

    if not has_tokenizer(folder):
        raise UserError(
            "contains no tokenizer (tokenizer.json or similar)", where=str(folder),
            rule="--tokenizer is a Hugging Face directory", advice="Give the model's directory",
        )  # fmt: skip
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _shown(console: Console) -> OnProgress:
    """Progress as a line of the console."""
    from launcher.report.progress import bar

    return lambda progress: console.progress(
        f"{bar(progress.fraction or 0.0)} {progress.gerund}: {progress.detail}"
    )


def _tokenizer_key(tokenizer: Any) -> str | None:
    from launcher.data.cache_key import tokenizer_hash

    return None if tokenizer is None else tokenizer_hash(tokenizer)


def _files(recipe: Recipe) -> list[DataFile]:
    from launcher.data.files import find_files
    from launcher.data.loaders import source_files

    if recipe.loader.type != TOKENS:
        return source_files(recipe.loader)
    found = find_files(recipe.loader.paths, [""])
    return [file for file in found if not file.path.name.endswith(".db")]


def _rows(recipe: Recipe, column: str, done: int, meter: Meter) -> Iterator[list[Any]]:
    """The rows of files of tokens after the first `done`, each a document."""
    from itertools import islice

    from launcher.data.progress import counting_bytes
    from launcher.extensions import TOKEN_READERS, required

    read = required(TOKEN_READERS, "mindrecord", "MindRecord files")
    rows = islice(read(recipe.loader.paths, column, recipe.log), recipe.loader.num_samples)
    rest = islice(rows, done, None)
    with counting_bytes(meter):
        while batch := list(islice(rest, ROWS_AT_ONCE)):
            meter.tokens += sum(map(len, batch))
            yield batch


def _batches(
    recipe: Recipe, files: list[DataFile], done: int, tally: Tally, meter: Meter
) -> Iterator[list[Any]]:
    """The tokens of all documents after the first `done`."""
    import numpy as np

    from launcher.data.progress import counting_bytes
    from launcher.data.tokenizing import encoded_chunks

    total = sum(file.size for file in files)
    with counting_bytes(meter):
        for chunk, encoded in encoded_chunks(recipe, files, total, meter.tick, skip=done):
            tally.merge(chunk.counted)
            tally.merge(encoded.tally)
            meter.tokens += len(encoded.tokens)
            meter.tick()
            yield np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1]) if chunk.samples else []


if __name__ == "__main__":
    sys.exit(main())
