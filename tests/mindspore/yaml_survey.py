"""MindFormers' own YAML files, with nothing but paths and the prompt replaced.

Owns what replaces them: a tokenizer, weights in the format and for the processes that a file
asserts, a corpus, and a Hugging Face directory of the family that the file is for, of its published
sizes but without its tensors, which no check of a configuration reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import yaml

from launcher.config import rules
from launcher.config.command_line import parse
from launcher.config.resolve import resolve_command_line
from launcher.environment import PLANNED_WORLD_SIZE
from launcher.errors import Problem, UserError
from tests.config.weight_files import safetensors
from tests.data.megatron.cases import GOLDEN
from tests.data.mindrecord_writer import write_mindrecord

TABLE = Path(__file__).parent / "fixtures" / "mindformers_files.tsv"
TOKENIZER_FILES = TABLE.parent / "tokenizers"
TOKENIZERS = {
    "LlamaTokenizer": "unigram.model",
    "TelechatTokenizer": "telechat.model",
    "Llama3Tokenizer": "tiktoken.model",
    "ChatGLM4Tokenizer": "tiktoken.model",
}
"""Class -> its `vocab_file`; the others have JSON files."""

BUILT = frozenset("RHG")
"""Needs of the table that are met by now."""
READERS = frozenset[str]()
"""Needs that readers of data cover that are not built yet."""

MEGATRON = "BlendedMegatronDatasetDataLoader"
_NO_CONFIGURATION = (".jenkins", ".readthedocs.yaml", "layer_mapping.yaml")
_DEGREES = ("data_parallel", "model_parallel", "pipeline_stage", "context_parallel")
_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
_GROUPS = {
    "n_routed_experts": 256, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
}  # fmt: skip
HUB: dict[str, dict[str, Any]] = {
    "qwen2": _LLAMA | {"head_dim": None},
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA | _EXPERTS | {"num_experts": 128, "hidden_size": 2048},
    "glm4": _LLAMA | {"attention_bias": True},
    "glm4_moe": _LLAMA | _EXPERTS | _GROUPS | {"num_hidden_layers": 46, "n_group": 1,
                                              "topk_group": 1},
    "deepseek_v3": _LLAMA | _EXPERTS | _GROUPS | {
        "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "head_dim": None, "vocab_size": 129280, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
}  # fmt: skip
"""Family -> sizes of config.json."""
_FAMILIES = {
    "deepseek": "deepseek_v3", "qwen3_moe": "qwen3_moe", "qwen3_30b": "qwen3_moe",
    "moe_template": "qwen3_moe", "glm4_moe": "glm4_moe", "glm4": "glm4", "qwen2": "qwen2",
}  # fmt: skip
"""What the path of a file says of its family; otherwise it is qwen3."""


@dataclass(frozen=True)
class Known:
    """A row of the table of MindFormers' files."""

    snapshots: str
    needs: frozenset[str]

    @property
    def level(self) -> int:
        """1: accepted now. 2: with the readers of data. 3: it needs more."""
        return 1 if self.needs <= BUILT else 2 if self.needs <= BUILT | READERS else 3


def known_files() -> dict[str, Known]:
    """The table: path in a checkout -> what the file needs."""
    rows = [line.split("\t") for line in TABLE.read_text().splitlines() if line[0] != "#"]
    return {path: Known(where, frozenset(needs.replace("-", "").split()) - BUILT)
            for path, where, _, needs in rows}  # fmt: skip


def configurations(folder: Path) -> list[Path]:
    """The YAML files of a checkout that are configurations."""
    files = sorted(folder.rglob("*.yaml"))
    return [file for file in files if not any(part in str(file) for part in _NO_CONFIGURATION)]


class Materials:
    """A folder with what paths are replaced by; made where it is needed."""

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        (folder / "corpus").mkdir(parents=True)
        (folder / "corpus" / "a.txt").write_text("some text\n")

    def corpus(self) -> str:
        """A folder of text."""
        return str(self.folder / "corpus")

    def records(self, columns: Sequence[str]) -> str:
        """A MindRecord file with these columns."""
        path = self.folder / "-".join(columns) / "some.mindrecord"
        if not path.exists():
            path.parent.mkdir()
            schema = {name: ("int32", [-1]) for name in columns}
            write_mindrecord(path, schema, [{key: [1, 2, 3] for key in columns}])
        return str(path)

    def indexed(self) -> str:
        """A dataset of Megatron, by its path without extension."""
        return str(GOLDEN / "a_int32")

    def hub(self, file: Path) -> str:
        """A directory as from the hub, of the family that `file` is for."""
        name = next((f for word, f in _FAMILIES.items() if word in str(file).lower()), "qwen3")
        folder = self.folder / "hub" / name
        if not folder.exists():
            shutil.copytree(self.tokenizer, folder)
            config = {key: value for key, value in HUB[name].items() if value is not None}
            (folder / "config.json").write_text(json.dumps({"model_type": name, **config}))
            safetensors(folder / "model.safetensors")
        return str(folder)

    def tokenizer_file(self, kind: str, name: str) -> str:
        """A file of a tokenizer of this class."""
        if kind in TOKENIZERS:
            return str(TOKENIZER_FILES / TOKENIZERS[kind])
        whole = self.tokenizer / "tokenizer.json"
        if kind != "Qwen2Tokenizer":
            return str(whole)
        model = json.loads(whole.read_text())["model"]
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (self.folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (self.folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]))
        return str(self.folder / ("merges.txt" if name == "merges_file" else "vocab.json"))

    def weights(self, form: str, ranks: int) -> str:
        """Complete weights, or the rank folders of so many processes."""
        folder = self.folder / f"{form}{ranks}"
        if not folder.exists():
            for rank in range(ranks):
                place = folder if ranks == 1 else folder / f"rank_{rank}"
                name = "model" if ranks == 1 else f"x_rank_{rank}-1_1"
                place.mkdir(parents=True)
                if form == "ckpt":
                    (place / f"{name}.ckpt").write_bytes(_ckpt())
                else:
                    safetensors(place / f"{name}.safetensors")
        return str(folder)


