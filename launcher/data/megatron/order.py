"""The order of samples of one dataset, equal to that of Megatron-core's GPTDataset.

Owns which sequences a split has, how often they are gone through, and the three arrays that decide
every sample:

    documents   int32  [epochs * sequences]  the sequences of the split, shuffled
    ends        int64  [epochs * sequences]  tokens up to the end of each of them
    shuffle     uint32 or int64 [samples]    the order of the samples

The shuffled sequences are one stream of tokens. Sample j of it begins at token j * seq_length and
has `seq_length` tokens and one more, its last label, which is the first token of sample j + 1.
Item k of the dataset is sample shuffle[k]. Megatron stores where each sample begins instead of
`ends`; that is one binary search here (`borders`), so that memory and time do not grow with it.

Random numbers are those of numpy.random.RandomState(seed), drawn in the order of the original:
documents first, then samples. Where the original never ends (a split without tokens from which
samples are requested) this is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.array_folder import NewArray
from launcher.data.rows import Ints
from launcher.errors import UserError

SPLITS = ("train", "valid", "test")
LAST_EPOCH_SHARE = 0.80
"""A last epoch of which less than this is used is shuffled by itself, after the others."""
GATHERED_AT_ONCE = 1 << 16
"""Documents whose lengths are gathered at one time: arrays that the processor caches."""
COPIED_UP_TO = 1 << 26
"""Sequences of a split whose lengths are copied into memory, 4 bytes each; a quarter of so many
numbers are shuffled in memory."""


def split_sequences(split: str, sequences: int) -> list[tuple[int, int] | None]:
    """The sequences of train, valid and test: [first, after the last), None without a share.

    `split`: shares such as "90,8,2"; missing ones are 0. Raises UserError without a positive sum.
    """
    shares = [float(word) for word in re.findall(r"[.0-9]*[0-9][.0-9]*", split)]
    shares += [0.0] * (len(SPLITS) - len(shares))
    total = np.sum(np.array(shares, dtype=np.float64))
    if len(shares) > len(SPLITS) or not total > 0:
        raise UserError(
            f"split = {split!r}",
            rule="it has the shares of train, valid and test, of which one is above 0",
            nearest="Nearest: '1, 0, 0', all of it for training",
        )
    bounds = [0.0]
    for share in shares:
        bounds.append(bounds[-1] + float(share / total))
    numbers = [round(bound * float(sequences)) for bound in bounds]
    return [
        (numbers[i], numbers[i + 1]) if bounds[i] != bounds[i + 1] else None
        for i in range(len(SPLITS))
    ]


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """What decides the order of one dataset, beside the lengths of its sequences."""

    first: int
    """The first sequence of the split."""
    stop: int
    """The sequence after its last one."""
    seq_length: int
    seed: int
    samples: int | None
    """Samples that are requested; None: one epoch."""
    extra_token: bool = True
    """Whether a sample has one more token than seq_length, for its last label."""
    drop_last: bool = True
    """Whether a last sample without enough tokens is left out."""


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """How often a split is gone through, and how many samples that makes."""

    epochs: int
    separate_last: bool
    """Whether the last epoch is shuffled by itself."""
    before_last: int
    """Samples before the last epoch, where it is separate."""
    samples: int
    """Samples that there are: at least those requested."""
    tokens: int
    """Tokens of all epochs."""


def plan_epochs(tokens: int, settings: OrderSettings) -> Epochs:
    """The epochs that the requested samples need. `tokens`: of one epoch, above 0."""
    length, extra, wanted = settings.seq_length, int(settings.extra_token), settings.samples
    epochs = 1 if wanted is None else max(1, -(-(wanted * length + extra) // tokens))
    separate, before = False, 0
    if epochs > 1 and wanted is not None:
        before = ((epochs - 1) * tokens - extra) // length
        separate = wanted - before < int(LAST_EPOCH_SHARE * ((tokens - extra) // length))
    total = epochs * tokens
    samples = (total - extra) // length
    if not settings.drop_last:  # the original computes it with 32-bit floats
        samples = int(np.ceil(np.float32(total - extra) / np.float32(length)))
    return Epochs(
        epochs=epochs,
        separate_last=separate,
        before_last=before if separate else 0,
        samples=max(samples, 0),
        tokens=total,
    )


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The order of one split of one dataset."""

    documents: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]
    shuffle: npt.NDArray[Any]
    seq_length: int
    extra_token: bool

    def __len__(self) -> int:
        return len(self.shuffle)

    def borders(self, samples: Ints) -> tuple[Ints, Ints]:
        """Where samples of the stream begin (0 to len, int64 [n]): indices in `documents`, and
        tokens into each. They are equal to Megatron's sample index."""
        begins = samples * self.seq_length
        extra = int(self.extra_token)
        last_tokens = np.maximum(begins + extra - 1, 0)
        places = np.searchsorted(self.ends, last_tokens, side="right").astype(np.int64)
        beyond = places >= len(self.ends)  # the end of a last sample without enough tokens
        places = np.minimum(places, len(self.ends) - 1)
        before = np.where(places > 0, self.ends[places - 1], 0)
        offsets = np.where(beyond, self.ends[-1] - before - extra, begins - before)
        at_start = samples == 0
        return np.where(at_start, 0, places), np.where(at_start, 0, offsets)


