"""Sections about the data: where samples come from and how they become rows."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.schema.field import (
    effective,
    no_effect,
    not_built,
    optional_section,
    section,
)


@dataclass(frozen=True, kw_only=True)
class MegatronConfigSection:
    """`train_dataset.data_loader.config`: how BlendedMegatronDatasetDataLoader makes rows. Names
    and defaults are those of MindFormers, rules those of Megatron-core."""

    data_path: str | list[str] | None = None
    """Paths of `.bin`/`.idx` files without extension: one, a list, or a list of weights and paths
    in turns (`[0.3, a, 0.7, b]`)."""
    split: str | list[float] | None = None
    """Shares of train, valid and test of the sequences of each file: "90, 8, 2". Left out: all of
    them, whichever is read."""
    train_data_path: str | list[str] | None = None
    """Instead of data_path and split: the data for training."""
    valid_data_path: str | list[str] | None = None
    """The data for evaluation."""
    test_data_path: str | list[str] | None = None
    """The data that `phase: test` reads."""
    seq_length: int | None = effective(None, minimum=2)
    """Another place of train_dataset.seq_length."""
    seed: int = effective(1234, minimum=0, maximum=2**32 - 1)
    """Seed of the order of documents and samples."""
    eod: int | None = effective(None, minimum=-1)
    """Token id at the end of each document. Left out, or -1: no token is; the keys that need it
    then ask for it."""
    pad: int = effective(-1, minimum=-1)
    """Token id of padding, which is no target. -1: none."""
    eod_mask_loss: bool = False
    """What follows the end of a document is no target."""
    reset_position_ids: bool = False
    """Positions begin at 0 in each document."""
    reset_attention_mask: bool = False
    """Attention stays within a document."""
    create_compressed_eod_mask: bool = False
    """The same: a form of the mask in MindFormers."""
    add_extra_token_to_sequence: bool = True
    """A row is cut from seq_length + 1 tokens, so that its last token has a target."""
    drop_last_partial_validation_sequence: bool = True
    """Leave out the last row of an evaluation where it is not full. False: it is padded."""
    num_dataset_builder_threads: int = effective(1, minimum=1)
    """Threads that prepare the files of a blend."""
    path_to_cache: str | None = None
    """Directory for prepared orders. Left out: the data cache in output_dir."""
    create_attention_mask: bool = no_effect(True, "masks are computed from document boundaries")
    """Whether MindFormers makes a mask of seq_length x seq_length."""
    eod_pad_length: int = no_effect(128, "document boundaries are not padded to a length")
    """Length of the compressed mask."""
    compressed_eod_mask_length: int | None = no_effect(
        None, "document boundaries are not padded to a length"
    )
    """The same."""
    mmap_bin_files: bool | None = no_effect(None, "files are always memory-mapped")
    """Whether MindFormers maps the files."""
    s3_cache_path: str | None = not_built(None, "Copy the files to a local directory")
    """Directory for files of an object store."""

    def paths_of(self, phase: str) -> tuple[str, str | list[str] | None]:
        """The key of this section with the data of `train`, `valid` or `test`, and its value."""
        own = f"{phase}_data_path"
        if self.data_path is None and getattr(self, own) is not None:
            return own, getattr(self, own)
        return "data_path", self.data_path


@dataclass(frozen=True, kw_only=True)
class DataLoaderSection:
    """`train_dataset.data_loader`: the source of the samples."""

    type: str = effective(
        "TextDataLoader",
        choices=(
            "TextDataLoader",
            "HFDataLoader",
            "InstructionDataLoader",
            "BlendedMegatronDatasetDataLoader",
            "TokenFileDataLoader",
            "CommonDataLoader",
        ),
        planned=(
            *(
                "MindDataset",
                "MultiSourceDataLoader",
                "TFRecordDataset",
                "ADGenDataLoader",
                "CLUEDataset",
            ),
        ),
    )
    """`TextDataLoader`: text files. `HFDataLoader` (or `CommonDataLoader`): JSONL
    or Parquet with a text column. `InstructionDataLoader`: questions with answers.
    `BlendedMegatronDatasetDataLoader`: `.bin`/`.idx` files of Megatron. `TokenFileDataLoader`:
    plain files of token ids."""
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
    shuffle: bool | None = None
    """Read the rows in a random order that depends on the seed and the epoch. Left out: True, but
    for BlendedMegatronDatasetDataLoader, whose rows are in the random order of Megatron already."""
    config: MegatronConfigSection | None = optional_section()
    """BlendedMegatronDatasetDataLoader: its data, and how it makes rows."""
    sizes: list[int | None] | None = None
    """BlendedMegatronDatasetDataLoader: samples of train, valid and test, which decide how often
    the data is gone through (null: once). Left out: null for each."""
    mindformers_sizes: bool = False
    """BlendedMegatronDatasetDataLoader: weighted blends have the sizes of MindFormers, 0.5 % above
    those of Megatron-core."""
    phase: str | None = effective(None, choices=("train", "valid", "test"))
    """BlendedMegatronDatasetDataLoader: the split to read. Left out: train, for an eval_dataset
    valid."""
    datasets_type: str = effective("GPTDataset", choices=("GPTDataset",))
    """BlendedMegatronDatasetDataLoader: the kind of dataset."""
    token_dtype: str | None = effective(
        None, choices=("uint8", "uint16", "uint32", "int16", "int32", "int64")
    )
    """TokenFileDataLoader: the type of the token ids of raw files, little-endian. Left out: by the
    name (`.u16`) or by a file `<name>.json` beside it."""
    eod: int | None = effective(None, minimum=0)
    """TokenFileDataLoader: token id at the end of each document; with packing they are kept apart.
    Left out: by the file `<name>.json`, else each file is one document."""

    @property
    def is_shuffled(self) -> bool:
        """Whether rows are read in a random order."""
        if self.shuffle is None:
            return self.type != "BlendedMegatronDatasetDataLoader"
        return self.shuffle

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
