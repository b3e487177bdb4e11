"""A job: the configuration, this process, and what follows from these alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from launcher.builders.layout import split_of
from launcher.builders.model_files import model_files
from launcher.config.derived import (
    TOKENIZER_FILE_KEYS,
    mesh_of,
    named_tokenizer_files,
    read_config_json,
    tokenizer_dir,
    ulysses_degree,
    uses_named_tokenizer,
)
from launcher.config.pet import adapter_of, lora_of
from launcher.config.provenance import Provenance
from launcher.config.schema import Config
from launcher.data.chat_rendering import ChatSettings, chat_settings
from launcher.data.named_tokenizer import build_named_tokenizer
from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.parallel.kernels import Kernels, choose_kernels
from launcher.parallel.meshes import Meshes
from launcher.parallel.world import World
from launcher.report.console import Console
from launcher.weights.adapters.found import FoundAdapter
from models.families import model_spec
from models.lora_config import with_adapters
from models.spec import ModelSpec
from models.stage import StageSplit

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Job:
    """What every mode starts from."""

    config: Config
    provenance: Provenance
    world: World
    console: Console

    def log(self, text: str) -> None:
        """Print a line, on the main process."""
        self.console.log(text)

    @property
    def output_dir(self) -> Path:
        """Root of everything the run writes."""
        return Path(self.config.output_dir)

    @cached_property
    def spec(self) -> ModelSpec:
        """The model, as described by config.json and the YAML."""
        spec = model_spec(self.config.model.model_config, self._config_json())
        for note in spec.notes:
            self.log(f"accepted, no effect: {note}")
        return with_adapters(
            spec, lora_of(self.config, spec.family, self.adapter), self.config.freeze
        )

    @cached_property
    def adapter(self) -> FoundAdapter | None:
        """The adapter on disk that the job starts from; None without one."""
        return adapter_of(self.config)

    def _config_json(self) -> dict[str, Any] | None:
        return read_config_json(self.config)

    @cached_property
    def mesh(self) -> Mesh:
        """The axes of the job and their sizes."""
        return mesh_of(self.config)

    @cached_property
    def meshes(self) -> Meshes:
        """The torch meshes of the same axes, and their process groups."""
        return Meshes(self.mesh, self.world.device.type, ulysses=ulysses_degree(self.config))

    @cached_property
    def split(self) -> StageSplit | None:
        """The layers of each pipeline stage; None without a pipeline."""
        return split_of(self.config, self.spec)

    @cached_property
    def kernels(self) -> Kernels:
        """Which kernels the job may use on CUDA."""
        return choose_kernels(
            self.config.deterministic,
            own_decoder=self.spec.decoder is not None,
            trains=self.config.run_mode in (None, "train", "finetune"),
        )

    @cached_property
    def tokenizer_dir(self) -> str:
        """Folder of the tokenizer; empty when there is none."""
        return tokenizer_dir(self.config)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, checked against the vocabulary of the model."""
        files = named_tokenizer_files(self.config)
        section, folder = self.config.processor.tokenizer, self.tokenizer_dir
        if uses_named_tokenizer(self.config):
            names = ", ".join(str(path) for path in files.values())
            tokenizer = build_named_tokenizer(section, files)
            if self.config.pretrained_model_dir or section.pretrained_model_dir:
                self.log(f"tokenizer: built from {names}, not that of pretrained_model_dir")
        else:
            self._log_unused(files)
            tokenizer, names = self._opened_tokenizer(), folder
        vocabulary = self.spec.hf_config.get("vocab_size", len(tokenizer))
        if len(tokenizer) > vocabulary:
            raise UserError(
                f"the tokenizer in {names} has {len(tokenizer)} tokens",
                rule=f"the vocabulary of the model has {vocabulary}",
                nearest=f"Set model.model_config.vocab_size to {len(tokenizer)} or more",
            )
        return tokenizer

    @cached_property
    def chat(self) -> ChatSettings:
        """How conversations are rendered, in training and in predict. Raises `UserError`."""
        return chat_settings(self.config)

    def _log_unused(self, files: Mapping[str, Path]) -> None:
        """Log the keys of `processor.tokenizer` that a directory makes useless."""
        section = "processor.tokenizer"
        for key, path in files.items():
            if not path.is_file():
                self.log(f"tokenizer: that of {self.tokenizer_dir}; {section}.{key} = {path} does "
                         "not exist")  # fmt: skip
        names = [field.name for field in fields(self.config.processor.tokenizer)]
        others = [
            name for name in names
            if name not in (*TOKENIZER_FILE_KEYS, "pretrained_model_dir")
            and self.provenance.is_written(f"{section}.{name}")
        ]  # fmt: skip
        if others:
            self.log(f"accepted, no effect: {section}.{', '.join(others)}: the files in "
                     f"{self.tokenizer_dir} decide")  # fmt: skip

    def _opened_tokenizer(self) -> Any:
        """The tokenizer in `tokenizer_dir`."""
        from transformers import AutoTokenizer

        # It warns of model types that transformers does not know.
        logger = logging.getLogger("transformers.configuration_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return AutoTokenizer.from_pretrained(
                self.tokenizer_dir,
                trust_remote_code=self.config.trust_remote_code,
                local_files_only=True,
            )
        except Exception as error:  # the library assumes that its files are valid
            reason = (str(error) or repr(error)).splitlines()[0]
            expected = isinstance(error, OSError | ValueError)
            raise UserError(
                f"cannot open a tokenizer in {self.tokenizer_dir!r}",
                rule=reason if expected else f"{type(error).__name__}: {reason}",
                advice="Set processor.tokenizer.pretrained_model_dir to a Hugging Face tokenizer",
            ) from error
        finally:
            logger.setLevel(level)

    def model_files(self, dtype: torch.dtype | str | None) -> dict[str, bytes]:
        """The files next to exported weights of `dtype`, by name."""
        return model_files(self, dtype)

    def dtype(self, name: str | None, *, otherwise: torch.dtype) -> torch.dtype:
        """The torch dtype of a configured name."""
        return otherwise if name is None else DTYPES[name]

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of forward and backward: as configured, else bf16 on CUDA and fp32 on the CPU."""
        usual = torch.bfloat16 if self.world.device.type == "cuda" else torch.float32
        return self.dtype(self.spec.precision.compute_dtype, otherwise=usual)
