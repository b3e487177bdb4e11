"""Show what a configuration trains on: counts, lengths, padding, duplicates, decoded samples.

    python -m launcher.tools.inspect_data --config x.yaml [--samples 3] [key.path=value ...]

Takes the command line of `run.py` and the options below. Data are prepared exactly as a run would
prepare them, into the same cache, but no model is built. The histogram of lengths is also written
as `data_lengths.png` into output_dir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from launcher.errors import EXIT_OK, UserError
from launcher.report.console import Console
from launcher.tools.command import Parser, answer, count

if TYPE_CHECKING:
    from launcher.builders.job import Job
    from launcher.config.schema import DatasetSection
    from launcher.data.rows import Ints, RowDataset
    from launcher.data.summary import Summary
    from launcher.report.histogram import Bin

PICTURE = "data_lengths.png"
MOST_DOCUMENTS = 1_000_000


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this tool, and the command line of `run.py`. Raises `UserError`."""
    parser = Parser("inspect_data", "Show what a configuration trains on.")
    add = parser.add_argument
    add("--config", metavar="YAML", help="the configuration; other options are those of run.py")
    add("--samples", type=count, default=3, metavar="N", help="decoded samples (3)")
    add("--most_documents", type=count, default=MOST_DOCUMENTS, metavar="N",
        help="read only so many documents for lengths and duplicates (1,000,000)")  # fmt: skip
    options, others = parser.parse_known_args(arguments)
    if not options.config:
        raise UserError(
            "--config is missing", where="command line", rule="the tool inspects a configuration",
            advice="Write --config x.yaml",
        )  # fmt: skip
    return options, ["--config", options.config, *others]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for a mistake of the user."""
    return answer(lambda console: _inspect(*parse(arguments), console))


def _inspect(options: argparse.Namespace, command_line: list[str], console: Console) -> int:
    from launcher.builders.data import opened
    from launcher.builders.data_job import data_job
    from launcher.builders.show_data import sample_lines
    from launcher.config.derived import used_datasets
    from launcher.data.summary import summarize
    from launcher.report import histogram

    job = data_job(command_line, console)
    drawn: dict[str, list[Bin]] = {}
    for section_name, section in used_datasets(job.config).items():
        _refuse_stream(job, section_name, section)
        data = opened(job, section_name, section)
        for name, dataset in _parts(section_name, data.dataset):
            summary = summarize(dataset, options.most_documents)
            drawn[name] = histogram.bins_of(summary.lengths)
            for line in (*_numbers(name, summary), *histogram.lines(drawn[name], "tokens")):
                console.log(line)
        for line in sample_lines(job, data, options.samples):
            console.log(line)
    path = job.output_dir / PICTURE
    path.parent.mkdir(parents=True, exist_ok=True)
    histogram.draw(drawn, path, "tokens of a document", "documents")
    console.log(f"the lengths as a picture: {path}")
    return EXIT_OK


def _refuse_stream(job: Job, name: str, section: DatasetSection) -> None:
    key = next((key for key, loader in section.loaders.items() if loader.streaming), None)
    if key is not None:
        raise UserError(
            f"{name}.{key}.streaming = True",
            where=job.provenance.nearest(f"{name}.{key}.streaming"),
            rule="data are counted once all of them are tokenized, which a stream never does",
            nearest=f"Nearest: {name}.{key}.streaming=False {name}.{key}.num_samples=10000",
        )


def _parts(name: str, dataset: RowDataset) -> Iterator[tuple[str, RowDataset]]:
    """A dataset, or those of a mixture, with their names."""
    if not dataset.sources:
        yield name, dataset
    yield from ((f"{name}/{source.name}", source.dataset) for source in dataset.sources)


def _numbers(name: str, summary: Summary) -> Iterator[str]:
    """The lines about one dataset, but for its histogram and samples."""
    import numpy as np

    lengths, positions = summary.lengths, summary.rows * summary.seq_length
    read = "" if summary.is_complete else " read (see --most_documents)"
    yield f"{name}:"
    yield f"  rows        {summary.rows:,} of {summary.seq_length:,} tokens"
    yield (
        f"  an epoch    {summary.tokens:,} tokens, {summary.targets:,} of them targets "
        f"({summary.targets / max(summary.tokens, 1):.1%})"
    )
    yield f"  padding     {summary.padding:.1%} of {positions:,} positions"
    if (losses := summary.losses) is None:
        yield "  truncated   not known: documents are counted as they are in the rows"
    else:
        yield f"  truncated   {_part(losses.cut, losses.cut_tokens, lengths)}"
        if losses.left_out:
            yield f"  left out    {_part(losses.left_out, losses.left_out_tokens, lengths)}"
    yield (
        f"  duplicates  {_documents(summary.duplicates)} equal to an earlier one "
        f"({summary.duplicates / max(len(lengths), 1):.1%})"
    )
    if len(lengths):
        low, middle, high = np.percentile(lengths, [5, 50, 95])
        yield (
            f"  documents   {len(lengths):,}{read}; tokens: mean {lengths.mean():,.0f}, "
            f"5 % {low:,.0f}, median {middle:,.0f}, 95 % {high:,.0f}, longest {lengths.max():,}"
        )


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _part(documents: int, tokens: int, lengths: Ints) -> str:
    """Some of the documents with these lengths."""
    if not documents:
        return "none"
    share = tokens / lengths.sum()
    return f"{documents:,} of {len(lengths):,} documents, {tokens:,} tokens ({share:.1%})"


if __name__ == "__main__":
    sys.exit(main())
