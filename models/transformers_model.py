"""The transformers module of a family without a native decoder, behind the decoder's interface.

Owns the adapter: same forward signature, errors for what such a module does not support. Parameter
names are those of the module; `models.module_names` maps them to names in files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from launcher.errors import UserError
from models.documents import OnHost
from models.families import TRANSFORMERS_MODULES, supports_packing
from models.module_names import Mappings, mappings_of_module
from models.spec import ModelSpec


class TransformersModel(nn.Module):
    """A `...ForCausalLM` of transformers with the inputs and outputs of `Decoder`.

    Its children, parameters and buffers are those of the wrapped module. Its dropout uses torch's
    global generator, not `sample_seeds`: the training loop seeds that generator for each
    micro-batch. Packed documents are separated by positions that restart at 0, from which
    transformers builds its masks; only for families where a test has verified it.
    """

    wrapped: Any
    """The module of transformers."""

    def __init__(
        self, module: Any, *, mappings: Mappings, packing: bool, known_causal: bool = True
    ) -> None:
        super().__init__()
        # Bypasses nn.Module's __setattr__: the wrapped module must not become a child.
        object.__setattr__(self, "wrapped", module)
        self.mappings = mappings
        self._modules = dict(module._modules)
        self._parameters, self._buffers = module._parameters, module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.packing = packing
        self.known_causal = known_causal
        """False: the first forward checks that the module is causal."""
        self.family = str(module.config.model_type)

    def train(self, mode: bool = True) -> TransformersModel:
        super().train(mode)
        self.wrapped.training = mode
        return self

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_lengths: Tensor | OnHost | None = None,
        sample_seeds: Tensor | None = None,
        cache: None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """As `Decoder.forward`; `cache` is not supported (generation uses `wrapped.generate`), and
        `sample_seeds` have no effect. Attention is that of transformers, which finds documents by
        its `position_ids` and has a mask for them: `document_lengths` are not used."""
        arguments: dict[str, Any] = {}
        if document_ids is not None:
            self.check_packing()
            arguments["position_ids"] = (
                restarting_positions(document_ids) if position_ids is None else position_ids
            )
        elif position_ids is not None:
            arguments["position_ids"] = position_ids
        if attention_mask is not None:
            arguments["attention_mask"] = attention_mask.long()
        if not self.known_causal:
            self._check_causal(input_ids)
        logits = self._logits(input_ids, **arguments)
        return logits[:, -1:] if last_only else logits

    def _logits(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        logits: Tensor = self.wrapped(
            input_ids, use_cache=False, return_dict=True, **arguments
        ).logits
        return logits

    def _check_causal(self, input_ids: Tensor) -> None:
        """Raise UserError if the last of a few tokens changes the logits before it. Computed once,
        for model types that are not tested."""
        self.known_causal = True
        training, few = self.training, input_ids[:1, :16]
        other = few.clone()
        others = few[few != few[0, -1]]
        other[0, -1] = others[0] if len(others) else (few[0, -1] + 1) % 2
        self.eval()
        with torch.no_grad():
            before, after = (self._logits(ids)[:, :-1] for ids in (few, other))
        self.train(training)
        rounding = 1e-4 if before.dtype == torch.float32 else 3e-2
        if (before - after).abs().max() > rounding * before.abs().max():
            raise UserError(
                f"model type {self.family}",
                rule="not causal: a token attends to later ones, which training predicts",
                advice="Use a causal model",
            )

    def check_packing(self) -> None:
        """Raise UserError if this family cannot separate packed documents."""
        if not self.packing:
            raise UserError(
                f"train_dataset.packing = True with the model type {self.family}",
                rule="this family would attend across documents packed into one row",
                advice="Set train_dataset.packing: False",
            )

    def tied_names(self) -> dict[str, str]:
        """Target name -> source name of every tied parameter, in the module."""
        return dict(getattr(self.wrapped, "all_tied_weights_keys", None) or {})

    def name_in_files(self, name: str) -> str:
        """The name of a parameter that is one tensor in files."""
        return self.mappings[name][0].name if name in self.mappings else name

    def retie(self) -> None:
        """Replace every tied target by its source parameter."""
        for target, source in self.tied_names().items():
            owner, _, leaf = target.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(source))
            assert self.get_parameter(target) is self.get_parameter(source), target

    def base_prefix(self) -> str:
        """The name of the base model, without the head: files of the base model alone omit this
        prefix."""
        return str(getattr(self.wrapped, "base_model_prefix", ""))

    def declares_ignorable(self, name: str, dims: int, *, is_parameter_elsewhere: bool) -> bool:
        """Whether the class allows to ignore an unexpected tensor of files with this number of
        `dims`: by a pattern it declares, or as one of its non-persistent buffers, which may have
        been in another module (`rotary_emb.inv_freq` of a layer).

        `is_parameter_elsewhere`: in another layer the tensor of this name is a parameter. Then only
        patterns with a layer number count: `attn.bias` also matches `c_attn.bias`.
        """
        patterns = getattr(self.wrapped, "_keys_to_ignore_on_load_unexpected", None) or ()
        if is_parameter_elsewhere:
            patterns = [pattern for pattern in patterns if re.search(r"\d", pattern)]
        elif self._derived_buffers.get(".".join(name.split(".")[-2:])) == dims:
            return True
        return any(re.search(pattern, name) for pattern in patterns)

    @cached_property
    def _derived_buffers(self) -> dict[str, int]:
        """Module and name of non-persistent buffers -> number of dims: `rotary_emb.inv_freq`, 1."""
        return {
            f"{module_name.rpartition('.')[2]}.{name}": buffer.ndim
            for module_name, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        }

    def may_be_missing(self, name: str) -> bool:
        """Whether a tensor of the module may be missing in files, as its class declares. Buffers
        only: they are initialized, a parameter would not be."""
        patterns = getattr(self.wrapped, "_keys_to_ignore_on_load_missing", None) or ()
        is_declared = any(re.search(pattern, name) for pattern in patterns)
        return is_declared and name in dict(self.named_buffers())


def restarting_positions(document_ids: Tensor) -> Tensor:
    """Positions [rows, length] that restart at 0 with every document."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - (index * begins).cummax(dim=1).values


