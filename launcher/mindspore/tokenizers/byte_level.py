"""Byte-level BPE from the files of Qwen2 (vocab.json, merges.txt) and of tiktoken.

Owns both formats. A tiktoken file has a line for each token: its bytes in base64, and its rank,
which is also its id. https://github.com/openai/tiktoken/blob/main/tiktoken/load.py
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config.derived import read_json_object
from launcher.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_COPY = "Copy it again from the model it belongs to"
_BYTES = 256


def _letters() -> dict[int, str]:
    """A printable character for each byte, as in GPT-2: itself where it is printable, else one from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    by_byte = {byte: chr(byte) for byte in printable}
    return by_byte | {byte: chr(_BYTES + index) for index, byte in enumerate(others)}


_LETTER = _letters()


def byte_level_bpe(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], pattern: str, *,
    normalizes: bool, whole_words_first: bool = False,
) -> Tokenizer:  # fmt: skip
    """BPE over the bytes of the words that `pattern` splits a text into.

    `normalizes`: to NFC before. `whole_words_first`: a word that is a token is not merged.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.BPE(dict(vocabulary), list(merges), ignore_merges=whole_words_first)
    backend = Tokenizer(model)
    if normalizes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    return backend


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token to id of a vocab.json. Raises UserError."""
    content = read_json_object(path)
    if not content or any(type(index) is not int for index in content.values()):
        raise UserError("this is not a vocabulary", where=str(path),
                        rule="it must be an object from tokens to ids", advice=_COPY)  # fmt: skip
    if sorted(content.values()) != list(range(len(content))):
        raise UserError("the ids of the vocabulary are not 0, 1, 2, ...", where=str(path),
                        rule="special tokens follow the last id", advice=_COPY)  # fmt: skip
    return content


def read_merges(path: Path, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of a merges.txt, most frequent first. Raises UserError."""
    merges = []
    for number, line in enumerate(_lines(path), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2:
            raise UserError(f"{line[:60]!r} is not a merge", where=f"{path}:{number}",
                            rule="a line has two tokens and one space", advice=_COPY)  # fmt: skip
        first, second = parts
        for token in (first, second, first + second):
            if token not in vocabulary:
                raise UserError(f"{token!r} is not in the vocabulary", where=f"{path}:{number}",
                                rule="merges are between tokens of the vocabulary",
                                advice="Use the two files of one model")  # fmt: skip
        merges.append((first, second))
    return merges


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes of a token to its rank, of a tiktoken file. Raises UserError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line:
            continue
        token, _, rank = line.partition(" ")
        try:
            content = base64.b64decode(token, validate=True)
            ranks[content] = int(rank)
        except (binascii.Error, ValueError):
            raise UserError(
                f"{line[:60]!r} is not a token", where=f"{path}:{number}",
                rule="a tiktoken file has lines of a token in base64, a space and its rank",
                advice="Give the tokenizer.model of this model, or its tokenizer.json",
            ) from None  # fmt: skip
    _check_ranks(path, ranks)
    return ranks


def _check_ranks(path: Path, ranks: Mapping[bytes, int]) -> None:
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise UserError(f"the ranks of {len(ranks)} tokens are not 0, 1, 2, ...", where=str(path),
                        rule="special tokens follow the last rank", advice=_COPY)  # fmt: skip
    missing = next((byte for byte in range(_BYTES) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise UserError(f"no token for byte {missing:#04x}", where=str(path),
                        rule="every byte must be a token", advice=_COPY)  # fmt: skip


def merges_of(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) equivalent to merging, again and again, the pair whose result has the
    lowest rank."""
    spelled = {token: "".join(map(_LETTER.__getitem__, token)) for token in ranks}
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        pairs = [
            (token[:cut], token[cut:]) for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        ]  # fmt: skip
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled[first], spelled[second]) for first, second in pairs]
    return {spelled[token]: rank for token, rank in ranks.items()}, merges


def _lines(path: Path) -> list[str]:
    """The lines of a text file, which may contain any character but a line feed."""
    try:
        return [line.removesuffix("\r") for line in path.read_bytes().decode().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read it: {error}", where=str(path), rule="it must be UTF-8",
                        advice=_COPY) from None  # fmt: skip
