"""The quickstart's data, made for real from this interpreter's standard library."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from launcher.tools import prepare_quickstart
from launcher.tools.prepare_quickstart import LARGEST_CORPUS, main
from launcher.tools.standard_library import is_held_out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller corpus than the real one, to be quick."""
    folder = tmp_path_factory.mktemp("data") / "quickstart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_quickstart, "LARGEST_CORPUS", 1_000_000)
        assert main(["--output_dir", str(folder), "--vocab_size", "600"]) == 0
    return folder


def test_the_corpus_is_split_and_nothing_is_in_both(made: Path) -> None:
    parts = {
        part: {path.relative_to(made / part) for path in (made / part).rglob("*.py")}
        for part in ("train", "heldout")
    }
    assert not parts["train"] & parts["heldout"]
    assert 1 <= len(parts["heldout"]) < len(parts["train"]) / 4
    assert sum(p.stat().st_size for p in made.rglob("*.py")) <= 1_000_000 < LARGEST_CORPUS
    names = {part for path in parts["train"] for part in path.parts}
    assert not names & {"test", "tests", "site-packages", "encodings", "pydoc_data"}


def test_the_tokenizer_opens_in_transformers(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made / "tokenizer")
    assert len(tokenizer) == 600
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    text = "def f(x):\n    return x  # caf\u00e9 \u4e2d\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)


def test_a_complete_folder_is_kept_and_said(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert main(["--output_dir", str(made), "--vocab_size", "600"]) == 0
    assert f"{made} is complete and kept: Python " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_the_split_depends_on_names_only() -> None:
    library = Path("/somewhere/python")
    heldout = [
        name
        for name in ("argparse.py", "sysconfig.py", "asyncio/locks.py", "json/decoder.py")
        if is_held_out(library / name, library)
    ]
    assert heldout == ["sysconfig.py", "asyncio/locks.py"]


def test_errors(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    cases = [
        (
            ["--output_dir", str(made), "--vocab_size", "700"],
            "not 700: an existing folder is kept.",
        ),
        (["--output_dir", str(made), "--vocab_size", "10"], "The least is 300."),
        (["--output_dir", str(tmp_path / "mine")], "exists and has no prepared.json"),
        (
            ["--output_dir", str(tmp_path / "mine"), "--overwrite"],
            "exists and has no prepared.json",
        ),
    ]
    for argv, expected in cases:
        assert main(argv) == 2
        assert expected in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_overwrite_makes_it_anew_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "quickstart"
    monkeypatch.setattr(prepare_quickstart, "LARGEST_CORPUS", 200_000)
    assert main(["--output_dir", str(folder), "--vocab_size", "300"]) == 0
    assert main(["--output_dir", str(folder), "--vocab_size", "310", "--overwrite"]) == 0
    assert '"requested_vocab_size": 310' in (folder / "prepared.json").read_text()

    def failing(*_: object) -> int:
        raise RuntimeError("no memory")

    monkeypatch.setattr(prepare_quickstart, "_train_tokenizer", failing)
    with pytest.raises(RuntimeError):
        main(["--output_dir", str(folder), "--vocab_size", "310", "--overwrite"])
    assert '"requested_vocab_size": 310' in (folder / "prepared.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart"]
