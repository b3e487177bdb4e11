"""Sections about the data: where samples come from and how they become rows."""

# ruff: noqa: RUF009 - the helpers of field.py return dataclasses.field(...)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.field import (
    effective,
    no_effect,
    not_built,
    optional_section,
    section,
)

_MEMORY_MAPPED = "rows are prepared once and memory-mapped"
_ONE_FORM = "the columns are always input_ids and labels"


@dataclass(frozen=True, kw_only=True)
class DataLoaderSection:
    """`train_dataset.data_loader`: the source of the samples."""

    type: str = effective(
        "TextDataLoader",
        choices=("TextDataLoader", "HFDataLoader", "InstructionDataLoader", "CommonDataLoader"),
        planned=(
            *("TokenFileDataLoader", "BlendedMegatronDatasetDataLoader", "MindDataset"),
            *("MultiSourceDataLoader", "TFRecordDataset", "ADGenDataLoader", "CLUEDataset"),
        ),
    )
    """`TextDataLoader`: text files. `HFDataLoader` (the original also: `CommonDataLoader`): JSONL
    or Parquet with a text column. `InstructionDataLoader`: questions with answers."""
    dataset_dir: str = ""
    """A file, a folder or a glob. Equal to dataset_files with one entry."""
    dataset_files: str | list[str] | None = None
    """Files, folders or globs; used together with dataset_dir when both are given."""
    data_files: str | list[str] | None = None
    """The original's HFDataLoader spelling of dataset_files."""
    path: str = no_effect("", "the format follows from the file names")
    """The original's HFDataLoader: name of a loading script such as `json`."""
    load_func: str = no_effect("load_dataset", "files are always read by `datasets`")
    """The original's HFDataLoader: the loading function."""
    suffixes: list[str] | None = None
    """TextDataLoader: endings of the files taken from a folder. Left out: all usual ones."""
    text_column: str = "text"
    """HFDataLoader: the column that holds the text."""
    format: str | None = effective(None, choices=("alpaca", "messages", "sharegpt"))
    """InstructionDataLoader: form of a record. Left out: seen from the first record."""
    strict_fields: bool = True
    """InstructionDataLoader: a field of a record with a wrong value, or one of another kind of data
    (`rejected`, `images`), is an error. False: it is passed over and counted."""
    split: str = "train"
    """HFDataLoader: the split to read where the source has several."""
    num_samples: int | None = effective(None, minimum=1)
    """Take only the first so many documents of the source. Left out: all."""
    shuffle: bool = True
    """Visit the rows in a random order, another one each epoch, decided by the seed."""
    handler: list[Any] | None = not_built(
        None, "Give the data as JSONL with a text column, or use InstructionDataLoader"
    )
    """The original's chain of processing steps."""
    streaming: bool = not_built(False, "Set it to False: rows are memory-mapped")
    """Read the source while training."""
    tokenizer: dict[str, Any] | None = not_built(
        None, "Set processor.tokenizer.pretrained_model_dir"
    )
    """The original: a tokenizer for this source alone."""
    sizes: list[int] | None = not_built(None, "It belongs to BlendedMegatronDatasetDataLoader")
    """Megatron data: samples of each split."""
    config: dict[str, Any] | None = not_built(
        None, "It belongs to BlendedMegatronDatasetDataLoader"
    )
    """Megatron data: its own settings."""
    token_dtype: str | None = not_built(None, "It belongs to TokenFileDataLoader")
    """Token files: the number format."""
    create_attention_mask: bool = no_effect(False, "attention follows from the document boundaries")
    """Make a mask on the host."""
    use_broadcast_data: bool = no_effect(True, _MEMORY_MAPPED)
    """Read on one rank and send to the others."""
    num_shards: int | None = no_effect(None, "every rank reads exactly its share")
    """Parts the source is cut into."""
    shard_id: int | None = no_effect(None, "every rank reads exactly its share")
    """The part of this rank."""

    @property
    def paths(self) -> list[str]:
        """Everything the user named as a source, in the order of the keys above."""
        found = [self.dataset_dir] if self.dataset_dir else []
        for value in (self.dataset_files, self.data_files):
            found += [value] if isinstance(value, str) and value else list(value or ())
        return found


@dataclass(frozen=True, kw_only=True)
class DatasetSection:
    """`train_dataset` and `eval_dataset`: a source and how its samples become rows."""

    data_loader: DataLoaderSection = section(DataLoaderSection)
    """The source of the samples."""
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
    batch_size: int | None = no_effect(None, "runner_config.batch_size decides")
    """Samples of one step."""
    input_columns: list[str] | None = no_effect(None, _ONE_FORM)
    """Columns the model takes."""
    output_columns: list[str] | None = no_effect(None, _ONE_FORM)
    """Columns after processing."""
    construct_args_key: list[str] | None = no_effect(None, _ONE_FORM)
    """Names of the model's arguments."""
    num_parallel_workers: int = no_effect(8, _MEMORY_MAPPED)
    """Processes that read."""
    python_multiprocessing: bool = no_effect(False, _MEMORY_MAPPED)
    """Processes instead of threads."""
    repeat: int = no_effect(1, "runner_config.epochs decides")
    """Passes over the data."""
    numa_enable: bool = no_effect(False, _MEMORY_MAPPED)
    """Bind readers to memory nodes."""
    prefetch_size: int = no_effect(1, _MEMORY_MAPPED)
    """Batches read ahead."""
    do_eval: bool = no_effect(False, "the top-level do_eval decides")
    """This data is for evaluation."""
    auto_tune: bool = no_effect(False, _MEMORY_MAPPED)
    """Tune the readers."""
    filepath_prefix: str = no_effect("", _MEMORY_MAPPED)
    """Where tuning results go."""
    autotune_per_step: int = no_effect(10, _MEMORY_MAPPED)
    """Steps between tunings."""
    profile: bool = no_effect(False, "the data is not profiled")
    """Profile the readers."""
    dynamic_batch: bool = not_built(False, "Set it to False: rows have one length")
    """Batches of varying length."""
    divisor: int | None = no_effect(None, "rows have one length")
    """Lengths are rounded up to it."""
    remainder: int | None = no_effect(None, "rows have one length")
    """Lengths leave it over."""
    eod_reset: bool = no_effect(False, "packing always keeps documents apart")
    """Keep packed documents apart."""
    eod_token_id: int | None = no_effect(None, "document boundaries are known from the source")
    """The token between packed documents."""
    token_monitor: bool = no_effect(False, "metrics.jsonl reports the tokens of a step")
    """Report tokens."""
    mixup_op: Any = no_effect(None, "it belongs to image models")
    """Image augmentation."""
    tokenizer: dict[str, Any] | None = not_built(
        None, "Set processor.tokenizer.pretrained_model_dir"
    )
    """The original: a tokenizer for this data alone."""


@dataclass(frozen=True, kw_only=True)
class DatasetTaskSection:
    """`train_dataset_task` and `eval_dataset_task`: the original's wrapper around the data set."""

    type: str = no_effect("CausalLanguageModelDataset", "the data set needs no wrapper")
    """The original's class of a data set."""
    dataset_config: DatasetSection | None = optional_section()
    """Usually the alias `*train_dataset`; train_dataset itself counts."""
