"""SentencePiece models as `tokenizers` models, without the sentencepiece package.

Owns the reading of a `tokenizer.model`: BPE and unigram, with byte fallback, a precompiled
normalization and user-defined symbols. The tokens are those of `SentencePieceProcessor.encode`.

Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import UserError
from launcher.mindspore.protobuf_wire import BYTES, Message, WireError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_KINDS = (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE)
_MODEL_NAMES = {3: "a word model", 4: "a character model"}
_NEVER = -1e9
"""Score of pieces that are no tokens of a text: it is split into others, where there are some."""
_ADVICE = "Give the SentencePiece file of this model, or its tokenizer.json as tokenizer_file"


@dataclass(frozen=True)
class Pieces:
    """The content of a model file."""

    names: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    is_unigram: bool
    byte_fallback: bool
    charsmap: bytes
    """Compiled normalization rules; empty: none."""
    prefixes: bool
    """Whether a space is added before a text."""
    strips: bool
    """Whether spaces at the ends are removed, and several become one."""

    def of_kind(self, *kinds: int) -> list[str]:
        """The pieces of these kinds."""
        return [name for name, kind in zip(self.names, self.kinds, strict=True) if kind in kinds]

    @property
    def unknown(self) -> int:
        """The id of the unknown piece."""
        return self.kinds.index(_UNKNOWN)


def read_pieces(path: Path) -> Pieces:
    """The content of a SentencePiece file. Raises UserError."""
    try:
        return _parsed(path.read_bytes())
    except (OSError, ValueError) as error:  # WireError is a ValueError
        raise UserError(
            "this is not a SentencePiece model", where=str(path), rule=str(error), advice=_ADVICE
        ) from None


def _parsed(data: bytes) -> Pieces:
    model = Message(data)
    pieces = model.messages(_PIECES)
    trainer, normalizer = (
        model.message(number, name)
        for number, name in ((_TRAINER, "trainer"), (_NORMALIZER, "normalizer"))
    )
    kind = _number(trainer, 3, _UNIGRAM)
    if kind not in (_UNIGRAM, _BPE):
        raise ValueError(f"{_MODEL_NAMES.get(kind, f'model type {kind}')} is not built yet")
    if _number(trainer, 24, 0):
        raise ValueError("a model with spaces after words is not built yet")
    if not _number(normalizer, 5, 1):
        raise ValueError("a model that does not escape spaces is not built yet")
    names = tuple(piece.text(1, "piece") for piece in pieces)
    kinds = tuple(_number(piece, 3, _NORMAL) for piece in pieces)
    if len(set(names)) != len(names):
        raise ValueError("a piece is there twice")
    if kinds.count(_UNKNOWN) != 1 or not set(kinds) <= {*_KINDS}:
        raise ValueError("it must have one unknown piece and pieces of known kinds")
    return Pieces(
        names, tuple(map(_score, pieces)), kinds,
        is_unigram=kind == _UNIGRAM,
        byte_fallback=bool(_number(trainer, 35, 0)),
        charsmap=_bytes(normalizer, 2),
        prefixes=bool(_number(normalizer, 3, 1)),
        strips=bool(_number(normalizer, 4, 1)),
    )  # fmt: skip


def backend_of(pieces: Pieces) -> Tokenizer:
    """The tokenizer of a model: tokens of a text without special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    symbols = pieces.of_kind(_USER_DEFINED)
    backend = Tokenizer(_unigram(pieces) if pieces.is_unigram else _bpe(pieces, bool(symbols)))
    steps: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.strips:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if pieces.prefixes else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if symbols:  # matched before everything else, longest first
        longest_first = sorted(symbols, key=len, reverse=True)
        pattern = "|".join(map(_literal, longest_first))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.prefixes:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    return backend


def _unigram(pieces: Pieces) -> Any:
    from tokenizers import models

    vocabulary = [
        (name, score if kind in (_NORMAL, _USER_DEFINED) else _NEVER)
        for name, score, kind in zip(pieces.names, pieces.scores, pieces.kinds, strict=True)
    ]
    return models.Unigram(vocabulary, pieces.unknown, pieces.byte_fallback)


def _bpe(pieces: Pieces, whole_words_first: bool) -> Any:
    """`whole_words_first`: for user-defined symbols, which are words of their own."""
    from tokenizers import models

    return models.BPE(
        {name: index for index, name in enumerate(pieces.names)},
        _merges(pieces),
        unk_token=pieces.names[pieces.unknown],
        fuse_unk=True,
        byte_fallback=pieces.byte_fallback,
        ignore_merges=whole_words_first,
    )


def _merges(pieces: Pieces) -> list[tuple[str, str]]:
    """The pairs whose result is a piece, by its score: the best one is merged first."""
    normal = {
        name: (score, index)
        for index, (name, score, kind) in enumerate(
            zip(pieces.names, pieces.scores, pieces.kinds, strict=True)
        )
        if kind in (_NORMAL, _UNUSED)
    }
    merges: list[tuple[float, int, int, int, str, str]] = []
    for name, (score, index) in normal.items():
        for cut in range(1, len(name)):
            first, second = name[:cut], name[cut:]
            if first in normal and second in normal:
                ids = normal[first][1], normal[second][1]
                merges.append((-score, index, *ids, first, second))
    merges.sort()
    return [(first, second) for *_, first, second in merges]


def _literal(text: str) -> str:
    """A regular expression of Oniguruma that matches exactly `text`."""
    return "".join(c if c.isalnum() or c in f"{_SPACE}<>_" else f"\\x{{{ord(c):x}}}" for c in text)


def _number(message: Message, number: int, default: int) -> int:
    found = message.integers(number, bits=64)
    return found[-1] if found else default


def _bytes(message: Message, number: int) -> bytes:
    fields = [field for field in message.fields.get(number, ()) if field.protobuf_wire == BYTES]
    return message.data[fields[-1].value : fields[-1].stop] if fields else b""


def _score(piece: Message) -> float:
    fields = piece.fields.get(2, ())
    if not fields:
        return 0.0
    field = fields[-1]
    if field.stop - field.value != 4:
        raise WireError(field.at, "a score is not a float")
    score: float = struct.unpack("<f", piece.data[field.value : field.stop])[0]
    if not math.isfinite(score):
        raise WireError(field.at, "a score is not finite")
    return score
