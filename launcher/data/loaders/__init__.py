"""Data loaders: what each `data_loader.type` reads from files, and how it becomes tokens.

Owns the table `LOADERS`. To add a data loader, write a file like `text.py` in this folder with a
`DataLoader`, add a line to `LOADERS`, and its name to the choices of `DataLoaderSection.type`
(launcher/config/schema/data.py). Files that hold tokens already have a `RowLoader` in `ROW_LOADERS`
of launcher/extensions.py instead, and may have rules about their headers in `DATA_CHECKS` there.
The cache, rows, order and batches need no change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.config.schema import DataLoaderSection
from launcher.data.files import DataFile
from launcher.data.loaders.base import DataLoader, RowLoader
from launcher.data.loaders.instruction import INSTRUCTION_LOADER
from launcher.data.loaders.preference import FEEDBACK_LOADER, PREFERENCE_LOADER
from launcher.data.loaders.text import TEXT_LOADER
from launcher.data.loaders.text_column import TEXT_COLUMN_LOADER
from launcher.data.progress import active_meter
from launcher.data.record_files import needs_all_files
from launcher.data.tally import Tally
from launcher.errors import UserError
from launcher.extensions import ROW_LOADERS, required

LOADERS: dict[str, DataLoader[Any]] = {
    "TextDataLoader": TEXT_LOADER,
    "HFDataLoader": TEXT_COLUMN_LOADER,
    "InstructionDataLoader": INSTRUCTION_LOADER,
    "PreferenceDataLoader": PREFERENCE_LOADER,
    "FeedbackDataLoader": FEEDBACK_LOADER,
}
ALIASES = {"CommonDataLoader": "HFDataLoader"}
"""Names that MindFormers uses for the same data."""


def loader_type(section: DataLoaderSection) -> str:
    """The type of a data loader, with aliases resolved."""
    return ALIASES.get(section.type, section.type)


def loader_of(section: DataLoaderSection) -> DataLoader[Any]:
    """The data loader that `section` configures, of text or records."""
    return LOADERS[loader_type(section)]


def row_loader_of(section: DataLoaderSection) -> RowLoader | None:
    """The data loader that `section` configures, of files of tokens; None where it is another."""
    name = loader_type(section)
    if name not in ROW_LOADERS:
        return None
    loader: RowLoader = required(ROW_LOADERS, name, f"data_loader.type: {name}")
    return loader


def source_files(section: DataLoaderSection) -> list[DataFile]:
    """The files of a data loader. Raises UserError when a path does not exist or has no files."""
    loader = loader_of(section)
    if not section.paths:
        raise UserError(
            f"data_loader.{loader.paths_key} is not set",
            rule=f"{loader_type(section)} needs to know which files to read",
            advice="Give a file, a folder or a glob",
        )
    return loader.find_files(section)


def read_samples(
    section: DataLoaderSection, files: Iterable[DataFile], cache_dir: Path, tally: Tally
) -> Iterator[Any]:
    """The samples of `files`, at most `num_samples`; how many is counted in `tally`."""
    loader = loader_of(section)

    def each_file() -> Iterator[Any]:
        for file in files:
            yield from loader.read_file(file.path, section, cache_dir, tally)
            if (meter := active_meter()) is not None:
                meter.finish_file(file.size)

    if loader.read_files is not None and needs_all_files(section):
        found = loader.read_files(list(files), section, cache_dir, tally)
    else:
        found = each_file()
    for sample in islice(found, section.num_samples):
        tally.documents += 1
        yield sample
