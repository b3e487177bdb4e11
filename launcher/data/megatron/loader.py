"""BlendedMegatronDatasetDataLoader: Megatron's indexed datasets, prepared once and memory-mapped.

Owns the way from the section to rows. `prepare` builds the order of each dataset and of the blend
in folders of the cache, named by a hash of everything that decides them; `open` maps them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from launcher.config.schema import MegatronConfigSection
from launcher.data.array_folder import (
    ArrayFolder,
    DamagedArrays,
    NewArray,
    open_array_folder,
    write_arrays,
)
from launcher.data.cache import make_once
from launcher.data.file_hash import file_state, sampled_hash
from launcher.data.loaders.base import Log, Recipe, RowLoader, warn_without_end_token
from launcher.data.megatron.blend import BlendOrder, Requests, build_blend, requests
from launcher.data.megatron.data_path import BlendSpec, parse_data_path
from launcher.data.megatron.header import index_path, read_header, tokens_path
from launcher.data.megatron.indexed import open_indexed
from launcher.data.megatron.order import (
    SPLITS,
    OrderSettings,
    SampleOrder,
    build_order,
    split_sequences,
    token_count,
)
from launcher.data.megatron.rows import NO_TOKEN, MegatronRows, Part, RowRules
from launcher.data.progress import Meter, OnProgress
from launcher.data.rows import RowDataset
from launcher.errors import Problem, UserError

VERSION = 1
"""Part of every key: raise it when the same input would give other arrays."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a section asks for, in one phase."""

    phase: str
    blend: BlendSpec
    is_blended: bool
    wanted: Requests
    split: str | None
    """None: all sequences of each file are used."""
    order: OrderSettings
    """Of all datasets, but for their sequences and samples."""
    rules: RowRules


def plan_of(recipe: Recipe) -> Plan:
    """What the section of a recipe asks for. Raises UserError."""
    loader, config = recipe.loader, recipe.loader.config or MegatronConfigSection()
    phase = loader.phase or recipe.phase
    key, value = config.paths_of(phase)
    if not value:
        raise UserError(
            f"data_loader.config.{key} is not set",
            rule=f"BlendedMegatronDatasetDataLoader needs the {phase} data",
            advice=f"Set data_path, or {phase}_data_path",
        )
    blend = parse_data_path(value, f"data_loader.config.{key}")
    size = loader.sizes[SPLITS.index(phase)] if loader.sizes else None
    # A single file with a weight is a blend of one, unless it is the data of one split.
    is_blended = len(blend.prefixes) > 1 or (blend.weights is not None and key == "data_path")
    wanted = Requests(each=[size], blend=None, weights=None)
    if is_blended:
        wanted = requests(blend, size, mindformers_sizes=loader.mindformers_sizes)
    return Plan(
        phase=phase,
        blend=blend,
        is_blended=is_blended,
        wanted=wanted,
        split=_split_text(config) if key == "data_path" else None,
        order=OrderSettings(
            first=0,
            stop=0,
            seq_length=recipe.seq_length,
            seed=config.seed,
            samples=None,
            extra_token=config.add_extra_token_to_sequence,
            drop_last=phase != "valid" or config.drop_last_partial_validation_sequence,
        ),
        rules=RowRules(
            seq_length=recipe.seq_length,
            eod=NO_TOKEN if config.eod is None else config.eod,
            pad=config.pad,
            eod_mask_loss=config.eod_mask_loss,
            restart_positions=config.reset_position_ids,
            documents_apart=config.reset_attention_mask or config.create_compressed_eod_mask,
        ),
    )


def _split_text(config: MegatronConfigSection) -> str | None:
    if isinstance(config.split, list):
        return ", ".join(map(str, config.split))
    return config.split


