"""Golden cases of Megatron-core and MindFormers as sections of the loader."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema import DataLoaderSection, DatasetSection, MegatronConfigSection
from launcher.data.build import build_dataset
from launcher.data.megatron.rows import MegatronRows
from launcher.data.progress import OnProgress, ignore_progress
from launcher.data.rows import RowDataset

GOLDEN = Path(__file__).parents[2] / "fixtures" / "data" / "megatron"
CORPORA = sorted(path.stem for path in GOLDEN.glob("?_*.json") if path.with_suffix(".idx").exists())
SPLITS = ("train", "valid", "test")
_FLAGS = {
    "em": "eod_mask_loss", "rp": "reset_position_ids", "ra": "reset_attention_mask",
    "cce": "create_compressed_eod_mask", "epl": "eod_pad_length", "cam": "create_attention_mask",
    "dlp": "drop_last_partial_validation_sequence", "extra": "add_extra_token_to_sequence",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One file `order_*.json` or `mforder_*.json`."""

    name: str
    content: dict[str, Any]

    @property
    def is_mindformers(self) -> bool:
        """Whether its values are those of MindFormers."""
        return self.name.startswith("mf")

    def section(self) -> DataLoaderSection:
        """The loader that the case describes, but for its phase."""
        content = self.content
        paths: dict[str, Any] = {}
        if content["per_split"]:
            for split, blend in zip(SPLITS, content["per_split"], strict=True):
                if blend is not None:
                    paths[f"{split}_data_path"] = _listed(*blend)
        else:
            paths = {
                "data_path": _listed(content["data_path"], content["weights"]),
                "split": content["split"],
            }
        flags = {_FLAGS[key]: content[key] for key in _FLAGS if key in content}
        config = MegatronConfigSection(
            seed=content["seed"], eod=0, pad=-1 if self.name.endswith("pad_default") else 99,
            **paths, **flags,
        )  # fmt: skip
        return DataLoaderSection(
            type="BlendedMegatronDatasetDataLoader",
            config=config,
            sizes=content["sizes"],
            mindformers_sizes=self.is_mindformers,
        )


def _listed(names: Sequence[str], weights: Sequence[float] | None) -> list[str]:
    paths = [str(GOLDEN / name) for name in names]
    if weights is None:
        return paths
    return [word for pair in zip(map(str, weights), paths, strict=True) for word in pair]


def cases() -> list[Case]:
    """All golden cases, by name."""
    found = sorted(GOLDEN.glob("*order_*.json"))
    return [Case(path.stem, json.loads(path.read_text())) for path in found]


def case(name: str) -> Case:
    """One golden case."""
    return Case(name, json.loads((GOLDEN / f"{name}.json").read_text()))


def open_loader(
    loader: DataLoaderSection, seq_length: int, cache_dir: Path, *, phase: str = "train",
    log: list[str] | None = None, on_progress: OnProgress = ignore_progress,
) -> RowDataset:  # fmt: skip
    """The rows of a section, as one process opens them."""
    return build_dataset(
        DatasetSection(data_loader=loader),
        tokenizer=None,
        seq_length=seq_length,
        cache_dir=cache_dir,
        once=lambda prepare: prepare(),
        log=(log if log is not None else []).append,
        on_progress=on_progress,
        phase=phase,
    )


def megatron_rows(dataset: RowDataset) -> MegatronRows:
    """The rows behind a dataset, with their order."""
    assert isinstance(dataset.rows, MegatronRows)
    return dataset.rows
