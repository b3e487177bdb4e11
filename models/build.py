"""Building models from a ModelSpec, on the meta device or a real one.

Owns the way from description to module, for our decoder and for the transformers modules, and the
few facts about a module that other rooms ask for: its blocks, its names in files, its size, the
files beside its weights. Invariant: `links_of` says what parameters and persistent buffers are in a
Hugging Face directory of the model.
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
from models.initial import initial_std, initialize_shard, no_weight_decay
from models.json_floats import tagged_floats
from models.plan import EMBEDDING, rule_of
from models.spec import ModelSpec
from models.transformers_model import TransformersModel, build_transformers, complete_config

__all__ = [
    "blocks", "build_model", "hf_directory_files", "ignorable", "initial_std", "initialize",
    "initialize_shard", "mappings_of", "materialize", "may_be_missing", "named_as_model",
    "no_weight_decay", "parameter_count", "retie", "tied_names",
]  # fmt: skip

MODEL_FILES = (*TOKENIZER_FILES, *TOKENIZER_EXTRA_FILES, "generation_config.json")
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates beside the default one, as transformers saves them."""


def build_model(
    spec: ModelSpec, *, dtype: torch.dtype, device: torch.device | str = "meta"
) -> nn.Module:
    """The model of `spec` with parameters of `dtype`; on the meta device unless told otherwise.

    On a real device the parameters are allocated and their values undefined: fill them with
    `initialise` or with weights. Either way the module's forward has the signature of
    `Decoder.forward`. Raises LookupError for a parameter that its family has no rule for.
    """
    if spec.decoder is None:
        model: nn.Module = build_transformers(spec, dtype)
    else:
        with torch.device("meta"):
            model = Decoder(spec.decoder, spec.precision)
        for name in model.state_dict():
            rule_of(name, spec.decoder.parameters)
        # Not .to(dtype): buffers keep the dtype they have.
        model._apply(lambda t: t.to(dtype) if isinstance(t, nn.Parameter) else t)
    if torch.device(device).type != "meta":
        materialize(model, device)
    return model


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Allocate what is still on the meta device, move the rest, and tie again what was tied.

    Values of parameters are undefined; buffers of ours begin with zeros.
    """

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        make = torch.empty_like if isinstance(tensor, nn.Parameter) else torch.zeros_like
        return make(tensor, device=device)

    model._apply(real)
    retie(model)


def initialize(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill every parameter of a whole (not sharded) model with its initial values, and buffers of
    ours with zeros."""
    if isinstance(model, Decoder):
        for buffer in model.buffers():
            buffer.zero_()
    whole_shards = {
        name: Shard(tuple(p.shape), full_box(tuple(p.shape)), p.detach())
        for name, p in model.named_parameters()
    }
    for name, shard in mapped(whole_shards, mappings_of(model)).items():
        box = shard.box
        values = initialize_shard(name, shard.shape, box.offset, box.size, spec, seed)
        shard.tensor.copy_(values)


def mappings_of(model: nn.Module) -> MappingsOf:
    """What the tensors of `model` are in a Hugging Face directory."""
    if isinstance(model, TransformersModel):
        mappings = model.mappings
        return lambda name, shape: mappings.get(name)
    return names.mappings_of(model.config.parameters) if isinstance(model, Decoder) else no_mapping


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names in files that stand for another parameter, to that parameter's name in files:
    `lm_head.weight` to the embedding's.

    Files may hold either or both; `named_parameters()` holds only the latter.
    """
    if isinstance(model, TransformersModel):
        held = {id(parameter): name for name, parameter in model.named_parameters()}
        tied = [
            (name, held[id(model.get_parameter(name))])
            for pair in model.tied_names().items() for name in pair
        ]  # fmt: skip
        return {
            model.name_in_files(alias): model.name_in_files(name)
            for alias, name in tied if alias != name
        }  # fmt: skip
    if isinstance(model, Decoder) and model.config.tie_word_embeddings:
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return {}


def input_embedding(model: nn.Module) -> nn.Parameter | None:
    """The table of the tokens that go in; None where a stage of a pipeline has none."""
    if isinstance(model, TransformersModel):
        table: nn.Parameter = model.wrapped.get_input_embeddings().weight
        return table
    return dict(model.named_parameters()).get(EMBEDDING)


def named_as_model(source: Source, model: nn.Module, expected: Collection[str]) -> Source:
    """`source` with the names of the files of `model`, where they are of its base model alone:
    `wte.weight` is `transformer.wte.weight` then. `expected`: all names in files."""
    prefix = model.base_prefix() if isinstance(model, TransformersModel) else "model"
    return source.renamed(names.of_base_model(source.tensors, expected, prefix))


def ignorable(
    model: nn.Module, spec: ModelSpec, expected: Collection[str]
) -> Callable[[str, Shape, str], bool]:
    """Whether a tensor of files that is not among the `expected` ones is known and not wanted, by
    (name, shape, dtype in safetensors): modules that predict further tokens, what the class of the
    model declares, and buffers of older classes. No weight of another layer ever is."""
    places = {names.in_any_layer(name) for name in expected}

    def is_ignorable(name: str, shape: Shape, dtype: str) -> bool:
        elsewhere = names.in_any_layer(name) in places
        declared = isinstance(model, TransformersModel) and model.declares_ignorable(
            name, len(shape), is_parameter_elsewhere=elsewhere
        )
        obsolete = not elsewhere and is_obsolete(name, shape, dtype)
        unbuilt = names.is_multi_token_prediction(name, spec) or names.is_empty_expert(name, spec)
        return declared or obsolete or unbuilt

    return is_ignorable


def may_be_missing(model: nn.Module, name: str) -> bool:
    """Whether the class of the model declares that files may do without one of its tensors."""
    return isinstance(model, TransformersModel) and model.may_be_missing(name)


def retie(model: nn.Module) -> None:
    """Tie again after parameters were replaced (materialised, sharded), and make sure that it took.

    The decoder of ours has no parameter to tie: nothing to do.
    """
    if isinstance(model, TransformersModel):
        model.retie()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: what FSDP shards one by one."""
    if isinstance(model, Decoder):
        return list(model.model.layers.values())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(
        max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()), default=[])
    )


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def hf_directory_files(
    spec: ModelSpec, source_dir: Path | str | None, *, dtype: torch.dtype | str | None = None
) -> dict[str, bytes]:
    """What belongs beside exported weights: config.json, and tokenizer and generation files of
    `source_dir`. Names may have a folder in them.

    `dtype` is that of the exported weights; None keeps what config.json said.
    """
    config = dict(spec.hf_config)
    if spec.decoder is None:
        config = complete_config(spec).to_diff_dict() | {"model_type": spec.family}
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0  # those modules are not among the weights
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    content = json.dumps(tagged_floats(config), indent=2, sort_keys=True)
    files = {"config.json": f"{content}\n".encode()}
    if source_dir is not None:
        if not Path(source_dir).is_dir():
            raise UserError(
                f"{source_dir} is not a directory",
                advice="Name the directory with the tokenizer files",
            )
        templates = sorted(Path(source_dir, NAMED_TEMPLATES).glob("*.jinja"))
        for name in (*MODEL_FILES, *(f"{NAMED_TEMPLATES}/{path.name}" for path in templates)):
            path = Path(source_dir, name)
            if path.is_file():
                files[name] = path.read_bytes()
    return files
