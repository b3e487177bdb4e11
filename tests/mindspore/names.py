"""Weights under names of MindFormers for tests: golden files, and rank folders cut from them.

Golden files are a few in `tests/fixtures/mindformers`, and all of them where a checkout has them.
Rank folders are cut here by `launcher.mindspore.tensor_layout`, whose rule is tested on files that
MindSpore wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from launcher.layout.box import full_box
from launcher.mindspore.naming.translation import with_keys
from launcher.mindspore.strategy import strategy_file
from launcher.mindspore.tensor_layout import TensorLayout, boxes
from launcher.weights.foreign_names import under_hugging_face_names
from launcher.weights.reading.transfer import Files
from launcher.weights.source import Source, open_complete
from launcher.weights.streaming.portion import PortionReader, slices

HERE = Path(__file__).parents[1] / "fixtures" / "mindformers"
ALL = Path(__file__).parents[3] / "shared" / "fixtures" / "mindformers"
needs_all = pytest.mark.skipif(not ALL.is_dir(), reason="the tree of golden weights is not here")

GROUP = {"mindformers_qkv_order": "group", "mindformers_mlp_order": "pair"}
PLAIN = {"mindformers_qkv_order": "plain", "mindformers_mlp_order": "plain"}
KEYS: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen3", "mcore"): GROUP,
    ("qwen3", "mcore_contiguous"): PLAIN,
    ("qwen3_moe", "mcore_contiguous"): {"mindformers_qkv_order": "plain"},
    ("qwen3_state", "mcore"): GROUP,
    ("qwen3_state", "mcore_train_state"): GROUP,
    ("glm4_9b", "legacy_rearranged"): {"mindformers_rearranged_rope": True},
}
"""What the files of a golden set do not show."""
WRITTEN: dict[tuple[str, str], dict[str, Any]] = {
    ("mixtral", "legacy_gmm"): {"mindformers_use_gmm": True},
    ("deepseek_v3", "legacy"): {"mindformers_use_gmm": True},
}
"""What is to be said when it is written, beside `KEYS`."""
Arrays = dict[str, np.ndarray[Any, Any]]


def goldens(root: Path) -> list[tuple[str, str]]:
    """(family, form) of every golden set."""
    found = sorted(path for path in root.glob("*/*") if path.is_dir() and path.name != "hf")
    return [(path.parent.name, path.name) for path in found]


def config_of(family: str, root: Path = HERE) -> dict[str, Any]:
    """config.json of a golden family."""
    content: dict[str, Any] = json.loads((root / family / "hf" / "config.json").read_text())
    return content


def arrays(source: Source) -> Arrays:
    """All tensors, as bits; bfloat16 as the float32 of equal value."""
    found: Arrays = {}
    with Files() as files:
        reader = PortionReader(source, files)
        for name in source.tensors:
            shape = source.written[name].shape if name in source.written else source.shape(name)
            values = reader.read(name, full_box(source.shape(name))).values.reshape(shape)
            is_short = source.dtype(name) == "BF16"
            found[name] = values.astype(np.uint32) << 16 if is_short else values
    return found


def hugging_face(path: Path, config: Mapping[str, Any], **keys: Any) -> Arrays:
    """The tensors at `path` under Hugging Face names."""
    return arrays(under_hugging_face_names(open_complete(path), config, keys, str))


def translated(source: Source, config: Mapping[str, Any], **keys: Any) -> Source:
    """`source` under Hugging Face names."""
    return with_keys(source, config, keys, str)


def assert_same(found: Arrays, expected: Arrays) -> None:
    """Names, shapes and bits agree."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:6]
    for name, values in expected.items():
        assert found[name].shape == values.shape, name
        assert np.array_equal(found[name], values), name


ROWS, COLUMNS = (1, -1), (-1, 1)
"""Cut by the second grid axis from the right, which is tensor parallel here."""
BY_COLUMNS = ("wo.", "w2.", "linear_proj.", "linear_fc2.", "dense_4h_to_h.", "attention.dense.",
              "experts.weight1")  # fmt: skip


def layout_of(name: str, shape: tuple[int, ...], grid: tuple[int, int]) -> TensorLayout:
    """How a grid of (tensor, data parallel) ranks holds a tensor: projections cut by tensor
    parallelism, everything else by the optimizer where it divides."""
    uncut = (-1,) * len(shape)
    is_cut = len(shape) == 2 and not name.startswith(("model.tok", "embedding"))
    dim = 1 if any(part in name for part in BY_COLUMNS) else 0
    if is_cut and shape[dim] % grid[0] == 0:
        uncut = COLUMNS if dim else ROWS
    rows = shape[0] // (grid[0] if uncut and uncut[0] == 1 else 1)
    by_optimizer = name.startswith("adam") and rows % grid[1] == 0
    size, step = (grid[1], 1) if by_optimizer else (0, 0)
    return TensorLayout(grid, (uncut,), step, size)


def write_ranks(
    root: Path, tensors: Arrays, *, stages: int = 1, grid: tuple[int, int] = (1, 1),
    extras: Arrays | None = None, deduplicated: bool = False,
) -> Path:  # fmt: skip
    """Rank folders `root/ranks` of a run with these tensors, and its strategy files. Layers are
    spread over `stages`; with `deduplicated` one rank of each group of replicas has a part."""
    names = sorted(tensors)
    stage_ranks = grid[0] * grid[1]
    (root / "strategy").mkdir(parents=True)
    for stage in range(stages):
        own = [name for name in names if _stage(name, stages) == stage]
        layouts = {name: layout_of(name, tensors[name].shape, grid) for name in own}
        content = strategy_file(layouts, stage)
        written: dict[tuple[str, Any], int] = {}
        for local in range(stage_ranks):
            rank = stage * stage_ranks + local
            (root / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(content)
            held: Arrays = dict(extras or {})
            for name in own:
                (box,) = boxes(layouts[name], tensors[name].shape, local)
                if not deduplicated or (name, box) not in written:
                    written[name, box] = rank
                    held[name] = np.ascontiguousarray(tensors[name][slices(box)])
            folder = root / "ranks" / f"rank_{rank}"
            folder.mkdir(parents=True)
            metadata = {"format": "ms", "remove_redundancy": str(deduplicated)}
            save_file(held, folder / f"net_rank_{rank}-1_4.safetensors", metadata)
    return root / "ranks"


def _stage(name: str, stages: int) -> int:
    """The pipeline stage of a tensor: embedding first, everything behind the layers last."""
    parts = name.split("layers.")
    if len(parts) > 1 and not name.startswith("mtp"):
        return min(int(parts[1].split(".")[0]) * stages // 2, stages - 1)
    return 0 if "embedding" in name else stages - 1


def native(tensors: Arrays, dtype: Any = np.float32) -> Arrays:
    """Bits as numbers."""
    return {name: values.view(dtype) for name, values in tensors.items()}
