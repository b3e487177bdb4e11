"""How long it takes to know where everything lies: 16,384 ranks of DeepSeek-V3's 671 billion.

    python -m benchmarks.layouts [--rounds 5] [--write]

One process works out what every rank holds of every tensor, and the strategy files of all pipeline
stages; no device, no process group. The aims: the layouts in under a minute and 2 GB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Mapping

from benchmarks.measure import ROOT, Spread, parser, report, table
from launcher.layout.layout import Layout
from launcher.layout.mesh import training_mesh

AIM_SECONDS, AIM_GIGABYTES = 60.0, 2.0
DEEPSEEK_V3 = {
    "type": "DeepseekV3Config", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 163840,
}  # fmt: skip
DEGREES = {
    "pipeline_stages": 16, "tensor_parallel": 8, "data_parallel": 128, "expert_parallel": 64,
}  # fmt: skip
WHAT = ("the model, shapes alone", "layouts of all ranks", "strategy files of all stages",
        "the whole process")  # fmt: skip


def deepseek_layout(degrees: Mapping[str, int]) -> Layout:
    """The layout of DeepSeek-V3 with the sharded optimizer on a mesh of these degrees."""
    import torch

    from launcher.builders.layout import model_layout
    from models.build import build_model
    from models.families import model_spec
    from models.stage import stage_split

    spec = model_spec(DEEPSEEK_V3, None)
    assert spec.decoder is not None
    return model_layout(
        build_model(spec, dtype=torch.bfloat16),
        spec,
        training_mesh(**degrees, shard_optimizer=True),
        split=stage_split(spec.decoder, degrees["pipeline_stages"]),
        vocab_emb_dp=False,
    )


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    made = parser("benchmarks.layouts", __doc__, rounds=5)
    made.add_argument("--once", action="store_true", help="measure in this process, print numbers")
    arguments = made.parse_args()
    if arguments.once:
        print(*_once())
        return
    command = (sys.executable, "-m", "benchmarks.layouts", "--once")
    rounds = []
    for _ in range(arguments.rounds):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        rounds.append([float(number) for number in done.stdout.split()])
        print(done.stdout, end="", file=sys.stderr)
    rows = []
    for place, what in enumerate(WHAT):
        seconds = Spread.of([numbers[2 * place] for numbers in rounds])
        gigabytes = Spread.of([numbers[2 * place + 1] for numbers in rounds])
        rows.append((what, seconds.text(), gigabytes.text(), _aim(what, seconds, gigabytes)))
    layout = deepseek_layout(DEGREES)
    pieces = sum(len(layout.names(stage)) for stage in range(16)) * layout.mesh.world_size // 16
    body = table(("step", "seconds", "peak memory, GB", "aim"), rows)
    axes = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.sizes().items() if size > 1)
    body += f"\n\n{layout.mesh.world_size:,} ranks ({axes}), {pieces:,} pieces of tensors."
    report("Layouts", "benchmarks.layouts", arguments, body)


def _once() -> list[float]:
    """Seconds and peak memory in GB after each step of `WHAT`."""
    begin = time.perf_counter()
    layout = deepseek_layout(DEGREES)
    numbers = [time.perf_counter() - begin, _peak()]
    started = time.perf_counter()
    held = [layout.of(rank) for rank in range(layout.mesh.world_size)]
    numbers += [time.perf_counter() - started, _peak()]
    assert len(held) == layout.mesh.world_size
    from launcher.mindspore.strategy_export import stage_files
    from models.families import DECODERS
    from models.names import mappings_of

    started = time.perf_counter()
    trained = [name for name in layout.shapes if layout.spec_of(name).sharded]
    states = dict.fromkeys(trained, ("adam_m.", "adam_v."))
    mappings = mappings_of(DECODERS["deepseek_v3"].parameters)
    assert len(stage_files(layout, mappings, states).stages) == layout.mesh.pp
    numbers += [time.perf_counter() - started, _peak()]
    return [*numbers, time.perf_counter() - begin, _peak()]


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _aim(what: str, seconds: Spread, gigabytes: Spread) -> str:
    if what != WHAT[1]:
        return ""
    met = seconds.largest < AIM_SECONDS and gigabytes.largest < AIM_GIGABYTES
    return f"under {AIM_SECONDS:.0f} s, {AIM_GIGABYTES:.0f} GB: {'met' if met else 'missed'}"


if __name__ == "__main__":
    main()
