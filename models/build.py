"""Building models from a ModelSpec, on the meta device or a real one.

Owns the step from description to module, for the native decoder and for transformers modules, and
the properties of a module that other packages need: its blocks, its names in files, its size, the
files next to its weights. Invariant: `mappings_of` maps parameters and persistent buffers to the
tensors of a Hugging Face directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn

from launcher.errors import UserError
from launcher.layout.box import Shape, full_box
from launcher.layout.shard import Shard
from launcher.weights.formats.tokenizer_files import TOKENIZER_EXTRA_FILES, TOKENIZER_FILES
from launcher.weights.obsolete import is_obsolete
from launcher.weights.source import Source
from launcher.weights.tensor_mapping import MappingsOf, mapped, no_mapping
from models import names
from models.decoder import Decoder
from models.families.table import DECODERS
from models.initial import initial_std, initialize_shard, no_weight_decay
from models.initialize import fill_initial
from models.json_floats import tagged_floats
from models.lora import attach_adapters
from models.plan import EMBEDDING, rule_of
from models.spec import ModelSpec
from models.transformers_model import TransformersModel, build_transformers, complete_config

__all__ = [
    "blocks", "build_model", "fill_initial", "hf_directory_files", "ignorable", "initial_std",
    "initialize", "initialize_shard", "mappings_of", "materialize", "may_be_missing",
    "named_as_model", "no_weight_decay", "parameter_count", "retie", "tied_names",
]  # fmt: skip

MODEL_FILES = (*TOKENIZER_FILES, *TOKENIZER_EXTRA_FILES, "generation_config.json")
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates other than the default one, as transformers saves them."""


def build_model(
    spec: ModelSpec, *, dtype: torch.dtype, device: torch.device | str = "meta"
) -> nn.Module:
    """The model of `spec` with parameters of `dtype`; by default on the meta device.

    On a real device the parameters are allocated and uninitialized: fill them with `initialize` or
    with weights. The module's forward has the signature of `Decoder.forward`. Raises LookupError
    for a parameter without a rule of its family.
    """
    if spec.decoder is None:
        model: nn.Module = build_transformers(spec, dtype)
    else:
        with torch.device("meta"):
            model = Decoder(spec.decoder, spec.precision)
        for name in model.state_dict():
            rule_of(name, spec.decoder.parameters)
        # Not .to(dtype): buffers keep their dtype.
        model._apply(lambda t: t.to(dtype) if isinstance(t, nn.Parameter) else t)
    attach_adapters(model, spec, dtype)
    if torch.device(device).type != "meta":
        materialize(model, device)
    return model


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Allocate what is on the meta device, move the rest to `device`, and restore tied weights.

    Allocated parameters are uninitialized, allocated buffers zeros.
    """

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        make = torch.empty_like if isinstance(tensor, nn.Parameter) else torch.zeros_like
        return make(tensor, device=device)

    model._apply(real)
    retie(model)


def initialize(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Initialize every parameter of an unsharded model; buffers of a `Decoder` become zeros."""
    if isinstance(model, Decoder):
        for buffer in model.buffers():
            buffer.zero_()
    full_shards = {
        name: Shard(tuple(p.shape), full_box(tuple(p.shape)), p.detach())
        for name, p in model.named_parameters()
    }
    fill_initial(mapped(full_shards, mappings_of(model)), spec, seed)


