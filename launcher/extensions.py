"""Extension points: one dict each, from a name or a mark in files to the code behind it.

An entry is "module:attribute". It is imported at its first use, so this module imports nothing
heavy and one that is never used costs nothing. Built-in entries come first.

Support for MindSpore and MindFormers is `launcher/mindspore/` and the entries here that name it.
Delete both and everything else still works; files that need them are then refused with an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from launcher.errors import UserError

Key = TypeVar("Key")

HEADER_READERS: dict[bytes, str] = {
    b"PK\x03\x04": "launcher.weights.formats.torch_pickle:read_header",
    b"\x80\x02\x8a\x0al\xfc\x9cF": "launcher.weights.formats.torch_pickle:refuse_legacy",
    b"\x80": "launcher.weights.formats.torch_pickle:refuse_pickle",
    b"\x0a": "launcher.mindspore.ckpt_files:read_header",
    b"\xfa\x7f": "launcher.mindspore.ckpt_files:read_header",
    b"\xd8\x5e\x3a\x7f": "launcher.mindspore.ckpt_files:refuse_encrypted",
    b"\xd9\x5e\x3a\x7f": "launcher.mindspore.ckpt_files:refuse_encrypted",
    b"\xda\x5e\x3a\x7f": "launcher.mindspore.ckpt_files:refuse_encrypted",
}
"""First bytes of a file that is not safetensors: path -> header, or an error with advice.
The first entry that fits counts."""

FILE_FORMATS: dict[str, str] = {
    "safetensors": "launcher.weights.streaming.write:SAFETENSORS",
    "ckpt": "launcher.mindspore.ckpt_writer:CKPT",
}
"""Name of a format that files of tensors can be written in: a `Container`."""

FILE_CHECKS: dict[str, str] = {
    "mindspore": "launcher.mindspore.ckpt_checksum:check_crc",
}
"""Checksum of an entire file (`Header.crc`): (path, bytes of the file) -> None, or an error."""

COMPLETE_FORMS: dict[str, str] = {
    "model.safetensors.index.json": "launcher.weights.forms:HUGGING_FACE",
    "pytorch_model.bin.index.json": "launcher.weights.forms:TORCH",
    "param_name_map.json": "launcher.mindspore.complete_weights:FORM",
}
"""Name of the index beside complete weights: a `CompleteForm`."""

SAVE_FORMATS: dict[str, str] = {
    "huggingface": "launcher.weights.forms:HUGGING_FACE",
    "mindspore": "launcher.mindspore.complete_weights:FORM",
}
"""Name of a format that complete weights can be exported to: a `CompleteForm`."""

RANK_FILES: dict[str, str] = {
    "slipway": "launcher.weights.ranks.distributed:slipway_opener",
    "": "launcher.mindspore.rank_weights:mindspore_opener",
}
"""Metadata key that marks rank files ("": none): (directory, strategy path, log) -> function that
opens the files of one save."""

STRATEGY_LAYOUTS: dict[str, str] = {
    "predict_strategy": "launcher.mindspore.slicing:strategy_layout",
}
"""Option that names a file with a target layout: (path, source, log) -> `RankLayout`."""

STRATEGY_WRITERS: dict[str, str] = {
    "all": "launcher.mindspore.strategy_export:write_all",
    "own": "launcher.mindspore.strategy_export:write_own",
}
"""What is written of the layout of a run, beside its checkpoints."""

SAVE_LIMITS: dict[str, str] = {
    "mindformers": "launcher.mindspore.meta:not_after_meta",
}
"""Limits, beyond file names, on which saves without a manifest a resume may take."""

INFERRED_STATES: dict[str, str] = {
    "mindformers": "launcher.mindspore.inferred_state:infer_state",
}
"""(run, checkpoint) -> the state of a run whose save has no state file."""

NAME_TRANSLATIONS: dict[str, str] = {
    r"embedding_weight$|word_embeddings\.weight$|\.(attention|feed_forward|self_attention)\.":
    "launcher.mindspore.naming.translation:with_keys",
}  # fmt: skip
"""What names of tensors of another program contain, and maybe others too: (source, content of
config.json, keys of the configuration, log) -> the source under Hugging Face names, or itself."""

JOINED_MODULES: dict[str, str] = {
    "glm": "models.families.glm:JOINED",
    "glm4": "models.families.glm:JOINED",
}
"""`model_type` to the modules that are one in files and several in the model
(`launcher.weights.joined`)."""

NAME_WRITERS: dict[str, str] = {
    "mindspore": "launcher.mindspore.naming.writing:as_written",
}
"""Format of complete weights to what gives tensors the names that programs of it read: (source
under Hugging Face names, content of config.json, options, log) -> source."""

RUN_NUMBERS: dict[str, str] = {
    "mindspore": "launcher.mindspore.hyper_param:numbers_of",
}
"""Format of complete weights to the numbers of a run that lie beside them: (content of the state
file, epoch) -> parts of `hyper_param.safetensors`."""

MODEL_CONFIGS: dict[str, str] = {
    "yaml": "launcher.mindspore.naming.configs:config_of_yaml",
}
"""Extension of a file that describes a model as config.json does: path -> content of the latter."""

MODEL_NAMES: dict[str, str] = {
    "other programs": "launcher.weights.reading.mismatch:FOREIGN",
    "mindformers": "launcher.mindspore.foreign:FOREIGN",
}
"""Tables of tensor names by which weights of other programs are recognised."""

KEYS_WITHOUT_EFFECT: dict[str, str] = {
    "mindformers": "launcher.mindspore.keys_without_effect:KEYS_WITHOUT_EFFECT",
}
"""Tables of keys of other programs that are accepted and do nothing: section ->
reason -> key -> type."""

KEY_CHOICES: dict[str, str] = {
    "mindformers": "launcher.mindspore.keys_without_effect:CHOICES",
}
"""Dotted key of such a table to the values it may have."""

KEYS_NOT_BUILT: dict[str, str] = {
    "mindformers": "launcher.mindspore.keys_not_built:KEYS_NOT_BUILT",
}
"""Tables of keys that are known and refused: section -> advice -> key -> type and
harmless values."""

CALLBACKS_NOT_BUILT: dict[str, str] = {
    "mindformers": "launcher.mindspore.keys_not_built:CALLBACKS_NOT_BUILT",
}
"""Types of callbacks that are known and refused."""

ROW_LOADERS: dict[str, str] = {
    "BlendedMegatronDatasetDataLoader": "launcher.data.megatron.loader:MEGATRON_LOADER",
    "TokenFileDataLoader": "launcher.data.token_files.loader:TOKEN_FILE_LOADER",
    "MindDataset": "launcher.mindspore.mindrecord.dataset:LOADER",
}
"""Name of a `data_loader.type` whose files hold tokens already: a `RowLoader`."""

DATA_CHECKS: dict[str, str] = {
    "BlendedMegatronDatasetDataLoader": "launcher.data.megatron.checks:check_loader",
    "TokenFileDataLoader": "launcher.data.token_files.checks:check_loader",
    "MindDataset": "launcher.mindspore.mindrecord.checks:check_loader",
}
"""Name of a `data_loader.type` to the rules about its section and the headers of its files, before
anything heavy is imported: (check, key of the section, section) -> problems."""

TOKEN_READERS: dict[str, str] = {
    "mindrecord": "launcher.mindspore.mindrecord.documents:token_arrays",
}
"""Kind of file with tokens that tools convert: (paths, column, log) -> one array a row."""

PROMPT_TEMPLATES: dict[str, str] = {
    "mindformers_alpaca": "launcher.mindspore.prompts:ALPACA",
    "mindformers_code_alpaca": "launcher.mindspore.prompts:CODE_ALPACA",
}
"""Name of a `data_loader.prompt_template`: a `PromptTemplate`."""

TOKENIZER_TYPES: dict[str, str] = {
    "Qwen2Tokenizer": "launcher.mindspore.tokenizers.types:qwen2",
    "LlamaTokenizer": "launcher.mindspore.tokenizers.types:llama",
    "LlamaTokenizerFast": "launcher.mindspore.tokenizers.types:llama_fast",
    "Llama3Tokenizer": "launcher.mindspore.tokenizers.types:llama3",
    "ChatGLM4Tokenizer": "launcher.mindspore.tokenizers.types:glm4",
    "TelechatTokenizer": "launcher.mindspore.tokenizers.types:telechat",
}
"""Type of a tokenizer given by its files: (key of the section -> file) -> `TokenizerParts`."""

KEY_ALIASES: dict[str, str] = {
    "mindformers": "launcher.mindspore.key_aliases:ALIASES",
}
"""Tables from a second name of a key to the key."""

TRANSLATIONS: dict[str, str] = {
    "words for null": "launcher.mindspore.sections.nulls:translate",
    "eager style": "launcher.mindspore.sections.eager:translate",
    "general keys": "launcher.mindspore.sections.general:translate",
    "determinism": "launcher.mindspore.sections.determinism:translate",
    "adapters": "launcher.mindspore.sections.adapters:translate",
    "training": "launcher.mindspore.sections.training:translate",
    "layout": "launcher.mindspore.sections.layout:translate",
    "data": "launcher.mindspore.sections.data:translate",
    "model": "launcher.mindspore.model_section.section:translate",
}
"""Translations of configurations of other programs, in order: functions over a
`launcher.config.draft.Draft`."""

TRANSLATED_MODEL_KEYS: dict[str, str] = {
    "mindformers": "launcher.mindspore.model_section.section:KEYS",
}
"""Keys of `model.model_config` that a translation understands, for suggestions."""

PYTHON_CALLS: dict[str, str] = {
    "unified_safetensors": "launcher.weights.offline.merge:unified_safetensors",
    "ckpt_to_safetensors": "launcher.weights.offline.convert:ckpt_to_safetensors",
    "safetensors_to_ckpt": "launcher.weights.offline.convert:safetensors_to_ckpt",
    "verify": "launcher.weights.offline.inspection:verify",
    "list_checkpoints": "launcher.weights.offline.listing:list_checkpoints",
    "export_directory": "launcher.weights.offline.directory:export_directory",
    "export_adapter": "launcher.weights.offline.adapter:export_adapter",
    "merge_adapter": "launcher.weights.offline.adapter:merge_adapter",
    "diff": "launcher.weights.offline.compare:diff",
    "load_distributed_checkpoint": "launcher.mindspore.slicing:load_distributed_checkpoint",
    "merge_pipeline_strategys": "launcher.mindspore.strategy_files:merge_pipeline_strategys",
}
"""Functions that `launcher.weights` offers to Python code."""


@cache
def _attribute(entry: str) -> Any:
    """What an entry names; None where its package was removed."""
    module, _, attribute = entry.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return None


def installed(table: Mapping[Key, str]) -> dict[Key, Any]:
    """What the entries of `table` name, without those whose package was removed."""
    found = {key: _attribute(entry) for key, entry in table.items()}
    return {key: value for key, value in found.items() if value is not None}


def required(table: Mapping[Key, str], key: Key, what: str) -> Any:
    """What the entry `key` of `table` names. Raises `UserError` where it is missing; `what` names
    what needs it."""
    value = _attribute(table[key]) if key in table else None
    if value is None:
        package = table[key].partition(":")[0].rpartition(".")[0] if key in table else ""
        raise UserError(
            what,
            rule="this installation has no support for it"
            + (f": the package {package} was removed" if package else ""),
            nearest="Possible here: complete Hugging Face weights, and checkpoints of Slipway",
            advice="Install Slipway with launcher/mindspore, or convert the files first",
        )
    return value
