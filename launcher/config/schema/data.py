"""Sections about the data: where samples come from and how they become rows."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema.field import (
    effective,
    no_effect,
    not_built,
    optional_section,
    section,
)
from launcher.config.schema.splits import names_of_split

CHAT_ROLES = (
    *("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"),
)
"""Roles of the turns of a conversation."""
RECORD_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""Values of `data_loader.path` that name a format instead of a folder."""


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

    @property
    def needs_eod(self) -> list[str]:
        """The keys that are on and mean nothing without `eod`."""
        keys = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask",
                "create_compressed_eod_mask")  # fmt: skip
        return [key for key in keys if getattr(self, key)]

    def paths_of(self, phase: str) -> tuple[str, str | list[str] | None]:
        """The key of this section with the data of `train`, `valid` or `test`, and its value."""
        own = f"{phase}_data_path"
        if self.data_path is None and getattr(self, own) is not None:
            return own, getattr(self, own)
        return "data_path", self.data_path


CONVERSATION_LOADERS = ("InstructionDataLoader", "PreferenceDataLoader", "FeedbackDataLoader")
"""Types of data loaders that read conversations."""


@dataclass(frozen=True, kw_only=True)
class DataLoaderSection:
    """`train_dataset.data_loader`: the source of the samples."""

    type: str = effective(
        "TextDataLoader",
        choices=(
            "TextDataLoader",
            "HFDataLoader",
            *CONVERSATION_LOADERS,
            "MindDataset",
            "BlendedMegatronDatasetDataLoader",
            "TokenFileDataLoader",
            "CommonDataLoader",
        ),
        planned=("TFRecordDataset", "ADGenDataLoader", "CLUEDataset"),
    )
    """`TextDataLoader`: text files. `HFDataLoader` (or `CommonDataLoader`): records (JSON, JSONL,
    CSV, Parquet, Arrow) with a text column. `InstructionDataLoader`: questions with answers.
    `PreferenceDataLoader`: questions with a better and a worse answer. `FeedbackDataLoader`:
    questions with one answer, judged good or bad. The others read tokens in place: `MindDataset`
    MindRecord files, `BlendedMegatronDatasetDataLoader` `.bin`/`.idx` files of Megatron,
    `TokenFileDataLoader` plain files of token ids."""
    dataset_dir: str = ""
    """A file, a folder or a glob. Equal to dataset_files with one entry."""
    dataset_files: str | list[str] | None = None
    """Files, folders or globs; used together with dataset_dir when both are given."""
    path: str = ""
    """Records, as in `datasets.load_dataset`: a format (`json`, `csv`, `parquet`, `text`, `arrow`)
    of data_files and data_dir, or a local folder. Nothing is downloaded from a hub."""
    data_dir: str = ""
    """A folder below path, or by itself where path is a format."""
    subset: str = ""
    """A folder below path that has one configuration of a data set (`name` in `datasets`)."""
    data_files: str | list[str] | dict[str, Any] | None = None
    """Files or globs, relative to path and data_dir; or a section of them by split."""
    delimiter: str | None = None
    """CSV: the character between fields. Left out: a comma, or a tab in `.tsv` files."""
    load_func: str | None = effective(None, choices=("load_dataset", "load_from_disk"))
    """An assertion: `load_from_disk` requires that path was written by `Dataset.save_to_disk`. Left
    out: seen from the files."""
    suffixes: list[str] | None = None
    """TextDataLoader: endings of the files taken from a folder. Left out: all usual ones."""
    text_column: str = "text"
    """HFDataLoader: the column that holds the text."""
    format: str | None = effective(None, choices=("alpaca", "messages", "sharegpt", "text"))
    """InstructionDataLoader, PreferenceDataLoader, FeedbackDataLoader: form of a record. `text`, of
    the last two, is prompt and answers as plain strings, without a chat template. Left out: seen
    from the first record."""
    column_map: dict[str, str] | None = None
    """Field that is read -> column of the file, as in `{instruction: question, output: answer}`,
    `{text: body}`. Records: a dotted name (`data.question`) is a field of a nested record.
    MindDataset: the fields are input_ids, labels and loss_mask; those that are left out of the map
    are not read, but for input_ids. Without a map columns of these names and target_ids are read,
    as far as the files have them."""
    transforms: list[dict[str, Any]] | None = None
    """Records: steps in order, such as `{type: take, n: 2000}`: take, skip, select, shuffle, sort,
    shard, flatten, rename_column, rename_columns, remove_columns, select_columns. Arguments are
    those of `datasets.Dataset`; columns have the names of the file, column_map comes last."""
    prompt_template: str | None = effective(
        None, choices=("mindformers_alpaca", "mindformers_code_alpaca")
    )
    """InstructionDataLoader, alpaca records: a prompt of fixed text, tokenized in parts as the data
    handlers of MindFormers do, instead of the chat template of the tokenizer."""
    train_on_roles: list[str] = effective(["assistant"], choices=CHAT_ROLES)
    """InstructionDataLoader: roles whose turns carry loss: their text and the end mark behind it.
    A turn with `train: false` or `weight: 0` never does."""
    train_on_turns: str = effective("all", choices=("all", "last"))
    """InstructionDataLoader: `last`: only the last turn of these roles carries loss, and turns
    with `train: true`."""
    strict_fields: bool = True
    """InstructionDataLoader: a field of a record with a wrong value, or one of another kind of data
    (`rejected`, `images`), is an error. False: the record is skipped and counted."""
    split: str = "train"
    """Records: the split to read where the source has several, or a part: `train[:100]`,
    `train[10%:20%]`, `train+test`."""
    labels: str | None = effective(None, choices=("unshifted", "shifted"))
    """MindDataset: `unshifted`: labels[t] is input_ids[t] or ignored, so a row has seq_length + 1
    tokens. `shifted`: labels[t] is the token after input_ids[t]. Left out: seen from the rows."""
    pad_token_id: int | None = effective(None, minimum=0)
    """MindDataset: positions with this token do not count for the loss. Left out: that of the
    model, if it has one."""
    ignore_token_id: int = -100
    """MindDataset: labels of this value do not count for the loss (those of -100 never do)."""
    eod_token_id: int | None = effective(None, minimum=0)
    """The token that ends a document. MindDataset: documents of a row are kept apart in attention
    and positions restart; left out: a row is one document. TokenFileDataLoader: with packing they
    are kept apart; left out: by the file `<name>.json`, else each file is one document."""
    num_samples: int | None = effective(None, minimum=1)
    """Read only this many documents or rows of the source. Left out: all."""
    shuffle: bool | None = None
    """Read the rows in a random order that depends on the seed and the epoch. Left out: True, but
    for BlendedMegatronDatasetDataLoader, whose rows are in the random order of Megatron already."""
    streaming: bool = False
    """HFDataLoader, InstructionDataLoader: read and tokenize while training, for data larger than
    the disk; files may be URLs that `fsspec` opens. Needs runner_config.max_steps."""
    shuffle_buffer: int = effective(1000, minimum=1)
    """With streaming: records of a block, which is shuffled, and packed into rows, by itself."""
    streaming_cache_gb: float = effective(4.0, above=0)
    """With streaming: GiB on disk, on each machine, for blocks that are tokenized ahead."""
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

    @property
    def is_shuffled(self) -> bool:
        """Whether rows are read in a random order."""
        if self.shuffle is None:
            return self.type != "BlendedMegatronDatasetDataLoader"
        return self.shuffle

    @property
    def record_format(self) -> str:
        """The format that `path` names; empty where the names of the files decide."""
        return self.path if self.path in RECORD_FORMATS else ""

    @property
    def root(self) -> str:
        """The folder that data_files are relative to; empty: the current one."""
        below = (self.path, self.subset) if self.path and not self.record_format else ()
        given = [part for part in (*below, self.data_dir) if part]
        return str(Path(*given)) if given else ""

    def sources(self, *splits: str) -> list[tuple[str, str]]:
        """(key, path) of everything the user named, in the order of the keys above; of data_files
        by split only those of `splits` (left out: of the split that is read)."""
        found = [("dataset_dir", self.dataset_dir)] if self.dataset_dir else []
        found += [("dataset_files", path) for path in _listed(self.dataset_files)]
        files: Any = self.data_files
        if isinstance(files, dict):
            wanted = splits or names_of_split(self.split)
            files = [path for name in wanted for path in _listed(files.get(name))]
        root = self.root
        found += [("data_files", _below(root, path)) for path in _listed(files)]
        if root and not self.data_files:
            names = ("data_dir", "subset", "path") if self.path else ("data_dir",)
            key = next(name for name in names if getattr(self, name))
            found.append((key, root))
        return found

    @property
    def paths(self) -> list[str]:
        """The paths of `sources`."""
        return [path for _, path in self.sources()]