def _ckpt() -> bytes:
    """A file of MindSpore with one parameter of two numbers, as protobuf."""
    tensor = b"\x08\x02" + b"\x12\x07Float32" + b"\x1a\x08" + bytes(8)
    value = b"\x0a\x01w" + b"\x12" + bytes([len(tensor)]) + tensor
    return b"\x0a" + bytes([len(value)]) + value


def processes(content: dict[str, Any]) -> int:
    """The number of processes that a configuration asks for."""
    if "training" in content:
        parts = content.get("parallelism") or {}
        names = ("tensor_parallel", "context_parallel", "pipeline_parallel", "expert_parallel")
        return prod(int(parts.get(name) or 1) for name in names)
    parts = content.get("parallel_config") or {}
    if content.get("use_parallel") is False or not isinstance(parts, dict):
        return 1
    return prod(value for name in _DEGREES if isinstance(value := parts.get(name, 1), int))


def replaced(file: Path, content: dict[str, Any], materials: Materials) -> list[str]:
    """The command line that gives the paths and the prompt of a file."""
    flags: dict[str, str] = {}
    mode = content.get("run_mode")
    if mode == "predict":
        flags["predict_data"] = "I love Beijing, because"
    if "pretrained_model_dir" in content:
        flags["pretrained_model_dir"] = materials.hub(file)
    if content.get("load_checkpoint") or (
        mode in ("predict", "finetune") and "pretrained_model_dir" not in content
    ):
        form = "ckpt" if content.get("load_ckpt_format", "ckpt") == "ckpt" else "safetensors"
        one = content.get("auto_trans_ckpt") is not False
        flags["load_checkpoint"] = materials.weights(form, 1 if one else processes(content))
    flags |= {**_tokenizer(content, materials), **dict(_data(content, materials))}
    if content.get("src_strategy_path_or_dir"):
        flags["src_strategy_path_or_dir"] = materials.corpus()
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def _tokenizer(content: dict[str, Any], materials: Materials) -> dict[str, str]:
    """The files of the tokenizer that a configuration names, by its class."""
    section = (content.get("processor") or {}).get("tokenizer") or {}
    prefix = "processor.tokenizer"
    if "vocab_file" not in section and "tokenizer_file" not in section:
        given = {f"{prefix}.pretrained_model_dir": str(materials.tokenizer)}
        return given if "processor" in content else {}
    return {
        f"{prefix}.{name}": materials.tokenizer_file(str(section.get("type")), name)
        for name in ("vocab_file", "merges_file", "tokenizer_file") if name in section
    }  # fmt: skip


def _data(content: dict[str, Any], materials: Materials) -> Iterator[tuple[str, str]]:
    for section in ("train_dataset", "eval_dataset"):
        inner = content.get(section)
        for name in ("data_loader", "dataloader"):
            loader = inner.get(name) if isinstance(inner, dict) else None
            if isinstance(loader, dict) and loader.get("type") == MEGATRON:
                paths = f"['1', '{materials.indexed()}']"
                yield f"{section}.{name}.config.data_path", paths
            elif isinstance(loader, dict):
                named = [key for key in ("dataset_dir", "dataset_files", "data_files")
                         if key in loader]  # fmt: skip
                for key in named or ["dataset_dir"]:
                    records = loader.get("type") == "MindDataset"
                    columns = inner.get("input_columns") or ["input_ids"]
                    place = materials.records(columns) if records else materials.corpus()
                    yield f"{section}.{name}.{key}", place


def problems(file: Path, materials: Materials, environment: Any) -> Sequence[Problem]:
    """What is wrong with a file whose paths are replaced. `environment`: pytest's monkeypatch."""
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError:
        content = {}
    environment.setenv(PLANNED_WORLD_SIZE, str(processes(content)))
    argv = ["--config", str(file), "--check_config", *replaced(file, content, materials)]
    try:
        resolved = resolve_command_line(parse(argv))
        found = rules.check(
            resolved.config, resolved.provenance, world=rules.planned_world_size(),
            bad_keys=resolved.bad_keys,
        )  # fmt: skip
    except UserError as error:
        return error.problems
    if not (resolved.problems or found):
        rules.warnings(resolved.config, resolved.provenance)
    return (*resolved.problems, *found)
