"""What decides the rows of a dataset in the cache: its folder, and how tokens are packed.

Owns that list. Invariant: whatever changes the content of a folder changes its name; where the
files lie is no part of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from launcher.data.content import content_hashes
from launcher.data.files import DataFile
from launcher.data.loaders import loader_of, loader_type
from launcher.data.loaders.base import Recipe
from launcher.data.templates import DEFAULT_CHAT_TEMPLATE
from launcher.data.tokens import backend_of

CACHE_VERSION = 4
"""Part of every key: raise it when the same input would be stored in another way."""


def is_stream(recipe: Recipe) -> bool:
    """Whether documents are one stream of tokens, which is cut into rows when they are read."""
    strategy = recipe.section.packing_strategy or _usual_strategy(recipe)
    return recipe.section.packing and strategy == "concatenate"


def _usual_strategy(recipe: Recipe) -> str:
    return "first_fit" if loader_of(recipe.loader).has_targets else "concatenate"


def unusual_strategy(recipe: Recipe) -> dict[str, str]:
    """`packing_strategy` where it makes other rows of the same tokens than without it."""
    strategy = recipe.section.packing_strategy or _usual_strategy(recipe)
    return {"packing_strategy": strategy} if strategy != _usual_strategy(recipe) else {}


def folder_key(recipe: Recipe, files: list[DataFile]) -> str:
    """The name of the folder: a hash of what decides its content."""
    if recipe.loader.num_samples is not None:
        content = [[f.split, str(f.path.resolve()), f.size, f.mtime_ns] for f in files]
    else:
        hashes = content_hashes(files, recipe.cache_dir, recipe.on_progress)
        content = [
            [f.split, _kind(f.path), digest] for f, digest in zip(files, hashes, strict=True)
        ]
    return hash_of([settings_of(recipe), content])


def _kind(path: Path) -> str:
    """The part of the name of a file that decides how it is read: `.jsonl`, `.jsonl.gz`."""
    name = path.name.lower()
    inner = name.removesuffix(".gz")
    return Path(inner).suffix + name.removeprefix(inner)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What decides the content of a folder of the cache, apart from the data files."""
    loader, tokenizer = recipe.loader, recipe.tokenizer
    return {
        "version": CACHE_VERSION,
        "type": loader_type(loader),
        "text_column": loader.text_column,
        "record_format": loader.record_format,
        "delimiter": loader.delimiter,
        "column_map": loader.column_map,
        "transforms": loader.transforms,
        "prompt_template": loader.prompt_template,
        "format": loader.format,
        "train_on": [sorted(loader.train_on_roles), loader.train_on_turns],
        "strict_fields": loader.strict_fields,
        "split": loader.split,  # perhaps a part of the records of a file
        "num_samples": loader.num_samples,
        "packing": recipe.section.packing,
        "is_stream": is_stream(recipe),
        # A stream is cut into rows when it is read, so that one folder serves every length.
        "seq_length": None if is_stream(recipe) else recipe.seq_length,
        "tokenizer": tokenizer_hash(tokenizer),
        "chat_template": _chat(recipe),
    }


def _chat(recipe: Recipe) -> Any:
    """What decides how conversations are rendered."""
    chat, own = recipe.chat, getattr(recipe.tokenizer, "chat_template", None)
    template = own or DEFAULT_CHAT_TEMPLATE
    if not loader_of(recipe.loader).has_targets:
        return template
    if chat.text is not None:
        template = chat.text
    return [template, chat.name, dict(chat.kwargs), chat.tools and list(chat.tools)]


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of everything that decides the tokens of a text."""
    if getattr(tokenizer, "is_fast", False):
        content = backend_of(tokenizer).to_str()
    else:
        content = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hash_of([content, tokenizer.eos_token_id, str(tokenizer.special_tokens_map)])


def hash_of(value: Any) -> str:
    """The hash of a value that JSON can express."""
    return xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()