def _below(root: str, path: str) -> str:
    """A path of data_files; a URL is one by itself."""
    return path if "://" in path else str(Path(root, path))


def _listed(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    return [path for path in value if isinstance(path, str)] if isinstance(value, list) else []


@dataclass(frozen=True, kw_only=True)
class MixtureSourceSection(DataLoaderSection):
    """One source of a mixture: an entry where `train_dataset.data_loader` is a list. Each sample of
    a run is from the source that is farthest behind its share: after any number of samples every
    source is within one sample of it. The order of the list decides nothing."""

    name: str = ""
    """What metrics, messages and checkpoints call the source: letters, digits, `.`, `_`, `-`. Left
    out: the end of its path, without the ending of a file."""
    weight: float | None = effective(None, above=0)
    """Its share of the samples. If all sources have a weight, relative to the others, and an epoch
    has as many samples as the sources have rows; if only some have one, a part of 1, and the
    sources without one divide the rest by their rows and `epochs`. Shares are exact fractions of
    the decimal numbers, rounded to a denominator of 131072 where theirs is larger. Not in
    eval_dataset, which reads every row once."""
    epochs: float | None = effective(None, above=0)
    """Instead of a weight: how often an epoch of the mixture goes through the source, also a
    fraction. Left out: once."""
    max_samples: int | None = effective(None, minimum=1)
    """Use only so many rows of the source, the same in every epoch: chosen by the seed, or the
    first ones with `shuffle: False`."""


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
    packing_strategy: str | None = effective(None, choices=("first_fit", "concatenate"))
    """With packing. `concatenate`: samples are one stream that is cut every seq_length tokens, so
    one may be continued in the next row. `first_fit`: only complete samples, in the first row with
    room; longer ones are cut. Left out: concatenate for text, first_fit for conversations."""
    drop_remainder: bool = True
    """An epoch has as many optimizer steps as there are full global batches; False: one more for
    the rest. Samples run on from one epoch into the next either way, none is left out."""
    seed: int | None = effective(None, minimum=0)
    """Seed of the order of the rows. Left out: the top-level seed."""
    num_parallel_workers: int | None = effective(None, minimum=1)
    """Processes of each machine that tokenize large data, at most as many as it has processors.
    Left out: up to 16. The result does not depend on it."""

    @property
    def loaders(self) -> dict[str, DataLoaderSection]:
        """The data loaders by their key in this section: one, or those of a mixture."""
        if isinstance(self.data_loader, list):
            return {f"data_loader.{i}": source for i, source in enumerate(self.data_loader)}
        return {"data_loader": self.data_loader}


@dataclass(frozen=True, kw_only=True)
class DataCacheSection:
    """`data_cache`: where tokens are kept for later runs."""

    dir: str = ""
    """Its folder, which several jobs may share. Left out: {output_dir}/dataset_cache."""
    max_gb: float | None = effective(None, above=0)
    """Size in 10^9 bytes. When a dataset is added, those that were not used for the longest time
    are deleted, never one that a running job uses. Left out: nothing is deleted."""


@dataclass(frozen=True, kw_only=True)
class DatasetTaskSection:
    """`train_dataset_task` and `eval_dataset_task`: wrappers of MindFormers around a data set."""

    dataset_config: DatasetSection | None = optional_section()
    """Usually the alias `*train_dataset`; train_dataset itself counts."""
