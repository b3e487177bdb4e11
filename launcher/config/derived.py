"""What follows from a configuration: sizes, directories, the place of config.json.

Owns the formulas that the rules and the run share. Pure but for reading the
environment and one JSON file.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm, prod
from pathlib import Path
from typing import Any

from launcher.config.schema import Config, DatasetSection
from launcher.environment import process_environment
from launcher.errors import UserError
from launcher.json_text import UNAMBIGUOUS, NotJson, line_and_column, parse
from launcher.layout.mesh import Mesh, training_mesh
from launcher.weights.formats.placeholders import placeholder
from launcher.weights.formats.tokenizer_files import TOKENIZER_FILES
from models.spec import DecoderConfig

_CONTEXT_ALGORITHMS = {
    "colossalai_cp": "ring",
    "ulysses_cp": "ulysses",
    "hybrid_cp": "hybrid",
    "hybird_cp": "hybrid",
}


def world_size() -> int:
    """Processes of this run: torchrun's WORLD_SIZE, 1 without it. Raises `UserError`."""
    return process_environment().world_size


def planned_world_size() -> int | None:
    """Processes that msrun.sh is about to start; it checks the configuration before."""
    return process_environment().planned_world_size


def degrees(config: Config) -> dict[str, int]:
    """The degree of every axis whose product is the number of processes."""
    parallel = config.parallel_config
    return {
        "data_parallel": parallel.data_parallel,
        "model_parallel": parallel.model_parallel,
        "pipeline_stage": parallel.pipeline_stage,
        "context_parallel": parallel.context_parallel,
    }


def used_datasets(config: Config) -> dict[str, DatasetSection]:
    """The data sections that the run mode reads, by name."""
    trains = config.run_mode in ("train", "finetune")
    evaluates = config.run_mode == "eval" or (trains and config.do_eval)
    training = {"train_dataset": config.train_dataset} if trains and config.train_dataset else {}
    return {**training, **(evaluation_datasets(config) if evaluates else {})}


def evaluation_datasets(config: Config) -> dict[str, DatasetSection]:
    """The sections of evaluation data, by key: `eval_dataset`, `eval_datasets.0` and so on."""
    single = {"eval_dataset": config.eval_dataset} if config.eval_dataset else {}
    named = {f"eval_datasets.{i}": section for i, section in enumerate(config.eval_datasets)}
    return {**single, **named}


def written_datasets(config: Config) -> dict[str, DatasetSection]:
    """Every data section of the configuration, also those that the run mode does not read."""
    training = {"train_dataset": config.train_dataset} if config.train_dataset else {}
    return {**training, **evaluation_datasets(config)}


def is_evaluation(key: str) -> bool:
    """Whether a data section is one of evaluation, by its key."""
    return key.startswith("eval_dataset")


def mesh_of(config: Config) -> Mesh:
    """The mesh of the configuration. Raises ValueError when the degrees do not fit together."""
    sizes, parallel = config.parallel_config, config.parallel
    return training_mesh(
        data_parallel=sizes.data_parallel,
        tensor_parallel=sizes.model_parallel,
        pipeline_stages=sizes.pipeline_stage,
        context_parallel=sizes.context_parallel,
        expert_parallel=sizes.expert_parallel,
        shard_optimizer=parallel.enable_parallel_optimizer,
        shard_size=parallel.parallel_optimizer_config.optimizer_weight_shard_size,
    )


def predict_mesh_of(config: Config, decoder: DecoderConfig | None) -> Mesh:
    """The mesh of prediction: tensor, pipeline and expert parallelism as configured; all other
    ranks replicate the weights and divide the prompts. `decoder` None: a model that is never
    split."""
    sizes, ranks = config.parallel_config, prod(degrees(config).values())
    if decoder is None:
        return Mesh(dp_replicate=ranks)
    replicas = ranks // (sizes.model_parallel * sizes.pipeline_stage)
    ep = sizes.expert_parallel if decoder.experts is not None else 1
    return Mesh(pp=sizes.pipeline_stage, dp_replicate=replicas, tp=sizes.model_parallel, ep=ep)


def micro_batch_size(config: Config) -> int:
    """Samples of one forward pass of training on one rank; layers may take them in chunks."""
    return config.runner_config.batch_size * config.micro_batch_interleave_num


def global_batch_size(config: Config) -> int:
    """Samples of one optimizer step over all ranks."""
    runner, parallel = config.runner_config, config.parallel_config
    micro_steps = (
        parallel.micro_batch_num
        if parallel.pipeline_stage > 1
        else runner.gradient_accumulation_steps
    )
    return micro_batch_size(config) * parallel.data_parallel * micro_steps


def context_algorithm(config: Config) -> str:
    """How ranks share a sequence: `ring`, `ulysses` or `hybrid`."""
    written = config.parallel_config.context_parallel_algo
    return _CONTEXT_ALGORITHMS.get(written, written)


def ulysses_degree(config: Config) -> int:
    """Ranks that exchange sequence for heads: context_parallel, 1, or those of the hybrid."""
    parallel = config.parallel_config
    by_algorithm = {"ulysses": parallel.context_parallel, "ring": 1}
    return by_algorithm.get(context_algorithm(config), parallel.ulysses_degree_in_cp)


def row_unit(config: Config) -> int:
    """The number that the length of a row must be a multiple of, so that ranks can split it.

    The ring gives each rank two pieces, one from each end of the row; sequence parallel splits the
    part of a rank again.
    """
    parallel = config.parallel_config
    ranks = parallel.context_parallel
    pieces = ranks if ranks in (1, ulysses_degree(config)) else 2 * ranks
    tensor = parallel.model_parallel if parallel.use_seq_parallel else 1
    return lcm(pieces, ranks * tensor)


