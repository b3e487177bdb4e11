"""Whatever stands in a file or on a command line: a configuration, or exit code 2 with a reason."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli
from launcher.config.command_line import FLAGS
from launcher.config.resolve import resolve
from launcher.config.suggest import schema_keys
from tests.config.workspace import RIGHT

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, math.nan, 10**30, "x", "", "true", "1e-4", "${a}", "\x00"),
    *("é", "corpus", "qwen", "ranks", [], {}, [1], ["a"], [[1]], [{}], [None], {"a": 1}),
    *({"type": 3}, {"type": "CheckpointMonitor"}, [{"type": None}], [{"type": "EvalCallBack"}]),
)
WORDS = ("1", "x", "[1]", "{a: 1}", "", "true", "null", "-1", "a=b", "[", "{")
MODEL_KEYS = (
    *("type", "hidden_size", "rope_scaling", "num_heads", "seq_length", "vocab_size", "pet_config"),
    *("max_position_embeddings", "compute_dtype", "layer_types", "eos_token_id", "top_k"),
)
KEYS = [key.path for key in schema_keys() if "[" not in key.path]
KEYS += [f"model.model_config.{name}" for name in MODEL_KEYS]


def wrong_yaml(choose: random.Random) -> str:
    tree = yaml.safe_load(RIGHT)
    for _ in range(choose.randint(1, 3)):
        *sections, last = choose.choice(KEYS).split(".")
        node = tree
        for name in sections:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[last] = choose.choice(VALUES)
    return yaml.safe_dump(tree, allow_unicode=True)


def wrong_word(choose: random.Random) -> str:
    key, value = choose.choice(KEYS), choose.choice(WORDS)
    forms = (f"--{key}={value}", f"{key}={value}", f"+{key}={value}", f"~{key}",
             f"--{choose.choice(list(FLAGS))}={value}",
             f"callbacks.{choose.randint(0, 3)}.prefix={value}")  # fmt: skip
    return choose.choice(forms)


@pytest.mark.parametrize("seed", range(5))
def test_no_input_is_a_mistake_of_ours(
    workspace: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    choose = random.Random(seed)
    for _ in range(25):
        Path("wrong.yaml").write_text(wrong_yaml(choose), encoding="utf-8")
        mode = choose.choice(("train", "finetune", "eval", "predict", "resume"))
        words = [wrong_word(choose) for _ in range(choose.randint(0, 2))]
        argv = ["--config", "wrong.yaml", "--run_mode", mode, *words]
        code = cli.main([*argv, "--print_config"])
        printed = capsys.readouterr()
        assert code in (0, 2), (argv, printed.err)
        if code == 2:
            assert "error: " in printed.err
            continue
        Path("printed.yaml").write_text(printed.out, encoding="utf-8")
        assert resolve("printed.yaml").config == resolve("wrong.yaml", mode, {}, words).config