def prepare(recipe: Recipe) -> str:
    """Check the files and build their orders, unless the cache has them. Raises UserError."""
    started = time.monotonic()
    plan, folder = plan_of(recipe), _cache_dir(recipe)
    config = recipe.loader.config or MegatronConfigSection()
    sizes = [_index_bytes(prefix) for prefix in plan.blend.prefixes]
    make = _Maker(
        plan=plan, folder=folder, log=recipe.log, on_progress=recipe.on_progress,
        meter=Meter("shuffle", sum(sizes), recipe.on_progress),
    )  # fmt: skip
    each = zip(plan.blend.prefixes, plan.wanted.each, strict=True)
    try:
        with ThreadPoolExecutor(max_workers=config.num_dataset_builder_threads) as threads:
            tasks = [threads.submit(make.part, prefix, samples) for prefix, samples in each]
            parts = [task.result() for task in tasks]
        names = [folder.name for folder, _ in parts]
        blend = None
        if plan.is_blended:
            blend = make.blend(parts).name
    except OSError as error:
        raise UserError(
            f"the order of the samples cannot be written ({error.strerror or error})",
            where=str(error.filename or folder),
            rule="it is cached in a folder that this user may write to",
            advice="Free some space, give write permission, or set config.path_to_cache",
        ) from error
    result = {"parts": names, "blend": blend}
    opened = _open_rows(plan, folder, result)
    rows = len(opened)
    if rows == 0:
        raise UserError(
            f"data_loader.sizes: the {plan.phase} split has no samples",
            rule="sizes is the length of a blend by weight",
            advice=f"Set entry {SPLITS.index(plan.phase)} of sizes to a number above 0",
        )
    recipe.log(_summary(plan, [content for _, content in parts], rows, make.made, started))
    if config.eod is not None and config.eod != NO_TOKEN and any(config.needs_eod):
        warn_without_end_token(opened, config.eod, "data_loader.config.eod", recipe.log)
    return json.dumps(result)


def open_rows(recipe: Recipe, prepared: str) -> RowDataset:
    """The rows that `prepare` described. Raises UserError where its folders are not there."""
    plan, folder = plan_of(recipe), _cache_dir(recipe)
    described = json.loads(prepared)
    try:
        rows = _open_rows(plan, folder, described)
        metadata = [
            open_array_folder(folder / name, verify=False).metadata for name in described["parts"]
        ]
    except (OSError, DamagedArrays) as error:
        raise UserError(
            f"the prepared order of samples cannot be read ({error})",
            where=str(folder),
            rule="every process reads what one process of its machine has prepared",
            advice="config.path_to_cache must be on the same file systems as output_dir",
        ) from error
    content = [
        [entry["content"] for entry in metadata],
        [entry["settings"] for entry in metadata],
        asdict(plan.wanted) if plan.is_blended else None,
        asdict(plan.rules),
    ]
    return RowDataset(
        rows=rows,
        seq_length=recipe.seq_length,
        packed=plan.rules.documents_apart,
        content=_key(content),
        name=", ".join(plan.blend.prefixes),
    )


def _open_rows(plan: Plan, folder: Path, described: Mapping[str, Any]) -> MegatronRows:
    parts = []
    for prefix, name in zip(plan.blend.prefixes, described["parts"], strict=True):
        arrays = open_array_folder(folder / name, verify=False).arrays
        parts.append(Part(data=open_indexed(prefix, check=False), order=_order(plan, arrays)))
    blend = None
    if described["blend"] is not None:
        arrays = open_array_folder(folder / described["blend"], verify=False).arrays
        blend = BlendOrder(dataset=arrays["dataset"], sample=arrays["sample"])
    return MegatronRows(parts, blend, plan.rules)


def _order(plan: Plan, arrays: Mapping[str, Any]) -> SampleOrder:
    return SampleOrder(
        documents=arrays["documents"],
        ends=arrays["ends"],
        shuffle=arrays["shuffle"],
        seq_length=plan.order.seq_length,
        extra_token=plan.order.extra_token,
    )


PartFolder = tuple[Path, Mapping[str, Any]]
"""A folder with the order of one dataset, and its metadata."""