SPLIT_BACKWARD = ("zero_bubble_v", "interleaved_zero_bubble")
"""Schedules that compute the gradients of weights apart from those of activations."""


def pipeline_schedule(config: Config) -> str:
    """The schedule of the pipeline: `1f1b`, `gpipe`, `interleaved_1f1b`, `interleaved_zero_bubble`
    or `zero_bubble_v`. `gpipe` may have one stage a rank or several."""
    pipeline = config.parallel.pipeline_config
    if pipeline.pipeline_scheduler == "1f1b" and pipeline.pipeline_interleave:
        return "interleaved_1f1b"
    return pipeline.pipeline_scheduler


def splits_backward(config: Config) -> bool:
    """Whether the schedule of the pipeline computes the gradients of weights apart from those of
    activations."""
    has_pipeline = config.parallel_config.pipeline_stage > 1
    return has_pipeline and pipeline_schedule(config) in SPLIT_BACKWARD


def is_interleaved(config: Config) -> bool:
    """Whether a pipeline rank has several stages."""
    pipeline = config.parallel.pipeline_config
    return pipeline.pipeline_interleave or pipeline.pipeline_scheduler not in ("1f1b", "gpipe")


def stages_per_rank(config: Config) -> int:
    """Stages of each pipeline rank: 1, or where it is interleaved
    model.model_config.pp_interleave_num (left out: 2); `zero_bubble_v` always has 2.

    Without a pipeline it is 1, whatever is written.
    """
    if config.parallel_config.pipeline_stage == 1 or not is_interleaved(config):
        return 1
    written = config.model.model_config.get("pp_interleave_num")
    if pipeline_schedule(config) == "zero_bubble_v":
        return 2
    return written if type(written) is int and written > 1 else 2


def stage_offsets(config: Config) -> list[int] | None:
    """What model.model_config.offset adds to the even share of each stage, first stage to last.

    As in MindFormers the list counts pipeline ranks, or is a list of such lists, one for each stage
    of a rank. None without a pipeline, and where it is not set or 0. The rules check its shape.
    """
    written = config.model.model_config.get("offset")
    ranks, laps = config.parallel_config.pipeline_stage, stages_per_rank(config)
    if not written or not isinstance(written, list) or ranks == 1:
        return None
    rows = written if isinstance(written[0], list) else [written] * laps
    there_and_back = pipeline_schedule(config) == "zero_bubble_v"
    return [
        offset
        for lap, row in enumerate(rows)
        for offset in (reversed(row) if there_and_back and lap % 2 else row)
    ]


def stage_counts(config: Config, layers: int) -> list[int] | None:
    """Layers of each stage, first to last, from stage_layers, or from even shares of `layers` and
    offset. None where neither is set: the model decides."""
    written = config.parallel.pipeline_config.stage_layers
    if written is not None:
        return list(written)
    offsets = stage_offsets(config)
    if offsets is None:
        return None
    return [layers // len(offsets) + offset for offset in offsets]


TOKENIZER_FILE_KEYS = ("vocab_file", "merges_file", "tokenizer_file")
"""Keys of `processor.tokenizer` that name a file of a tokenizer."""


def named_tokenizer_files(config: Config) -> dict[str, Path]:
    """Key to path of the files that `processor.tokenizer` names."""
    section = config.processor.tokenizer
    named = {key: getattr(section, key) for key in TOKENIZER_FILE_KEYS}
    return {key: Path(path) for key, path in named.items() if path and path != "None"}


def tokenizer_json_of(files: Mapping[str, Path]) -> Path | None:
    """The tokenizer.json among the files that `processor.tokenizer` names, which needs no type."""
    named = files.get("vocab_file")
    is_json = named is not None and named.name.endswith("tokenizer.json")
    return files.get("tokenizer_file") or (named if is_json else None)


def uses_named_tokenizer(config: Config) -> bool:
    """Whether the tokenizer is built from those files: if they exist, or no directory is set."""
    files = named_tokenizer_files(config)
    return bool(files) and (
        not _tokenizer_dirs(config) or all(path.is_file() for path in files.values())
    )


def tokenizer_dir(config: Config) -> str:
    """The directory of the tokenizer; empty when none is set, or when it is built from files."""
    return "" if uses_named_tokenizer(config) else _tokenizer_dirs(config)


def _tokenizer_dirs(config: Config) -> str:
    return config.processor.tokenizer.pretrained_model_dir or config.pretrained_model_dir


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a directory contains a tokenizer, judged by file names."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES)


def read_config_json(config: Config) -> dict[str, Any] | None:
    """The content of pretrained_model_dir/config.json, None without such a file.

    Raises UserError when it is not a JSON object.
    """
    if not config.pretrained_model_dir:
        return None
    path = Path(config.pretrained_model_dir) / "config.json"
    if not path.is_file():
        return None
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises UserError when it is not a JSON object."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = parse(text, UNAMBIGUOUS)
    except NotJson as error:
        if found := placeholder(path, is_text=True):
            raise UserError(found) from None
        line = "" if error.position is None else f":{line_and_column(text, error.position)[0]}"
        raise UserError(
            f"this is not valid JSON: {error.reason}",
            where=f"{path}{line}",
            advice="Repair the file or copy it again",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise UserError("this is not a JSON object", where=str(path))
    return content
