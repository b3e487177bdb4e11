"""The cases: functions of a folder with the materials of `tests.workshop` and a device.

They run inside the process of the driver; a case that returns has passed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.driver import Bench
from benchmarks.gpu.sections import exactness
from benchmarks.gpu.sizes import TINY
from launcher import cli
from launcher.generation.draw import draw, draw_seed
from launcher.parallel import world as worlds
from tests.workshop import Workshop, merged


@dataclass(frozen=True)
class Place:
    """Where a case runs."""

    folder: Path
    device: str
    """`cuda` or `cpu`."""

    @property
    def workshop(self) -> Workshop:
        return Workshop(self.folder)

    def launch(self, mode: str, name: str, *words: str, device: str | None = None) -> str:
        """`run.py --config name --run_mode mode ...` in this process; what it printed."""
        target = "CPU" if (device or self.device) == "cpu" else "GPU"
        out, err = io.StringIO(), io.StringIO()
        arguments = ["--config", name, "--run_mode", mode, "--device_target", target, *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
        assert code == 0, f"exit code {code}\n{err.getvalue()}\n{out.getvalue()}"
        return out.getvalue()

    def train(
        self, output: str, *words: str, changes: dict[str, Any], device: str | None = None
    ) -> list[float]:
        """The losses of a run with `changes` of the usual configuration."""
        name = self.workshop.yaml(f"{output}.yaml", **changes)
        self.launch("train", name, "--output_dir", output, *words, device=device)
        return self.workshop.losses(output)


@dataclass(frozen=True)
class Case:
    """`ranks`: each on a device of its own (NCCL refuses two ranks on one GPU)."""

    run: Callable[[Place], None]
    ranks: int = 1


CASES: dict[str, Case] = {}


def case(name: str, run: Callable[[Place], None], ranks: int = 1) -> None:
    assert name not in CASES
    CASES[name] = Case(run, ranks)


def draws(place: Place) -> None:
    scores = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    seeds = [draw_seed(1, index, 2) for index in range(len(scores))]
    assert torch.equal(draw(scores.to(place.device), seeds).cpu(), draw(scores, seeds))


case("draws are those of the CPU", draws)


def agrees_with_the_cpu(place: Place, packing: bool) -> None:
    changes = {
        "train_dataset": {"packing": packing},
        "runner_config": {"epochs": 40},
        "model": {"model_config": {"compute_dtype": "float32"}},
    }
    here = place.train("here", changes=changes)
    assert here == pytest.approx(place.train("cpu", changes=changes, device="cpu"), rel=1e-3)


for packing in (True, False):
    case(
        f"float32 agrees with the CPU, packing {packing}",
        lambda place, packing=packing: agrees_with_the_cpu(place, packing),
    )


def resumes(place: Place, changes: dict[str, Any]) -> None:
    """A resumed run is the uninterrupted one to the bit."""
    place.train("whole", changes=changes)
    place.train("parts", "--runner_config.stop_step", "10", changes=changes)
    place.train("parts", "--resume_training", "True", changes=changes)
    assert place.workshop.losses("whole") == place.workshop.losses("parts")


for dtype in ("float32", "bfloat16"):
    for dropout in (0.0, 0.1):
        for packing in (True, False):
            CHANGES: dict[str, Any] = {
                "model": {"model_config": {"compute_dtype": dtype, "attention_dropout": dropout}},
                "train_dataset": {"packing": packing},
                "runner_config": {"epochs": 40},
            }
            case(
                f"a resume is exact, {dtype}, dropout {dropout}, packing {packing}",
                lambda place, changes=CHANGES: resumes(place, changes),
            )

ASYNC = {
    "callbacks": [
        {"type": "CheckpointMonitor", "save_checkpoint_steps": 5, "async_save": True}
    ],
    "model": {"model_config": {"compute_dtype": "bfloat16"}},
    "runner_config": {"epochs": 40},
}  # fmt: skip
case("a resume is exact, saved in the background", lambda place: resumes(place, ASYNC))

RECOMPUTE = {"recompute_config": {"recompute": True}}
SWAP = {"swap_config": {"swap": True}}
CHUNKS = {"micro_batch_interleave_num": 2, "runner_config": {"batch_size": 4}}
COMPILED = {"compile": True}
SIZES: dict[str, Any] = {
    "model": {"model_config": {"compute_dtype": "bfloat16", "hidden_size": 256,
                               "intermediate_size": 512, "num_hidden_layers": 4}},
    "runner_config": {"epochs": 40}, "compile": False,
}  # fmt: skip
KEEPING_LESS: dict[str, tuple[dict[str, Any], float]] = {
    "recompute": (RECOMPUTE, 0.0),
    "select_recompute": ({"recompute_config": {"select_recompute": True}}, 0.0),
    "recompute_operations": ({"recompute_config": {"recompute_operations": True}}, 0.0),
    "swap": (SWAP, 0.0),
    "op_swap": ({"swap_config": {"swap": True, "op_swap": [{"op_name": "mlp"}]}}, 0.0),
    "recompute and swap": ({**RECOMPUTE, **SWAP}, 0.0),
    # Another kernel updates the parameters.
    "optimizer on the host": ({"swap_config": {"optimizer": True}}, 1e-3),
    "interleave": (CHUNKS, 1e-2),
    "interleave and swap": ({**CHUNKS, **SWAP}, 1e-2),
    "compile": (COMPILED, 1e-2),
    "compile and recompute": ({**COMPILED, **RECOMPUTE}, 1e-2),
}
"""Changes, and how far losses may be from those without them."""


def same_losses(place: Place, changes: dict[str, Any], tolerance: float) -> None:
    if place.device == "cpu" and changes.get("compile"):
        changes = changes | {"compile": "eager"}  # needs no compiler for C++
    plain = place.train("plain", changes=SIZES)
    less = place.train("less", changes=merged(SIZES, changes))
    assert less == pytest.approx(plain, rel=tolerance)


for name, (changes, tolerance) in KEEPING_LESS.items():
    case(
        f"losses are the same with {name}",
        lambda place, changes=changes, tolerance=tolerance: same_losses(place, changes, tolerance),
    )


@contextlib.contextmanager
def bench(place: Place) -> Any:
    world = worlds.start(force_cpu=place.device == "cpu")
    try:
        yield Bench(world=world, sizes=replace(TINY, repeats=20), folder=place.folder)
    finally:
        worlds.stop(world)


def interleaves(place: Place) -> None:
    """FSDP holds the weights, as they are float32 and the computation is not."""
    with bench(place) as opened:
        found = exactness.interleaved(opened)
    assert found["steps_equal_to_the_first"] == 20, found
    assert found["gradient_difference"] < 0.05, found


def packs(place: Place) -> None:
    with bench(place) as opened:
        found = exactness.packed_row(opened)
    assert found["is_repeated"], found
    assert found["difference"] < 0.05, found


def repeats(place: Place, size: str) -> None:
    with bench(place) as opened:
        found = exactness.twice(opened, getattr(opened.sizes, size), packed=True)
    assert found["is_equal"], found


case("20 interleaved steps with FSDP have no race", interleaves)
case("a packed row is its documents", packs)
case("two steps are equal, dense", lambda place: repeats(place, "small"))
case("two steps are equal, experts", lambda place: repeats(place, "small_experts"))


def graphs(place: Place) -> None:
    """Decoding steps that are replayed give the tokens of those that are not."""
    changes = {"runner_config": {"epochs": 40}, "generation_config": {"max_new_tokens": 24}}
    place.train("trained", changes=changes)
    texts = []
    for graphed in (True, False):
        settings = {"generation_config": {"max_new_tokens": 24, "cuda_graphs": graphed}}
        name = place.workshop.yaml("predict.yaml", **settings)
        place.launch("predict", name, "--output_dir", f"graphs_{graphed}", "--load_checkpoint",
                     "trained/checkpoint", "--predict_data", "def ", "import ")  # fmt: skip
        texts.append(Path(f"graphs_{graphed}", "text_generation_result.txt").read_text())
    assert texts[0] == texts[1]


case("prediction with graphs", graphs)

LAYOUTS: dict[str, dict[str, Any]] = {
    "data parallel": {"parallel_config": {"data_parallel": 2}},
    "sharded weights": {
        "parallel_config": {"data_parallel": 2},
        "parallel": {"enable_parallel_optimizer": True},
    },
    "tensor parallel": {"parallel_config": {"model_parallel": 2, "use_seq_parallel": True}},
    "pipeline": {"parallel_config": {"pipeline_stage": 2, "micro_batch_num": 2}},
    "ulysses": {"parallel_config": {"context_parallel": 2}},
    "ring": {"parallel_config": {"context_parallel": 2, "context_parallel_algo": "colossalai_cp"}},
}
"""Of two ranks."""
LONE = {"parallel_config": {}}


def spreads(place: Place, layout: dict[str, Any]) -> None:
    """Two ranks train, and the loss falls. `tests/parallel` compares layouts with one process."""
    rows = 4 if "data_parallel" in layout["parallel_config"] else 8
    if "pipeline_stage" in layout["parallel_config"]:
        rows = 4
    changes = {
        "runner_config": {"epochs": 40, "batch_size": rows, "max_steps": 8},
        "model": {"model_config": {"compute_dtype": "float32"}},
        "context": {"device_target": "CPU" if place.device == "cpu" else "GPU"},
        **layout,
    }
    rank = int(worlds.process_environment().rank)
    name = place.workshop.yaml(f"two_{rank}.yaml", **changes)
    place.launch("train", name, "--output_dir", "two")
    losses = place.workshop.losses("two")
    assert len(losses) == 8
    assert losses[-1] < losses[0]


for name, layout in LAYOUTS.items():
    case(f"two ranks, {name}", lambda place, layout=layout: spreads(place, layout), ranks=2)
