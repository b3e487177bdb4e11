"""Loading weights under names of MindFormers against loading the same bytes as they are.

    python -m benchmarks.mindformers_names [--gigabytes 0.5] [--rounds 5] [--write]

Two forms that are not rows of a file: a stack of transposed experts (`experts.weight1`), and gate
and up in alternating rows (`linear_fc1`). The peer is the same load from Hugging Face files, warm,
in the same run. Figures are in RESULTS.md.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import Spread, in_turns, parser, ratios, report, table
from launcher.layout.box import full_box
from launcher.layout.shard import Shard
from launcher.weights.foreign_names import under_hugging_face_names
from launcher.weights.log import no_log
from launcher.weights.reading.load import load
from launcher.weights.source import Source, open_complete

MODULE = "benchmarks.mindformers_names"
HEADER = ("what, 0.5 GB in bfloat16, warm", "as they are, seconds", "MindFormers, seconds", "ratio")
HIDDEN = 4096
GROUP = {"mindformers_qkv_order": "group", "mindformers_mlp_order": "pair"}
Twin = Callable[[Path, int], tuple[dict[str, Any], Path, Path]]
"""(folder, bytes) to (config, Hugging Face file, MindFormers file)."""


def config_of(experts: int, width: int) -> dict[str, Any]:
    """config.json of a model of one layer."""
    kind = "qwen3_moe" if experts else "qwen3"
    return {"model_type": kind, "hidden_size": HIDDEN, "num_hidden_layers": 1,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
            "num_experts": experts, "moe_intermediate_size": width}  # fmt: skip


def experts_twin(folder: Path, nbytes: int) -> tuple[dict[str, Any], Path, Path]:
    """Experts of 1,536 rows, in both forms."""
    width = 1536
    count = max(nbytes // (2 * HIDDEN * width * 2), 1)
    made, stack = dict[str, torch.Tensor](), []
    for expert in range(count):
        parts = [torch.randn(width, HIDDEN, dtype=torch.bfloat16) for _ in range(2)]
        for name, tensor in zip(("gate", "up"), parts, strict=True):
            made[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = tensor
        stack.append(torch.cat(parts).T.contiguous())
    stored = {"decoder.layers.0.mlp.experts.weight1": torch.cat(stack),
              "decoder.layers.0.self_attention.linear_proj.weight": torch.zeros(1, 1)}  # fmt: skip
    return config_of(count, width), *_saved(folder, "experts", made, stored)


def pairs_twin(folder: Path, nbytes: int) -> tuple[dict[str, Any], Path, Path]:
    """Gate and up, in both forms."""
    width = nbytes // (2 * HIDDEN * 2)
    gate, up = (torch.randn(width, HIDDEN, dtype=torch.bfloat16) for _ in range(2))
    place = "model.layers.0.mlp."
    made = {f"{place}gate_proj.weight": gate, f"{place}up_proj.weight": up}
    rows = torch.stack([gate, up], 1).reshape(2 * width, HIDDEN)
    stored = {"decoder.layers.0.mlp.linear_fc1.weight": rows,
              "decoder.layers.0.self_attention.linear_proj.weight": torch.zeros(1, 1)}  # fmt: skip
    return config_of(0, width), *_saved(folder, "pairs", made, stored)


def _saved(
    folder: Path, name: str, hugging_face: Mapping[str, torch.Tensor],
    mindformers: Mapping[str, torch.Tensor],
) -> tuple[Path, Path]:  # fmt: skip
    paths = folder / f"{name}-hf.safetensors", folder / f"{name}-ms.safetensors"
    save_file(dict(hugging_face), paths[0])
    save_file(dict(mindformers), paths[1])
    return paths


def seconds(source: Source) -> float:
    """The time of a load of all projections of `source`."""
    targets = {}
    for name in source.tensors:
        if not name.endswith(("gate_proj.weight", "up_proj.weight")):
            continue
        shape = source.shape(name)
        memory = torch.zeros(shape, dtype=torch.bfloat16)
        targets[name] = Shard(shape, full_box(shape), memory)
    start = time.perf_counter()
    load(targets, source, strict=False)
    return time.perf_counter() - start


def rows_of(name: str, twin: Twin, nbytes: int, rounds: int) -> list[str]:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        config, hugging_face, mindformers = twin(Path(folder), nbytes)
        plain = open_complete(hugging_face)
        translated = under_hugging_face_names(open_complete(mindformers), config, GROUP, no_log)
        found = in_turns(
            {"Hugging Face": lambda: seconds(plain), "MindFormers": lambda: seconds(translated)},
            rounds,
        )
    times = [*found.values()]
    return [name, *(Spread.of(values).text() for values in times), ratios(*times[::-1]).text()]


def main() -> None:
    """Measure, and report a table."""
    arguments = parser(MODULE, __doc__, rounds=5)
    arguments.add_argument("--gigabytes", type=float, default=0.5, help="of each tensor (0.5)")
    options = arguments.parse_args()
    rows = [
        rows_of(name, twin, int(options.gigabytes * 1e9), options.rounds)
        for name, twin in (("transposed experts", experts_twin), ("gate, up in pairs", pairs_twin))
    ]
    title = "Loading weights under names of MindFormers"
    report(title, MODULE, options, table(HEADER, rows))


if __name__ == "__main__":
    main()
