"""Arrow files, and the folders that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write.

Owns that layout: `state.json` names the `data-*.arrow` files of a data set (in the streaming format
of Arrow IPC), `dataset_dict.json` its splits, each a folder of this kind. Read with `pyarrow`,
which is imported only when needed; files are memory-mapped and read batch by batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.data.encoding import read_bytes
from launcher.data.files import DataFile, data_file
from launcher.data.records import Record, shown
from launcher.errors import UserError, did_you_mean
from launcher.json_text import NotJson, parse

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_FILE_MAGIC = b"ARROW1"


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    if (folder / _SPLITS).is_file():
        return True
    return (folder / _STATE).is_file() and (folder / "dataset_info.json").is_file()


def files_of_saved_dataset(folder: Path, split: str) -> list[DataFile]:
    """The files of a saved data set, in order; of several splits those of `split`.

    Raises UserError for a missing split, a damaged `state.json`, and data with an index mapping.
    """
    if (folder / _SPLITS).is_file():
        splits = _json(folder / _SPLITS, "splits", list)
        if split not in splits:
            raise UserError(
                f"data_loader.split = {split!r}: this data set has no such split",
                where=str(folder / _SPLITS),
                rule="a saved DatasetDict names its splits",
                nearest=did_you_mean(split, splits) or f"Splits: {', '.join(map(str, splits))}",
                advice="Give one of these splits",
            )
        folder = folder / split
    state = folder / _STATE
    entries = _json(state, "_data_files", list)
    if any(_parsed(state).get(key) for key in ("_indices_files", "_indices_data_files")):
        raise UserError(
            "the rows are selected by an index file",
            where=str(state),
            rule="a saved data set has its rows in order, as `datasets` writes it since 2.0",
            advice="Load it with `datasets.load_from_disk`, and save it again",
        )
    return [data_file(folder / _name_in(state, entry)) for entry in entries]


def _name_in(state: Path, entry: Any) -> str:
    """The name of a file beside `state.json`, of an entry of it."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(
            f"`_data_files` has {shown(entry)}", where=str(state),
            rule="an entry has the filename of a file in this folder",
            advice="Copy the data set again",
        )  # fmt: skip
    return name


def read_arrow_records(path: Path) -> Iterator[Record]:
    """The rows of an Arrow file, of either IPC format; None for null. Raises UserError."""
    number = 0
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            "the `pyarrow` library is not installed",
            rule="Arrow files are read with it",
            advice="Install it: pip install 'slipway[data]'",
        ) from error
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in _batches(pyarrow, source):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, record {number}", row, has_all_columns=True)
    except (OSError, ValueError) as error:  # pyarrow's errors are among these
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"cannot be read as Arrow ({reason})",
            where=f"{path}, after record {number}" if number else str(path),
            rule="it is an Arrow IPC file, as Dataset.save_to_disk writes it",
            advice="Copy it again, or save the data set again",
        ) from error


def _batches(pyarrow: Any, source: Any) -> Iterator[Any]:
    magic = source.read(len(_FILE_MAGIC))
    source.seek(0)
    if magic != _FILE_MAGIC:
        yield from pyarrow.ipc.open_stream(source)
        return
    reader = pyarrow.ipc.open_file(source)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        value = parse(read_bytes(path).decode("utf-8", errors="replace"))
    except NotJson as error:
        raise UserError(
            f"is not JSON ({error.reason})", where=str(path),
            rule="Dataset.save_to_disk writes it", advice="Copy the data set again",
        ) from None  # fmt: skip
    return value if isinstance(value, dict) else {}


def _json(path: Path, key: str, kind: type) -> Any:
    if not path.is_file():
        raise UserError(
            "does not exist", where=str(path), rule="Dataset.save_to_disk writes it",
            advice="Copy the data set again",
        )  # fmt: skip
    value = _parsed(path).get(key)
    if not isinstance(value, kind) or not value:
        raise UserError(
            f"has no {key!r}", where=str(path), rule="Dataset.save_to_disk writes it",
            advice="Copy the data set again",
        )  # fmt: skip
    return value
