"""How long a command takes that trains nothing: help, a wrong configuration, a right one.

    python -m benchmarks.startup [--rounds 11] [--write]

Wall time of whole processes, against a Python that does nothing and one that only imports torch.
The aim: help and the errors of a configuration in under half a second.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.jobs import quickstart_data
from benchmarks.measure import Spread, in_turns, parser, report, run, table

AIM_SECONDS = 0.5
WRONG = """\
run_mod: train
model:
  model_config: {type: Qwen3Config, vocab_size: 4096, hiden_size: 256, num_layers: four}
processor: {tokenizer: {pretrained_model_dir: no/such/folder}}
train_dataset:
  data_loader: {type: TextDataLoder, dataset_dir: no/such/folder}
  seq_lenght: 128
runner_config: {batch_size: -1, epoch: 1}
optimizer: {type: AdamW, betas: [0.9]}
lr_schedule: {type: CosineWithWarmUpLR, learnig_rate: 3e-3}
callbacks: [{type: CheckpointMonitr}]
"""
HELP, ERRORS, CHECK = "`run.py --help`", "a configuration with errors", "`--check_config`"
NOTHING, TORCH = "`python -c pass`", '`python -c "import torch"`'


def main() -> None:
    """Measure, print, and keep the result when asked to."""
    arguments = parser("benchmarks.startup", __doc__, rounds=11).parse_args()
    quickstart_data()
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder, "wrong.yaml")
        wrong.write_text(WRONG)
        ours = (sys.executable, "run.py")
        seconds = in_turns(
            {
                NOTHING: partial(run, (sys.executable, "-c", "pass")),
                HELP: partial(run, (*ours, "--help")),
                ERRORS: partial(
                    run, (*ours, "--config", wrong, "--run_mode", "train"), exit_code=2
                ),
                CHECK: partial(
                    run,
                    (*ours, "--config", "configs/quickstart.yaml", "--run_mode", "train",
                     "--check_config"),
                ),
                TORCH: partial(run, (sys.executable, "-c", "import torch")),
            },
            arguments.rounds,
        )  # fmt: skip
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    body = table(
        ("process", "seconds", "aim"),
        [(name, spread.text(), _aim(name, spread)) for name, spread in spreads.items()],
    )
    report("Start-up", "benchmarks.startup", arguments, body)


def _aim(name: str, spread: Spread) -> str:
    if name not in (HELP, ERRORS):
        return ""
    return f"under {AIM_SECONDS}: {'met' if spread.median < AIM_SECONDS else 'missed'}"


if __name__ == "__main__":
    main()
