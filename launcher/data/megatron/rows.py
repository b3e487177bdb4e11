"""Rows of Megatron datasets: tokens of a sample with labels, positions and document borders.

Invariants: item k is what GPTDataset of Megatron-core gives for index k, in the form of `Row`:

- a target whose loss mask is 0 there has the label -100 here;
- tokens that are `pad` become 0, and are no targets;
- positions that restart are `position_ids`, and attention that stays within a document is
  `document_ids`; each of the two is there only if its key is on.

Documents end with the token `eod`, which belongs to the document it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launcher.data.megatron.blend import BlendOrder
from launcher.data.megatron.indexed import IndexedDataset
from launcher.data.megatron.order import SampleOrder
from launcher.data.rows import NO_TARGET, Counts, Ints, Row

NO_TOKEN = -1
"""The value of `eod` and `pad` for none."""


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """How the tokens of a sample become a row."""

    seq_length: int
    eod: int = NO_TOKEN
    pad: int = NO_TOKEN
    eod_mask_loss: bool = False
    """Whether what follows `eod` is no target."""
    restart_positions: bool = False
    documents_apart: bool = False
    """Whether attention stays within a document."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One dataset of a blend."""

    data: IndexedDataset
    order: SampleOrder

    def tokens(self, item: int) -> Ints:
        """The tokens of an item: int64, fewer than a sample has at the end of the data only."""
        order = self.order
        begin = int(order.shuffle[item]) * order.seq_length
        missing = min(order.seq_length + order.extra_token, int(order.ends[-1]) - begin)
        place = int(np.searchsorted(order.ends, begin, side="right"))
        found = []
        while missing > 0:
            end = int(order.ends[place])
            count = min(end - begin, missing)
            document = int(order.documents[place])
            first = int(self.data.lengths[document]) - (end - begin)
            found.append(self.data.sequence(document, first, count))
            begin, missing, place = begin + count, missing - count, place + 1
        return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


class Sequences:
    """The sequences of the splits of some datasets, one dataset after another: the documents that
    rows are cut from, once each."""

    def __init__(self, parts: Sequence[Part]) -> None:
        orders = [part.order.documents for part in parts]
        self._firsts = [int(order.min()) for order in orders]
        found = [
            part.data.lengths[first : int(order.max()) + 1]
            for part, order, first in zip(parts, orders, self._firsts, strict=True)
        ]
        self._data = [part.data for part in parts]
        self._ends = np.cumsum([len(part) for part in found])
        self.lengths: Ints = np.concatenate(found).astype(np.int64)

    def document(self, index: int) -> Ints:
        """The tokens of a sequence."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[part - 1]) if part else 0
        sequence: Ints = self._data[part].sequence(self._firsts[part] + index - before)
        return sequence


class MegatronRows:
    """The rows of one dataset, or of a blend of several."""

    kept_documents: Ints | None = None
    """All of them: rows are cut from a stream."""

    def __init__(self, parts: Sequence[Part], blend: BlendOrder | None, rules: RowRules) -> None:
        """`blend` None: the one dataset of `parts`."""
        self.parts, self.blend, self._rules = parts, blend, rules
        self._extra = int(parts[0].order.extra_token)

    def __len__(self) -> int:
        return len(self.parts[0].order) if self.blend is None else len(self.blend)

    @property
    def documents(self) -> Sequences:
        """What rows are cut from."""
        return Sequences(self.parts)

    def row(self, index: int) -> Row:
        rules = self._rules
        inputs, labels = self._inputs_and_labels(index)
        is_target = self._is_target(inputs, labels)
        ends = inputs == rules.eod if rules.eod != NO_TOKEN else np.zeros(0, np.bool_)
        begins = np.flatnonzero(ends) + 1
        begins = begins[begins < rules.seq_length]
        inputs[inputs == rules.pad] = 0
        labels[~is_target] = NO_TARGET
        positions = documents = None
        if rules.restart_positions or rules.documents_apart:
            positions = np.arange(rules.seq_length, dtype=np.int64)
            steps = np.zeros(rules.seq_length, dtype=np.int64)
            steps[begins] = 1
            numbers = np.cumsum(steps)
            documents = numbers if rules.documents_apart else None
            if rules.restart_positions:
                positions = positions - np.concatenate([[0], begins])[numbers]
        return Row(inputs, labels, positions, documents)

    def counts(self, indices: Ints) -> Counts:
        length = self._rules.seq_length
        targets = np.full(len(indices), length - 1 + self._extra, dtype=np.int64)
        tokens = np.full(len(indices), length, dtype=np.int64)
        for place in np.flatnonzero(self._must_be_read(indices)):
            inputs, labels = self._inputs_and_labels(int(indices[place]))
            targets[place] = np.count_nonzero(self._is_target(inputs, labels))
            tokens[place] = np.count_nonzero(inputs != self._rules.pad)
        return Counts(targets, tokens)

    def _inputs_and_labels(self, index: int) -> tuple[Ints, Ints]:
        """Both of seq_length; `pad` where the tokens end."""
        length, pad = self._rules.seq_length, self._rules.pad
        sample = np.full(length + 1, pad, dtype=np.int64)
        tokens = self._tokens(index)
        sample[: len(tokens)] = tokens
        return sample[:length].copy(), sample[1:].copy()

    def _tokens(self, index: int) -> Ints:
        if self.blend is None:
            return self.parts[0].tokens(index)
        part = self.parts[int(self.blend.dataset[index])]
        return part.tokens(int(self.blend.sample[index]))

    def _is_target(self, inputs: Ints, labels: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        is_target = labels != self._rules.pad
        if self._rules.eod_mask_loss:
            is_target &= inputs != self._rules.eod
        return is_target

    def _must_be_read(self, indices: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether the tokens of a row decide its counts; of the others the counts are constant."""
        rules = self._rules
        if rules.pad != NO_TOKEN or (rules.eod_mask_loss and rules.eod != NO_TOKEN):
            return np.ones(len(indices), dtype=np.bool_)
        found = np.zeros(len(indices), dtype=np.bool_)
        which = np.zeros(len(indices), dtype=np.int64)
        items = indices
        if self.blend is not None:
            which, items = self.blend.dataset[indices], self.blend.sample[indices]
        for number, part in enumerate(self.parts):
            if _has_partial(part.order):
                mine = np.flatnonzero(which == number)
                found[mine] = part.order.shuffle[items[mine]] == len(part.order) - 1
        return found


def _has_partial(order: SampleOrder) -> bool:
    """Whether the last sample of the stream is not full."""
    return len(order) * order.seq_length + order.extra_token > int(order.ends[-1])
