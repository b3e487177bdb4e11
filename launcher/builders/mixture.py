"""Mixtures of a job: the sources of a data section that lists several data loaders.

Owns how entries of the list become named datasets with shares. The sources are in the order of
their names, so that the order of the list decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from launcher.config.mixture import source_names
from launcher.config.schema import DatasetSection, MixtureSourceSection
from launcher.data.joined import limited
from launcher.data.loaders.base import Log
from launcher.data.mixture import (
    MixtureOrder,
    Portion,
    SourceOrder,
    mixture_order,
    source_seed,
)
from launcher.data.rows import RowDataset
from launcher.errors import UserError


class OpenDataset(Protocol):
    """Opens the rows of a data section with one data loader."""

    def __call__(self, section: DatasetSection, *, log: Log) -> RowDataset: ...


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The opened sources of a data section, in the order of their names."""

    sections: dict[str, MixtureSourceSection]
    datasets: dict[str, RowDataset]
    seed: int

    def order(self) -> MixtureOrder:
        """The order of a run that begins with them."""
        sources = [
            SourceOrder(
                name, len(self.datasets[name]), self.datasets[name].content,
                source_seed(self.seed, name), section.is_shuffled, self.datasets[name].settings,
            )
            for name, section in self.sections.items()
        ]  # fmt: skip
        portions = {
            name: Portion(len(self.datasets[name]), section.weight, section.epochs)
            for name, section in self.sections.items()
        }
        return mixture_order(sources, portions, self.seed)

    def description(self, order: MixtureOrder) -> Iterator[str]:
        """Log lines: what an epoch has of each source."""
        yield f"mixture: {len(order.sources)} source(s), {order.epoch_samples:,} samples an epoch"
        for source in order.sources:
            share = order.shares[source.name]
            passes = float(share * order.epoch_samples / source.rows)
            yield (
                f"  {source.name}: {float(share):.2%} of the samples, {source.rows:,} rows, "
                f"{passes:.4g} passes an epoch"
            )


def open_mixture(
    section: DatasetSection, seed: int, log: Log, open_dataset: OpenDataset
) -> Mixture:
    """Open every source with `open_dataset`, which gets the section of that source alone and the
    log for its lines. Raises UserError, which names the source."""
    assert isinstance(section.data_loader, list)
    named = zip(source_names(section.data_loader), section.data_loader, strict=True)
    sections = dict(sorted(named, key=lambda pair: pair[0]))
    datasets = {
        name: _open(name, replace(section, data_loader=source), log, open_dataset)
        for name, source in sections.items()
    }
    for name, source in sections.items():
        if source.max_samples is not None:
            if source.max_samples > len(datasets[name]):
                log(f"note: {name}: has {len(datasets[name]):,} rows, fewer than max_samples")
            own = source_seed(seed, name)
            datasets[name] = limited(
                datasets[name], source.max_samples, own, shuffle=source.is_shuffled
            )
    return Mixture(sections=sections, datasets=datasets, seed=seed)


def _open(name: str, section: DatasetSection, log: Log, open_dataset: OpenDataset) -> RowDataset:
    def log_of_source(text: str) -> None:
        warning = "warning: " if text.startswith("warning: ") else ""
        log(f"{warning}{name}: {text.removeprefix(warning)}")

    try:
        dataset = open_dataset(section, log=log_of_source)
    except UserError as error:
        raise UserError(
            replace(problem, what=f"source `{name}`: {problem.what}") for problem in error.problems
        ) from error
    return replace(dataset, name=f"source `{name}`")
