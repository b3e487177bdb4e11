"""`ckpt_to_safetensors` beside that of MindSpore, on one file, in turns.

    python -m benchmarks.ckpt_conversion --mindspore PYTHON [--gigabytes 1] [--rounds 3] [--write]

`PYTHON`: the interpreter of an environment that has MindSpore (`make test-mindspore` makes one in
.venv-mindspore). Every conversion is a process of its own, which imports first and is timed by
itself; the file is in the page cache and the target folder is new. Ours has reached the disk when
its clock stops (fsync), that of MindSpore may not have. Peak memory is that of the process, with
what it imported.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.measure import ROOT, Spread, parser, ratios, report, table
from launcher.weights.offline.convert import safetensors_to_ckpt
from launcher.weights.streaming.write import Part, write_file

MODULE = "benchmarks.ckpt_conversion"
TENSOR_BYTES = 64 << 20

CONVERT = """
import json, sys, time
{imports}
source, target = sys.argv[1:]
begin = time.perf_counter()
ckpt_to_safetensors(source, target)
seconds = time.perf_counter() - begin
lines = open("/proc/self/status").read().splitlines()
peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
print(json.dumps([seconds, peak]))
"""
OURS = "from launcher.weights import ckpt_to_safetensors\nckpt_to_safetensors"
THEIRS = "from mindspore import ckpt_to_safetensors"


def make_file(folder: Path, nbytes: int) -> Path:
    """A `.ckpt` file of bfloat16 matrices."""
    content = np.random.default_rng(0).integers(0, 256, TENSOR_BYTES, np.uint8)

    def read(start: int, stop: int) -> memoryview:
        return content.data[start:stop]

    shape = (4096, TENSOR_BYTES // 4096 // 2)
    parts = [Part(f"layers.{n}.weight", "BF16", shape, read) for n in range(nbytes // TENSOR_BYTES)]
    write_file(folder / "model.safetensors", parts, {"format": "ms"})
    (made,) = safetensors_to_ckpt(folder / "model.safetensors").files
    return made


def convert(python: str, imports: str, source: Path, target: Path) -> tuple[float, float]:
    """(seconds, peak memory in bytes) of one conversion in a process of its own."""
    source.read_bytes()  # into the page cache
    script = CONVERT.format(imports=imports)
    result = subprocess.run(
        [python, "-c", script, str(source), str(target)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    seconds, peak = json.loads(result.stdout.splitlines()[-1])
    shutil.rmtree(target)
    return seconds, peak


def in_turns(
    systems: Mapping[str, tuple[str, str]], source: Path, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """What `convert` gives, `rounds` times for each system."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    for number in range(rounds):
        for name, (python, imports) in systems.items():
            found[name].append(convert(python, imports, source, source.parent / "out"))
        latest = ", ".join(f"{name} {values[-1][0]:.2f}" for name, values in found.items())
        print(f"round {number + 1}/{rounds}: {latest}", file=sys.stderr)
    return found


def main() -> None:
    """Measure, print the table, and add it to RESULTS.md with --write."""
    made = parser(MODULE, __doc__, rounds=3)
    made.add_argument("--mindspore", required=True, metavar="PYTHON", help="interpreter with it")
    made.add_argument("--gigabytes", type=float, default=1.0, help="size of the file")
    made.add_argument("--folder", type=Path, help="where the files are made")
    arguments = made.parse_args()
    systems = {"Slipway": (sys.executable, OURS), "MindSpore": (arguments.mindspore, THEIRS)}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source = make_file(Path(scratch), int(arguments.gigabytes * 10**9))
        found = in_turns(systems, source, arguments.rounds)
    seconds = {name: [one[0] for one in values] for name, values in found.items()}
    body = table(
        ("system", "seconds", "MindSpore / system (above 1: faster)", "peak memory, MB"),
        [
            (name, Spread.of(seconds[name]).text(),
             ratios(seconds["MindSpore"], seconds[name]).text(),
             f"{max(one[1] for one in values) / 1e6:,.0f}")
            for name, values in found.items()
        ],
    )  # fmt: skip
    title = f"Converting a .ckpt file of {arguments.gigabytes:g} GB to safetensors"
    report(title, MODULE, arguments, body)


if __name__ == "__main__":
    main()