def _index_bytes(prefix: str) -> int:
    read_header(prefix)  # both files are there
    return index_path(prefix).stat().st_size


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Makes the folders of a plan, as far as the cache does not have them. Several threads may."""

    plan: Plan
    folder: Path
    """The cache."""
    log: Log
    on_progress: OnProgress
    meter: Meter
    """Counts the bytes of the `.idx` files of all datasets."""
    made: list[Path] = field(default_factory=list)
    """The folders that were made."""

    def part(self, prefix: str, samples: int | None) -> PartFolder:
        """The folder with the order of one dataset."""
        plan, files = self.plan, (index_path(prefix), tokens_path(prefix))
        split = [plan.split, SPLITS.index(plan.phase)] if plan.split is not None else None
        wanted = asdict(replace(plan.order, samples=samples))
        key = _key([VERSION, [file_state(file) for file in files], split, wanted])
        report = self._share_of(files[0].stat().st_size)

        def fill(new_array: NewArray) -> Mapping[str, Any]:
            data = open_indexed(prefix)
            settings = replace(plan.order, samples=samples, stop=len(data))
            if plan.split is not None:
                own = split_sequences(plan.split, len(data))[SPLITS.index(plan.phase)] or (0, 0)
                settings = replace(settings, first=own[0], stop=own[1])
            order = _with_file(
                lambda: build_order(data.lengths, settings, new_array, report), prefix
            )
            tokens = token_count(data.lengths, settings)
            return {
                "content": [sampled_hash(file) for file in files],
                "settings": asdict(settings),
                "prefix": prefix,
                "sequences": settings.stop - settings.first,
                "tokens": tokens,
                "epochs": round(int(order.ends[-1]) / tokens),
                "samples": len(order),
            }

        folder = self.folder / f"megatron-{key}"
        found = self._ensure(folder, fill).metadata
        report(1.0)
        return folder, found

    def blend(self, parts: Sequence[PartFolder]) -> Path:
        """The folder with the order of the blend of these datasets."""
        plan, lengths = self.plan, [metadata["samples"] for _, metadata in parts]

        def fill(new_array: NewArray) -> Mapping[str, Any]:
            order = build_blend(plan.wanted, lengths, plan.blend.prefixes)
            new_array("dataset", order.dataset.dtype, len(order))[:] = order.dataset
            new_array("sample", order.sample.dtype, len(order))[:] = order.sample
            return {"prefixes": plan.blend.prefixes, **asdict(plan.wanted)}

        folder = self.folder / f"megatron-blend-{_key([VERSION, lengths, asdict(plan.wanted)])}"
        self._ensure(folder, fill)
        return folder

    def _ensure(self, folder: Path, fill: Callable[[NewArray], Mapping[str, Any]]) -> ArrayFolder:
        """A folder of the cache, checked; it is made where it is not there or damaged."""
        is_new = make_once(
            folder,
            lambda scratch: write_arrays(scratch, fill),
            lambda: _is_undamaged(folder),
            verb="shuffle",
            log=self.log,
            on_progress=self.on_progress,
        )
        if is_new:
            self.made.append(folder)
        return open_array_folder(folder, verify=False)

    def _share_of(self, size: int) -> Callable[[float], None]:
        """A function that reports how much of one dataset, with `size` bytes, is done."""
        done = 0

        def report(fraction: float) -> None:
            nonlocal done
            now = int(fraction * size)
            self.meter.add(now - done)
            done = now

        return report


def _is_undamaged(folder: Path) -> bool:
    try:
        open_array_folder(folder, verify=True)
    except (FileNotFoundError, DamagedArrays):
        return False
    return True


def _with_file(build: Callable[[], SampleOrder], prefix: str) -> SampleOrder:
    """The result of `build`; its error gets the name of the file."""
    try:
        return build()
    except UserError as error:
        raise UserError([
            Problem(what=p.what, where=p.where or str(index_path(prefix)), rule=p.rule,
                    nearest=p.nearest, advice=p.advice)
            for p in error.problems
        ]) from None  # fmt: skip


def _summary(
    plan: Plan, parts: Sequence[Mapping[str, Any]], rows: int, made: Sequence[Path], started: float
) -> str:
    tokens = sum(part["tokens"] for part in parts)
    epochs = sorted({part["epochs"] for part in parts})
    times = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    origin = f"{time.monotonic() - started:.1f} s" if made else "from the cache"
    return (
        f"data: {sum(part['sequences'] for part in parts):,} sequences of {len(parts):,} "
        f"dataset(s), {tokens:,} tokens, {times} epoch(s) of them, {rows:,} rows of "
        f"{plan.order.seq_length} ({plan.phase}, {origin})"
    )


def _cache_dir(recipe: Recipe) -> Path:
    config = recipe.loader.config
    return Path(config.path_to_cache) if config and config.path_to_cache else recipe.cache_dir


def _key(value: Any) -> str:
    return xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


MEGATRON_LOADER = RowLoader(prepare=prepare, open=open_rows, paths_key="config.data_path")