def mappings_of(model: nn.Module) -> MappingsOf:
    """The mapping from tensors of `model` to those of a Hugging Face directory."""
    if isinstance(model, TransformersModel):
        mappings = model.mappings
        return lambda name, shape: mappings.get(name)
    return names.mappings_of(model.config.parameters) if isinstance(model, Decoder) else no_mapping


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names in files of tied weights -> name in files of their source: `lm_head.weight` -> the
    embedding's.

    Files may hold either or both; `named_parameters()` has only the latter.
    """
    if isinstance(model, TransformersModel):
        by_id = {id(parameter): name for name, parameter in model.named_parameters()}
        tied = [
            (name, by_id[id(model.get_parameter(name))])
            for pair in model.tied_names().items() for name in pair
        ]  # fmt: skip
        return {
            model.name_in_files(alias): model.name_in_files(name)
            for alias, name in tied if alias != name
        }  # fmt: skip
    if isinstance(model, Decoder) and model.config.tie_word_embeddings:
        rules = model.config.parameters
        return {names.in_files("lm_head.weight", rules): names.in_files(EMBEDDING, rules)}
    return {}


def input_embedding(model: nn.Module) -> nn.Parameter | None:
    """The weight of the input embedding; None in a pipeline stage without it."""
    if isinstance(model, TransformersModel):
        table: nn.Parameter = model.wrapped.get_input_embeddings().weight
        return table
    return dict(model.named_parameters()).get(EMBEDDING)


def named_as_model(source: Source, model: nn.Module, expected: Collection[str]) -> Source:
    """`source` with the prefix of the base model added if its files lack it: `wte.weight` becomes
    `transformer.wte.weight`. `expected`: all names in files."""
    prefix = "model"
    if isinstance(model, TransformersModel):
        prefix = model.base_prefix()
    elif isinstance(model, Decoder):
        prefix = names.in_files(EMBEDDING, model.config.parameters).partition(".")[0]
    return source.renamed(names.of_base_model(source.tensors, expected, prefix))


def ignorable(
    model: nn.Module, spec: ModelSpec, expected: Collection[str]
) -> Callable[[str, Shape, str], bool]:
    """A function of (name, shape, dtype in safetensors): whether a tensor of files that is not
    `expected` may be ignored. These are multi-token prediction modules, tensors that the class of
    the model declares, and buffers of older versions; never a weight of a further layer."""
    known = {names.in_any_layer(name) for name in expected}

    def is_ignorable(name: str, shape: Shape, dtype: str) -> bool:
        elsewhere = names.in_any_layer(name) in known
        declared = isinstance(model, TransformersModel) and model.declares_ignorable(
            name, len(shape), is_parameter_elsewhere=elsewhere
        )
        obsolete = not elsewhere and is_obsolete(name, shape, dtype)
        unbuilt = names.is_multi_token_prediction(name, spec) or names.is_empty_expert(name, spec)
        return declared or obsolete or unbuilt

    return is_ignorable


def may_be_missing(model: nn.Module, name: str) -> bool:
    """Whether a tensor may be missing in files, as the class of the model declares."""
    return isinstance(model, TransformersModel) and model.may_be_missing(name)


def retie(model: nn.Module) -> None:
    """Restore tied weights after parameters were replaced (materialized, sharded).

    No-op for a `Decoder`, which has no tied parameters.
    """
    if isinstance(model, TransformersModel):
        model.retie()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: the units of FSDP."""
    if isinstance(model, Decoder):
        return list(model.model.layers.values())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(
        max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[])
    )


def parameter_count(model: nn.Module) -> int:
    """Number of elements of all parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def hf_directory_files(
    spec: ModelSpec, source_dir: Path | str | None, *, dtype: torch.dtype | str | None = None
) -> dict[str, bytes]:
    """The files next to exported weights, by name: config.json, and tokenizer and generation files
    of `source_dir`. Names may contain a folder.

    `dtype` is that of the exported weights; None keeps that of config.json.
    """
    config = dict(spec.hf_config)
    if spec.decoder is None:
        config = complete_config(spec).to_diff_dict() | {"model_type": spec.family}
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0  # those modules are not among the weights
    own = DECODERS.get(spec.family)
    if own is not None:
        config = {own.config_keys.get(key, key): value for key, value in config.items()}
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    content = json.dumps(tagged_floats(config), indent=2, sort_keys=True)
    files = {"config.json": f"{content}\n".encode()}
    if source_dir is not None:
        if not Path(source_dir).is_dir():
            raise UserError(
                f"{source_dir} is not a directory",
                advice="Give the directory with the tokenizer files",
            )
        templates = sorted(Path(source_dir, NAMED_TEMPLATES).glob("*.jinja"))
        for name in (*MODEL_FILES, *(f"{NAMED_TEMPLATES}/{path.name}" for path in templates)):
            path = Path(source_dir, name)
            if path.is_file():
                files[name] = path.read_bytes()
    return files
