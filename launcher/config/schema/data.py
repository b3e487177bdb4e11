"""Sections about the data: where samples come from and how they become rows."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.field import (
    effective,
    optional_section,
    section,
)


@dataclass(frozen=True, kw_only=True)
class DataLoaderSection:
    """`train_dataset.data_loader`: the source of the samples."""

    type: str = effective(
        "TextDataLoader",
        choices=(
            "TextDataLoader",
            "HFDataLoader",
            "InstructionDataLoader",
            "CommonDataLoader",
        ),
        planned=(
            *("TokenFileDataLoader", "BlendedMegatronDatasetDataLoader", "MindDataset"),
            *("MultiSourceDataLoader", "TFRecordDataset", "ADGenDataLoader", "CLUEDataset"),
        ),
    )
    """`TextDataLoader`: text files. `HFDataLoader` (or `CommonDataLoader`): JSONL
    or Parquet with a text column. `InstructionDataLoader`: questions with answers."""
    dataset_dir: str = ""
    """A file, a folder or a glob. Equal to dataset_files with one entry."""
    dataset_files: str | list[str] | None = None
    """Files, folders or globs; used together with dataset_dir when both are given."""
    data_files: str | list[str] | None = None
    """Another name of dataset_files, for HFDataLoader."""
    suffixes: list[str] | None = None
    """TextDataLoader: endings of the files taken from a folder. Left out: all usual ones."""
    text_column: str = "text"
    """HFDataLoader: the column that holds the text."""
    format: str | None = effective(None, choices=("alpaca", "messages", "sharegpt"))
    """InstructionDataLoader: form of a record. Left out: seen from the first record."""
    strict_fields: bool = True
    """InstructionDataLoader: a field of a record with a wrong value, or one of another kind of data
    (`rejected`, `images`), is an error. False: the record is skipped and counted."""
    split: str = "train"
    """HFDataLoader: the split to read where the source has several."""
    num_samples: int | None = effective(None, minimum=1)
    """Read only this many documents of the source. Left out: all."""
    shuffle: bool = True
    """Read the rows in a random order that depends on the seed and the epoch."""
    streaming: bool = False
    """HFDataLoader, InstructionDataLoader: read and tokenize while training, for data larger than
    the disk; files may be URLs that `fsspec` opens. Needs runner_config.max_steps."""
    shuffle_buffer: int = effective(1000, minimum=1)
    """With streaming: records of a block, which is shuffled, and packed into rows, by itself."""
    streaming_cache_gb: float = effective(4.0, above=0)
    """With streaming: GiB on disk, on each machine, for blocks that are tokenized ahead."""

    @property
    def paths(self) -> list[str]:
        """Everything the user named as a source, in the order of the keys above."""
        found = [self.dataset_dir] if self.dataset_dir else []
        for value in (self.dataset_files, self.data_files):
            found += [value] if isinstance(value, str) and value else list(value or ())
        return found


@dataclass(frozen=True, kw_only=True)
class MixtureSourceSection(DataLoaderSection):
    """One source of a mixture: an entry where `train_dataset.data_loader` is a list."""

    name: str = ""
    """What metrics and messages call the source. Left out: made from its path."""
    weight: float | None = effective(None, above=0)
    """Its share of the samples, relative to the weights of the others. Left out: by its size."""
    epochs: float | None = effective(None, above=0)
    """Instead of a weight: how often an epoch of the mixture goes through the source."""
    max_samples: int | None = effective(None, minimum=1)
    """Use at most this many rows of the source."""


@dataclass(frozen=True, kw_only=True)
class DatasetSection:
    """`train_dataset` and `eval_dataset`: a source and how its samples become rows."""

    data_loader: DataLoaderSection | list[MixtureSourceSection] = section(DataLoaderSection)
    """The source of the samples; a list mixes several."""
    seq_length: int | None = effective(None, minimum=2)
    """Tokens of a row. Left out: model_config.seq_length, else what the model allows."""
    packing: bool = False
    """Fill every row with several documents, kept apart by attention and positions. False: one
    document a row, padded."""
    drop_remainder: bool = True
    """An epoch has as many optimizer steps as there are full global batches; False: one more for
    the rest. Samples run on from one epoch into the next either way, none is left out."""
    seed: int | None = effective(None, minimum=0)
    """Seed of the order of the rows. Left out: the top-level seed."""

    @property
    def loaders(self) -> dict[str, DataLoaderSection]:
        """The data loaders by their key in this section: one, or those of a mixture."""
        if isinstance(self.data_loader, list):
            return {f"data_loader.{i}": source for i, source in enumerate(self.data_loader)}
        return {"data_loader": self.data_loader}


@dataclass(frozen=True, kw_only=True)
class DatasetTaskSection:
    """`train_dataset_task` and `eval_dataset_task`: wrappers of MindFormers around a data set."""

    dataset_config: DatasetSection | None = optional_section()
    """Usually the alias `*train_dataset`; train_dataset itself counts."""
