"""The folder in which the samples of a page of the original run, one upon the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import JobResult, run_job
from tests.workshop import Workshop


@dataclass(frozen=True)
class Shop:
    """The folder of the story."""

    workshop: Workshop

    @property
    def folder(self) -> Path:
        return self.workshop.folder

    def run(self, sample: str, mode: str, world: int, output: str, *more: str) -> JobResult:
        """Run a sample of the page over the base of the story; it must succeed."""
        result = self.try_run(sample, mode, world, output, *more)
        assert result.code == 0, result.stderr + result.stdout
        return result

    def try_run(self, sample: str, mode: str, world: int, output: str, *more: str) -> JobResult:
        """Run a sample, which may be refused."""
        name = f"{output}.yaml"
        (self.folder / name).write_text(f"base_config: base.yaml\n{sample}")
        arguments = ["--config", name, "--run_mode", mode, "--output_dir", output, *more]
        return run_job(arguments, self.folder, world)

    def loss(self, sample: str, world: int, output: str) -> float:
        """The evaluation loss of the weights a sample loads."""
        self.run(sample, "eval", world, output)
        value = json.loads((self.folder / output / "eval_result.json").read_text())["eval_loss"]
        return float(value)

    def text(self, sample: str, world: int, output: str, *more: str) -> str:
        """What the weights a sample loads say to the page's prompt."""
        self.run(sample, "predict", world, output, "--predict_data",
                 "I love Beijing, because", "generation_config.max_new_tokens=6",
                 *more)  # fmt: skip
        return (self.folder / output / "text_generation_result.jsonl").read_text()
