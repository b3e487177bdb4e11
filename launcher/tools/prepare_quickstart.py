"""The data of the quickstart: text that every Python installation has, and a tokenizer for it.

    python -m launcher.tools.prepare_quickstart --output_dir data/quickstart

Owns the folder it makes:

    train/, heldout/    the Python standard library's own source, without its tests and tables;
                        about one file in twenty is held out, chosen by a hash of its name
    tokenizer/          a byte-level BPE tokenizer trained on train/, as a Hugging Face directory
    prepared.json       a description of the content; written last

Invariants: the folder appears complete or not at all; a folder that this tool did not make is never
changed, and one that it made is replaced only with --overwrite.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import EXIT_OK, EXIT_USER, UserError
from launcher.tools.standard_library import is_held_out, sources, standard_library

LARGEST_CORPUS = 9_000_000
"""Bytes: enough for a model of a few million parameters, small enough to tokenize in seconds."""
END = "<|endoftext|>"
PAD = "<|pad|>"
MARKER = "prepared.json"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launcher.tools.prepare_quickstart")
    parser.add_argument("--output_dir", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens of the tokenizer")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    arguments = parser.parse_args(argv)
    try:
        prepare(arguments.output_dir, arguments.vocab_size, overwrite=arguments.overwrite)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER
    return EXIT_OK


def prepare(output_dir: Path, vocab_size: int = 4096, *, overwrite: bool = False) -> dict[str, Any]:
    """Make the folder, or keep an existing one. Returns the content of `prepared.json`."""
    if vocab_size < 300:
        raise UserError(
            f"--vocab_size {vocab_size}",
            rule="a byte-level tokenizer has 256 bytes and two special tokens before anything else",
            nearest="The least is 300",
            advice="4096 suits the quickstart",
        )
    if output_dir.exists() and not overwrite:
        facts = _facts_of_existing(output_dir, vocab_size)
        print(f"{output_dir} is complete and kept: {_in_words(facts)}")
        return facts
    if output_dir.exists():
        _facts_of_existing(output_dir, None)
    scratch = output_dir.parent / f".{output_dir.name}.{os.getpid()}.tmp"
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    try:
        facts = _copy_corpus(standard_library(), scratch)
        facts |= {"requested_vocab_size": vocab_size}
        facts["vocab_size"] = _train_tokenizer(scratch, vocab_size)
        (scratch / MARKER).write_text(json.dumps(facts, indent=1) + "\n")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        scratch.rename(output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{output_dir} is made: {_in_words(facts)}")
    return facts


def _facts_of_existing(folder: Path, vocab_size: int | None) -> dict[str, Any]:
    """The content of an existing folder. Raises `UserError` where another tool made it, or where
    its settings differ."""
    try:
        facts: dict[str, Any] = json.loads((folder / MARKER).read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(
            f"{str(folder)!r} exists and has no {MARKER}",
            rule="this tool only touches a folder that it made itself",
            advice="Name another --output_dir, or remove that folder yourself",
        ) from None
    if vocab_size is not None and facts["requested_vocab_size"] != vocab_size:
        raise UserError(
            f"{str(folder)!r} has a tokenizer made with --vocab_size "
            f"{facts['requested_vocab_size']}, not {vocab_size}",
            rule="an existing folder is kept",
            nearest=f"--vocab_size {facts['requested_vocab_size']}",
            advice="Add --overwrite to replace it",
        )
    return facts


def _in_words(facts: dict[str, Any]) -> str:
    train, heldout = facts["train"], facts["heldout"]
    return (
        f"Python {facts['python']} standard library, {train['files']} files "
        f"({train['bytes'] / 1e6:.1f} MB) to train on and {heldout['files']} "
        f"({heldout['bytes'] / 1e6:.1f} MB) held out, {facts['vocab_size']} tokens"
    )


def _copy_corpus(library: Path, target: Path) -> dict[str, Any]:
    parts = {name: {"files": 0, "bytes": 0} for name in ("train", "heldout")}
    total = 0
    for path in sources(library):
        content = path.read_bytes()
        if not content.strip() or total + len(content) > LARGEST_CORPUS:
            continue
        part = "heldout" if is_held_out(path, library) else "train"
        copy = target / part / path.relative_to(library)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
        parts[part]["files"] += 1
        parts[part]["bytes"] += len(content)
        total += len(content)
    return {"python": sys.version.split()[0], **parts}


def _train_tokenizer(folder: Path, vocab_size: int) -> int:
    """Train on train/, write tokenizer/; the number of tokens it really has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (path.read_text(encoding="utf-8") for path in sorted((folder / "train").rglob("*.py")))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.save_pretrained(str(folder / "tokenizer"))
    return len(fast)


if __name__ == "__main__":
    sys.exit(main())