def token_count(lengths: npt.NDArray[np.int32], settings: OrderSettings) -> int:
    """Tokens of one epoch."""
    return int(lengths[settings.first : settings.stop].sum(dtype=np.int64))


def build_order(
    lengths: npt.NDArray[np.int32],
    settings: OrderSettings,
    new_array: NewArray,
    report: Callable[[float], None] = lambda fraction: None,
) -> SampleOrder:
    """The order of a dataset whose sequences have these lengths (int32 [sequences]).

    `new_array` makes the arrays, in memory or in files; `report` hears from time to time which part
    of the work is done. Raises UserError where the split has too few tokens for one sample.
    """
    tokens = token_count(lengths, settings)
    if tokens == 0:
        raise _too_small(settings, tokens)
    plan = plan_epochs(tokens, settings)
    if plan.samples == 0:
        raise _too_small(settings, tokens)
    random = np.random.RandomState(settings.seed)
    documents = new_array("documents", np.int32, plan.epochs * (settings.stop - settings.first))
    _fill_documents(documents, settings, plan, random)
    if settings.stop - settings.first <= COPIED_UP_TO:
        lengths = lengths.copy()  # in a file they are not aligned
    ends = new_array("ends", np.int64, len(documents))
    report(0.4)
    done = 0
    for begin in range(0, len(documents), GATHERED_AT_ONCE):
        part = slice(begin, begin + GATHERED_AT_ONCE)
        np.cumsum(lengths[documents[part]], dtype=np.int64, out=ends[part])
        ends[part] += done
        done = int(ends[part][-1])
        report(0.4 + 0.3 * begin / len(documents))
    is_small = plan.samples < np.iinfo(np.uint32).max - 1
    shuffle = new_array("shuffle", np.uint32 if is_small else np.int64, plan.samples)
    first = plan.before_last if plan.separate_last else plan.samples
    for begin, stop in ((0, first), (first, plan.samples)):
        _fill_shuffled(shuffle[begin:stop], 1, (begin, stop), random)
    return SampleOrder(
        documents=documents,
        ends=ends,
        shuffle=shuffle,
        seq_length=settings.seq_length,
        extra_token=settings.extra_token,
    )


def _fill_documents(
    documents: npt.NDArray[np.int32],
    settings: OrderSettings,
    plan: Epochs,
    random: np.random.RandomState,
) -> None:
    own, last = (settings.first, settings.stop), int(plan.separate_last)
    border = len(documents) - last * (settings.stop - settings.first)
    _fill_shuffled(documents[:border], plan.epochs - last, own, random)
    if last:
        _fill_shuffled(documents[border:], 1, own, random)


def _fill_shuffled(
    array: npt.NDArray[Any], times: int, numbers: tuple[int, int], random: np.random.RandomState
) -> None:
    """Fill `array` with a range of numbers, so often, in random order. Of an empty array nothing
    is drawn."""
    # numpy moves 64-bit integers faster than others; the order is the same.
    fast = len(array) <= COPIED_UP_TO // 4
    if fast:
        place = np.arange(*numbers, dtype=np.intp)
        place = place if times == 1 else np.tile(place, times)
        random.shuffle(place)
        array[:] = place
    else:
        array.reshape(times, -1)[:] = np.arange(*numbers, dtype=array.dtype)
        random.shuffle(array)


def _too_small(settings: OrderSettings, tokens: int) -> UserError:
    sequences = settings.stop - settings.first
    needed = settings.seq_length + int(settings.extra_token)
    return UserError(
        f"the split has {sequences} sequence(s) with {tokens} token(s)",
        rule=f"a sample takes {needed} tokens, and samples are cut from the sequences of the split",
        advice="Give the split a larger share, use more data or a smaller seq_length, or remove "
        "the dataset from data_path",
    )
