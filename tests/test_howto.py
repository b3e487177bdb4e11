"""The how-to pages: their steps are followed on a copy of the code, where their commands run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.workshop import Workshop

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "howto").glob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\S+\.(?:yaml|py))\n")

RUN_LINES = """
import json, shlex, sys
from launcher.console_script import main
for line in json.loads(sys.argv[1]):
    print("$", line, flush=True)
    code = main(shlex.split(line)[1:])
    assert code == 0, f"{line}: exit code {code}"
"""
"""Runs command lines in one process, so that torch is imported once."""

PRINTED = {
    "callback": ("warning: step ",),
    "data_loader": ("3 documents",),
    "family": ("model: ministral",),
    "optimizer": ("resumed: tiny-1_6",),
    "tool": ("parameters in ",),
}
"""Page to what its commands print."""


def insert(code: Path, text: str) -> None:
    """Apply one diff block: `--- file`, then lines of context, `-` and `+`."""
    first, *lines = text.rstrip("\n").split("\n")
    file = code / first.removeprefix("--- ")
    before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    content = file.read_text()
    assert content.count(before) == 1, f"{first}: found {content.count(before)} times: {before}"
    file.write_text(content.replace(before, after))


def samples(page: Path, folder: Path) -> None:
    """Write the YAML samples of a page."""
    for language, text in FENCE.findall(page.read_text()):
        named = NAMED.match(text)
        if language == "yaml" and named:
            (folder / named[1]).write_text(text)


def follow(page: Path, code: Path) -> list[str]:
    """Add the files of a page and apply its diffs. Returns its commands."""
    commands: list[str] = []
    for language, text in FENCE.findall(page.read_text()):
        if language == "diff":
            insert(code, text)
        elif language == "bash":
            commands += text.strip().splitlines()
        elif language == "python":
            named = NAMED.match(text)
            assert named, f"{page.name}: a sample without a file name"
            assert not (code / named[1]).exists(), f"{named[1]} exists already"
            (code / named[1]).write_text(text.partition("\n")[2])
    return commands


@pytest.fixture(scope="module")
def printed(materials: Workshop, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the commands of all pages print, on a copy of the code after all their steps."""
    code = tmp_path_factory.mktemp("code")
    for name in ("launcher", "models"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = materials.copy_to(tmp_path_factory.mktemp("howto")).folder
    (folder / "corpus").rename(folder / "my_text")
    (folder / "tokenizer").rename(folder / "my_tokenizer")
    prose = (folder / "my_text" / "bisect.py").read_text().replace('"', "'")
    (folder / "my_table.csv").write_text("".join(
        f'{number},"{text}"\n' for number, text in [("number", "body"), *enumerate([prose] * 3)]
    ))  # fmt: skip
    samples(ROOT / "docs" / "training.md", folder)
    lines: list[str] = []
    for page in PAGES:
        samples(page, folder)
        lines += follow(page, code)
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "my_model")
    done = subprocess.run(
        [sys.executable, "-c", RUN_LINES, json.dumps(lines)], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_steps_of_a_page(page: Path, printed: str) -> None:
    for text in PRINTED[page.stem]:
        assert text in printed
