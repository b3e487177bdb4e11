"""Building models from a ModelSpec, on the meta device or a real one.

Owns the way from description to module, for our decoder and for the transformers modules, and the
few facts about a module that other rooms ask for: its blocks, its tied names, its size, the files
beside its weights. Invariant: `named_parameters()` and persistent buffers have the names that a
Hugging Face directory of the model has on disk, but for stacked experts (`models.names`).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from launcher.errors import UserError
from launcher.weights.links import LinksOf, no_links
from models import names
from models.decoder import Decoder
from models.initial import initial_std, initialise_shard, no_weight_decay
from models.spec import ModelSpec
from models.transformers_model import TransformersModel, build_transformers, complete_config

__all__ = [
    "blocks", "build_model", "hf_directory_files", "initial_std", "initialise", "initialise_shard",
    "links_of",    "materialise", "no_weight_decay", "parameter_count", "retie", "tied_names",
]  # fmt: skip

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip


def build_model(
    spec: ModelSpec, *, dtype: torch.dtype, device: torch.device | str = "meta"
) -> nn.Module:
    """The model of `spec` with parameters of `dtype`; on the meta device unless told otherwise.

    On a real device the parameters are allocated and their values undefined: fill them with
    `initialise` or with weights. Either way the module's forward has the signature of
    `Decoder.forward`.
    """
    if spec.decoder is None:
        model: nn.Module = build_transformers(spec, dtype)
    else:
        with torch.device("meta"):
            model = Decoder(spec.decoder, spec.precision)
        # Not .to(dtype): buffers keep the dtype they have.
        model._apply(lambda t: t.to(dtype) if isinstance(t, nn.Parameter) else t)
    if torch.device(device).type != "meta":
        materialise(model, device)
    return model


def materialise(model: nn.Module, device: torch.device | str) -> None:
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


def initialise(model: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Fill every parameter of a whole (not sharded) model with its initial values, and buffers of
    ours with zeros."""
    with torch.no_grad():
        if isinstance(model, Decoder):
            for buffer in model.buffers():
                buffer.zero_()
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(initialise_shard(name, shape, (0,) * len(shape), shape, spec, seed))


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names that stand for another parameter, to that parameter's name: `lm_head.weight` to the
    embedding's.

    Files may hold either or both; `named_parameters()` holds only the latter.
    """
    if isinstance(model, TransformersModel):
        return model.tied_names()
    if isinstance(model, Decoder) and model.config.tie_word_embeddings:
        return {"lm_head.weight": "model.embed_tokens.weight"}
    return {}


def links_of(model: nn.Module) -> LinksOf:
    """What the tensors of `model` are in a Hugging Face directory."""
    return names.links if isinstance(model, Decoder) else no_links


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
    `source_dir`.

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
    files = {"config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}
    if source_dir is not None:
        if not Path(source_dir).is_dir():
            raise UserError(
                f"{source_dir} is not a directory",
                advice="Name the directory with the tokenizer files",
            )
        for name in TOKENIZER_FILES:
            path = Path(source_dir, name)
            if path.is_file():
                files[name] = path.read_bytes()
    return files