def build_transformers(spec: ModelSpec, dtype: torch.dtype) -> TransformersModel:
    """The module on the meta device, except its buffers. Raises UserError for what transformers
    cannot build."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = complete_config(spec)
    with init_empty_weights(include_buffers=False), _raised_as_user_error(spec):
        module = AutoModelForCausalLM.from_config(
            config, attn_implementation=_attention(config), dtype=dtype
        )
    model = TransformersModel(
        module,
        mappings=mappings_of_module(module),
        packing=supports_packing(spec),
        known_causal=spec.family in TRANSFORMERS_MODULES,
    )
    model.retie()  # moving parameters to the meta device unties them
    return model


def complete_config(spec: ModelSpec) -> Any:
    """The transformers config object, with the defaults of its class and its architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    content = {k: v for k, v in spec.hf_config.items() if k != "model_type"}
    with _raised_as_user_error(spec):
        config = AutoConfig.for_model(spec.family, **content)
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    _check_balance(spec, config)
    return config


def _check_balance(spec: ModelSpec, config: Any) -> None:
    """transformers adds the balance loss to its own loss, which is not used here."""
    if getattr(config, "output_router_logits", False):
        raise UserError(
            f"output_router_logits = True with the model type {spec.family}",
            rule="the balance loss of experts is supported for families with a native decoder only",
            advice="Set model.model_config.output_router_logits: False",
        )


@contextmanager
def _raised_as_user_error(spec: ModelSpec) -> Iterator[None]:
    """Report transformers' errors about invalid sizes as UserError, without a traceback."""
    try:
        yield
    except Exception as error:  # only code of transformers runs in here
        reason = " ".join(str(error).split())
        raise UserError(
            f"transformers cannot build a {spec.family} model from this model_config: {reason}"
        ) from error


def _attention(config: Any) -> str:
    """The attention implementation: SDPA if the family supports it."""
    from transformers import AutoModelForCausalLM

    module_class = AutoModelForCausalLM._model_mapping[type(config)]
    return "sdpa" if getattr(module_class, "_supports_sdpa", False) else "eager"
