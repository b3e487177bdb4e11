"""A tokenizer from the files that `processor.tokenizer` names, instead of a directory.

Owns the step from the parts of a tokenizer to one of transformers, and the files of it. The types
are in `launcher.extensions.TOKENIZER_TYPES`; a tokenizer.json needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from launcher.config.derived import tokenizer_json_of
from launcher.config.schema.model import TokenizerSection
from launcher.errors import UserError
from launcher.extensions import TOKENIZER_TYPES, required

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")

_WITH_TOKENIZER_JSON = ("LlamaTokenizerFast",)
"""Types that read a tokenizer.json; with others it is opened as it is."""


@dataclass(frozen=True)
class TokenizerParts:
    """What a type contributes; the keys of `processor.tokenizer` override the tokens."""

    backend: Tokenizer
    special: Mapping[str, str] = field(default_factory=dict)
    """Default of each special token, where the vocabulary has it."""
    adds_bos: bool = False
    """Whether a text begins with the BOS token by default."""
    prefix: tuple[str, ...] = ()
    """Tokens that every text begins with."""


def build_named_tokenizer(section: TokenizerSection, files: Mapping[str, Path]) -> Any:
    """The tokenizer of `files`, by their keys. Raises UserError for whatever the files hold."""
    parts = _parts(section, files)
    tokens = {name: _token(section, parts, name) for name in SPECIAL}
    _set_ends(parts, section, tokens)
    from transformers import PreTrainedTokenizerFast

    options: dict[str, Any] = {name: token for name, token in tokens.items() if token is not None}
    for name in ("model_max_length", "padding_side", "chat_template"):
        if getattr(section, name):
            options[name] = getattr(section, name)
    return PreTrainedTokenizerFast(
        tokenizer_object=parts.backend, clean_up_tokenization_spaces=False, **options
    )


def files_of_tokenizer(tokenizer: Any) -> dict[str, bytes]:
    """The files that AutoTokenizer opens, by name."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def from_tokenizer_json(path: Path) -> Tokenizer:
    """The backend in a tokenizer.json. Raises UserError."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            "this is not a tokenizer.json", where=str(path), rule=str(error).splitlines()[0],
            advice="Copy it again from the model it belongs to",
        ) from None  # fmt: skip


def _parts(section: TokenizerSection, files: Mapping[str, Path]) -> TokenizerParts:
    as_json = tokenizer_json_of(files)
    if as_json is not None and section.type not in _WITH_TOKENIZER_JSON:
        return TokenizerParts(from_tokenizer_json(as_json))
    what = f"processor.tokenizer.type = {section.type!r}"
    parts: TokenizerParts = required(TOKENIZER_TYPES, section.type or "", what)(files)
    return parts


def _token(section: TokenizerSection, parts: TokenizerParts, name: str) -> str | None:
    """The special token `name`: as configured, else the default if the vocabulary has it."""
    written = getattr(section, name)
    if written is None or written == "None":
        return None
    if written:
        return str(written)
    default = parts.special.get(name)
    return default if default and parts.backend.token_to_id(default) is not None else None


def _set_ends(
    parts: TokenizerParts, section: TokenizerSection, tokens: Mapping[str, str | None]
) -> None:
    """Set the tokens that are added before and after a text."""
    from tokenizers.processors import TemplateProcessing

    adds_bos = parts.adds_bos if section.add_bos_token is None else section.add_bos_token
    before = [*parts.prefix, *([tokens["bos_token"]] if adds_bos else ())]
    after = [tokens["eos_token"]] if section.add_eos_token else []
    ids = {token: parts.backend.token_to_id(token) for token in (*before, *after) if token}
    missing = next((token for token, index in ids.items() if index is None), None)
    if missing is not None:
        raise UserError(
            f"{missing!r} is not a token of the vocabulary", where="processor.tokenizer",
            rule="a token that is added to every text must be one",
            advice="Set bos_token and eos_token to tokens of the model, or add_bos_token: False",
        )  # fmt: skip
    if not parts.special and not ids:
        return  # a tokenizer.json that adds its own tokens
    parts.backend.post_processor = TemplateProcessing(
        single=[*filter(None, before), "$A", *filter(None, after)],
        pair=[*filter(None, before), "$A", "$B:1", *filter(None, after)],
        special_tokens=list(ids.items()),
    )
