"""Prediction: from prompts to text and result files.

Owns reading prompts, distributing them over data-parallel ranks, and the result files. Each
data-parallel rank (of one or more tensor-parallel ranks) has the full model: rank r of n continues
prompts r, r + n, r + 2n, ...; rank 0 gathers them.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from launcher.data.encoding import NotText, decode, read_bytes
from launcher.errors import UserError
from launcher.generation import GenerationSettings, continue_tokens, token_limits
from launcher.json_text import lone_surrogate, printable
from launcher.report.aside import make_way
from models.decoder import Decoder
from models.positions import position_limit, stretched
from models.transformers_model import TransformersModel

RESULT_FILE = "text_generation_result.txt"
_FILE_ENDINGS = (".txt", ".json", ".jsonl", ".md", ".csv")

Gather = Callable[[list[tuple[int, "Generation"]]], list[list[tuple[int, "Generation"]]] | None]
"""Collects one list a rank on rank 0; None elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt with its continuation."""

    prompt: str
    text: str
    """The prompt and its continuation."""
    tokens: tuple[int, ...]
    """The new tokens, with the end token where there is one."""


def read_prompts(input_data: str | Sequence[str] | None) -> list[str]:
    """The prompts of `--predict_data`: one text, several, or a file with one prompt a line.

    In a single text the two characters backslash and n mean a new line; empty lines of a file are
    skipped.
    """
    advice = "Give --predict_data a text, several, or a file with one prompt a line"
    given = [input_data] if isinstance(input_data, str) else list(input_data or [])
    if not given or given == [""]:
        raise UserError("predict needs prompts", advice=advice)
    for prompt in given:
        if wrong := lone_surrogate(prompt):
            raise UserError(
                f"--predict_data {printable(prompt)[:60]!r} has {wrong}",
                rule="a prompt must be valid UTF-8",
                advice=advice,
            )
    if len(given) > 1:
        return given
    text = given[0]
    path = Path(text) if len(text) < 4096 and "\n" not in text and "\0" not in text else Path()
    if _is(path, Path.is_file):
        return _read_file(path)
    if path != Path() and _is(path, Path.is_dir) and (os.sep in text or text in (".", "..")):
        raise UserError(f"--predict_data {text} is a directory", rule="prompts are text, or a file",
                        advice=advice)  # fmt: skip
    if path.suffix in _FILE_ENDINGS and len(text.split()) == 1:
        raise UserError(f"--predict_data {text}: there is no such file", advice=advice)
    return [text.replace("\\n", "\n")]


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: GenerationSettings,
    *,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    seed: int = 0,
    rank: int = 0,
    data_parallel: int = 1,
    gather: Gather | None = None,
) -> list[Generation]:
    """Continue every prompt; in the order of the prompts on rank 0, empty on the others.

    With `data_parallel` > 1 each rank continues its share, and `gather` collects them: the model
    must not communicate with ranks of other shares, which take other numbers of steps. Raises
    UserError for a prompt that is too long, before anything is computed.
    """
    encoded = [_encode(tokenizer, prompt, settings) for prompt in prompts]
    limits = token_limits([len(ids) for ids in encoded], settings, positions_of(model))
    mine = list(range(rank, len(prompts), data_parallel))
    done: list[tuple[int, Generation]] = []
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        news = continue_tokens(
            model, [encoded[i] for i in batch], settings, limits=[limits[i] for i in batch],
            indices=batch, seed=seed, device=device,
        )  # fmt: skip
        for index, new in zip(batch, news, strict=True):
            text = continued_text(tokenizer, prompts[index], encoded[index], new)
            done.append((index, Generation(prompt=prompts[index], text=text, tokens=tuple(new))))
    if data_parallel > 1 and gather is not None:
        shares = gather(done)
        done = [pair for share in shares or [] for pair in share]
    return [generation for _, generation in sorted(done, key=lambda pair: pair[0])]


def continued_text(
    tokenizer: Any, prompt: str, prompt_ids: Sequence[int], new: Sequence[int]
) -> str:
    """The prompt as given, followed by the decoded continuation."""
    before = tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
    text = tokenizer.decode([*prompt_ids, *new], skip_special_tokens=True)
    if text.startswith(before):
        return prompt + text[len(before) :]
    return prompt + tokenizer.decode(list(new), skip_special_tokens=True)


def positions_of(model: nn.Module) -> int | None:
    """Tokens of the longest possible text; None: no limit."""
    if isinstance(model, Decoder):
        config = model.config
        return stretched(config.max_position_embeddings, config.rope_scaling or {})
    if not isinstance(model, TransformersModel):
        return None
    limit = position_limit(model.family, cast(Any, model.wrapped.config).to_dict())
    return limit.longest_row if limit is not None else None


def result_text(generations: Sequence[Generation], batch_size: int) -> str:
    """The format of MindFormers: the text of a Python list with one item a batch."""
    batches = [generations[i : i + batch_size] for i in range(0, len(generations), batch_size)]
    return str([{"text_generation_text": [g.text for g in batch]} for batch in batches])


def write_results(generations: Sequence[Generation], path: Path | str, batch_size: int) -> Path:
    """Write the format of MindFormers to `path`, and JSON lines next to it. Returns the path of the
    latter, which ends in `.jsonl`.

    Each file appears complete. Results of an earlier run are renamed to
    `text_generation_result-1.txt` and so on.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        path = path.with_suffix(".txt")
    lines = [
        json.dumps({"prompt": g.prompt, "text": g.text, "tokens": list(g.tokens)},
                   ensure_ascii=False)
        for g in generations
    ]  # fmt: skip
    _write(path, result_text(generations, batch_size))
    _write(path.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
    return path.with_suffix(".jsonl")


def check_writable(path: Path) -> None:
    """Check that the result can be written to `path`. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        probe = path.with_name(f".{path.name}.{os.getpid()}.partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the result cannot be written to {path}",
            rule=str(error.strerror),
            advice="Set save_file to a file in a folder you may write to",
        ) from error


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    content = text.encode("utf-8", errors="backslashreplace")
    try:
        partial.write_bytes(content)
        make_way(path, content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(tokenizer: Any, prompt: str, settings: GenerationSettings) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"])
    if not ids and settings.bos_token_id is not None:
        return [settings.bos_token_id]
    return ids


def _read_file(path: Path) -> list[str]:
    try:
        lines = decode(read_bytes(path)).split("\n")
    except NotText as error:
        raise UserError(
            f"--predict_data {path} is not UTF-8 text",
            where=f"{path}:{error.line}",
            rule="prompts are UTF-8, or UTF-16 or UTF-32 with a byte order mark",
            nearest=f"The byte is at offset {error.offset} of the file",
            advice="Convert the file (iconv -f LATIN1 -t UTF-8)",
        ) from None
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--predict_data {path} is empty", advice="Write one prompt a line")
    return prompts


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """`kind(path)`; False for a text that cannot be a path."""
    try:
        return path != Path() and kind(path)
    except OSError:
        return False
