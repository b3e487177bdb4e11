"""TextDataLoader: each file is a document."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.config.schema import DataLoaderSection
from launcher.data.encoding import NotText, decode, encoding_of, read_bytes
from launcher.data.files import DataFile, find_files
from launcher.data.loaders.base import DataLoader, Document, Recipe, TokenBatch
from launcher.data.tally import Tally
from launcher.data.tokens import tokenize_documents

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".log"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala"),
    *(".js", ".ts", ".go", ".rs", ".rb", ".php", ".swift", ".cs", ".lua", ".jl", ".r", ".sql"),
    ".sh",
)
"""Files that are taken from a folder: prose and source code; no tables, no web pages."""


def _find_files(section: DataLoaderSection) -> list[DataFile]:
    return find_files(
        section.paths,
        ["." + suffix.lstrip("*.") for suffix in section.suffixes or TEXT_SUFFIXES],
        suffixes_apply_to_globs=bool(section.suffixes),
        suffix_advice="Set data_loader.suffixes, or a data_loader.type that reads these files",
    )


def _read_file(
    path: Path, section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Document]:
    content = read_bytes(path)
    try:
        text = decode(content)
    except NotText as error:
        text = content.decode(encoding_of(content), errors="replace").removeprefix("\ufeff")
        tally.undecodable_files.add(f"{path} (line {error.line}, offset {error.offset})")
        tally.replaced_characters += text.count("\ufffd") - content.count(b"\xef\xbf\xbd")
    if "\0" in text:
        tally.files_with_null.add(str(path))
    yield from without_empty([Document(str(path), text)], tally)


def without_empty(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Drop documents of white space alone, and count them."""
    for document in documents:
        if document.text.strip():
            yield document
        else:
            tally.empty_documents += 1


def tokenize_texts(
    documents: Iterable[Document], recipe: Recipe, tally: Tally
) -> Iterator[TokenBatch]:
    """The tokens of documents; those too short to predict anything are counted."""
    places: deque[str] = deque()

    def texts() -> Iterator[str]:
        for document in documents:
            places.append(document.where)
            yield document.text

    for batch in tokenize_documents(texts(), recipe.tokenizer):
        for tokens in batch:
            where = places.popleft()
            if len(tokens) < 2:
                tally.too_short.add(where)
        yield TokenBatch(batch)


TEXT_LOADER = DataLoader(find_files=_find_files, read_file=_read_file, tokenize=tokenize_texts)
