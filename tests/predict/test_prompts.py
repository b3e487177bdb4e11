"""Prompts that cannot be encoded, and files of prompts in other encodings."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config import rules
from launcher.config.command_line import parse
from launcher.config.resolve import resolve_command_line
from launcher.errors import UserError
from launcher.predict.prompts import read_prompts

BYTE = b"caf\xe9".decode(errors="surrogateescape")
"""What Python makes of a word of the command line that is not UTF-8."""


@pytest.mark.parametrize("given", [BYTE, ["fine", BYTE], "q \ud83d x", "\ud83d/x.txt"])
def test_prompts_that_cannot_be_encoded_are_errors(given: str | list[str]) -> None:
    with pytest.raises(UserError, match="a prompt must be valid UTF-8") as caught:
        read_prompts(given)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["--predict_data", BYTE], "command line: --predict_data"),
        (["--predict_data", "fine", BYTE], "command line: --predict_data"),
        ([], "run.yaml:2"),
    ],
)
def test_the_configuration_names_the_place_before_anything_heavy(
    tmp_path: Path, words: list[str], place: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text('run_mode: predict\ninput_data: "q \\ud83d x"\n')
    resolved = resolve_command_line(parse(["--config", str(path), *words]))
    found = [*resolved.problems, *rules.check(resolved.config, resolved.provenance, world=1)]
    (problem,) = [problem for problem in found if "input_data = " in problem.what]
    assert problem.where.endswith(place)
    assert "a prompt must be valid UTF-8" in problem.rule


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_prompts_is_read_line_by_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("caf\u00e9\r\n\n \nline\u2028of\x0cone\n\U0001f6a2".encode(encoding))
    assert [prompt.text for prompt in read_prompts(str(path))] == [
        "caf\u00e9",
        "line\u2028of\x0cone",
        "\U0001f6a2",
    ]


def test_a_file_of_prompts_in_latin_1_is_an_error_with_line_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"one\ntwo caf\xe9\n")
    with pytest.raises(UserError) as caught:
        read_prompts(str(path))
    assert f"{path}:2: --predict_data {path} is not UTF-8 text" in str(caught.value)
    assert "The byte is at offset 11 of the file." in str(caught.value)
