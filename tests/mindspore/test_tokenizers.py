"""Tokenizers by the files that MindFormers' YAML names, against the libraries that own the formats.

`fixtures/tokenizers/` has tiny models trained by sentencepiece 0.2.3 and tiktoken 0.14, on a few
files of the standard library, and in `expected.json` the ids that these give.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from launcher.config.schema.model import TokenizerSection
from launcher.data.named_tokenizer import build_named_tokenizer, files_of_tokenizer
from launcher.errors import UserError
from launcher.mindspore.tokenizers.sentencepiece import backend_of, read_pieces
from tests.workshop import Workshop

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text())
TEXTS: list[str] = EXPECTED["texts"]


def built(kind: str, files: dict[str, Path], **keys: Any) -> PreTrainedTokenizerFast:
    return build_named_tokenizer(TokenizerSection(type=kind, **keys), files)


def qwen2_files(materials: Workshop, folder: Path) -> dict[str, Path]:
    """vocab.json and merges.txt of the tokenizer of the workshop, without its special tokens."""
    model = json.loads((materials.folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    special = {"<|endoftext|>", "<|pad|>"}
    names = [t for t in sorted(model["vocab"], key=model["vocab"].get) if t not in special]
    files = {"vocab_file": folder / "vocab.json", "merges_file": folder / "merges.txt"}
    vocabulary = {name: index for index, name in enumerate(names)}
    files["vocab_file"].write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    files["merges_file"].write_text("\n".join(["#version: 0.2", *lines, ""]))
    return files


@pytest.mark.parametrize("name", ["llama_bpe", "bpe_symbols", "telechat", "unigram"])
def test_sentencepiece_models_give_its_ids(name: str) -> None:
    backend = backend_of(read_pieces(FIXTURES / f"{name}.model"))
    for text, ids, decoded in zip(TEXTS, *EXPECTED[name].values(), strict=True):
        assert backend.encode(text, add_special_tokens=False).ids == ids, text
        assert backend.decode(ids, skip_special_tokens=False) == decoded


@pytest.mark.parametrize(
    ("kind", "ids"), [("Llama3Tokenizer", "of_nfc"), ("ChatGLM4Tokenizer", "ids")]
)
def test_tiktoken_files_give_its_ids(kind: str, ids: str) -> None:
    tokenizer = built(kind, {"vocab_file": FIXTURES / "tiktoken.model"})
    for text, expected in zip(TEXTS, EXPECTED["tiktoken"][ids], strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text


def test_special_tokens_follow_the_vocabulary(materials: Workshop, tmp_path: Path) -> None:
    tiktoken = {"vocab_file": FIXTURES / "tiktoken.model"}
    llama3, glm = built("Llama3Tokenizer", tiktoken), built("ChatGLM4Tokenizer", tiktoken)
    assert len(llama3) == 450 + 256
    spots = {"<|begin_of_text|>": 450, "<|end_of_text|>": 451, "<|start_header_id|>": 456,
             "<|reserved_special_token_4|>": 458, "<|eot_id|>": 459,
             "<|reserved_special_token_250|>": 705}  # fmt: skip
    assert {token: llama3.convert_tokens_to_ids(token) for token in spots} == spots
    assert llama3("a<|eot_id|>")["input_ids"] == [ord("a"), 459]
    assert glm("a<|user|>")["input_ids"] == [452, 454, ord("a"), 457]  # [gMASK]<sop>
    assert glm.eos_token_id == glm.pad_token_id == 450
    qwen2 = built("Qwen2Tokenizer", qwen2_files(materials, tmp_path), eos_token="<|im_end|>")
    assert qwen2.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>"]) == [510, 511]
    assert (qwen2.eos_token_id, qwen2.pad_token_id, len(qwen2)) == (512, 510, 513)
    telechat = built("TelechatTokenizer", {"vocab_file": FIXTURES / "telechat.model"})
    ids = {name: telechat.convert_tokens_to_ids(name) for name in ("<_start>", "<_bot>")}
    assert ids == {"<_start>": 3, "<_bot>": 7}
    assert telechat("<_user>hello<_bot>")["input_ids"][::3][0] == 6
    plain = built("TelechatTokenizer", {"vocab_file": FIXTURES / "llama_bpe.model"})
    assert plain.convert_tokens_to_ids(["<_start>", "<_end>", "<_bot>"]) == [700, 701, 704]


def test_qwen2_is_that_of_transformers(materials: Workshop, tmp_path: Path) -> None:
    files = qwen2_files(materials, tmp_path)
    own = built("Qwen2Tokenizer", files, bos_token=None, unk_token="None")
    theirs = Qwen2Tokenizer(str(files["vocab_file"]), str(files["merges_file"]))
    for text in [*TEXTS, "ｆull Å a<|endoftext|>b"]:
        assert own(text)["input_ids"] == theirs(text)["input_ids"], text
    assert own.bos_token is None
    assert own.unk_token is None


def test_llama_adds_a_first_token_unless_it_is_told_not_to() -> None:
    files = {"vocab_file": FIXTURES / "llama_bpe.model"}
    assert built("LlamaTokenizer", files)("a")["input_ids"][0] == 1
    both = built("LlamaTokenizer", files, add_bos_token=False, add_eos_token=True)
    ids = both("a")["input_ids"]
    assert (ids[0] != 1, ids[-1]) == (True, 2)
    assert built("LlamaTokenizer", files, pad_token="</s>").pad_token_id == 2
    with pytest.raises(UserError, match="'<bos>' is not a token of the vocabulary"):
        built("LlamaTokenizer", files, bos_token="<bos>")


def test_a_tokenizer_json_is_opened_as_it_is(materials: Workshop) -> None:
    path = materials.folder / "tokenizer" / "tokenizer.json"
    end = "<|endoftext|>"
    given: dict[str, Any] = {"bos_token": end, "eos_token": end, "unk_token": None}
    plain = Tokenizer.from_file(str(path))
    for key in ("vocab_file", "tokenizer_file"):
        fast = built("LlamaTokenizerFast", {key: path}, **given)
        ids = plain.encode("def f(x): pass").ids
        assert fast("def f(x): pass")["input_ids"] == [0, *ids]
        assert built("", {key: path}, **given)("def f(x): pass")["input_ids"] == ids
        assert built("Llama3Tokenizer", {key: path}, **given).eos_token_id == 0


CASES = {
    "Qwen2Tokenizer": ("qwen2", None),
    "LlamaTokenizer": ("llama", "llama_bpe.model"),
    "TelechatTokenizer": ("telechat", "telechat.model"),
    "Llama3Tokenizer": ("llama", "tiktoken.model"),
    "ChatGLM4Tokenizer": ("glm", "tiktoken.model"),
}


@pytest.mark.parametrize("kind", CASES)
def test_saved_files_open_as_the_same_tokenizer(
    kind: str, materials: Workshop, tmp_path: Path
) -> None:
    model_type, name = CASES[kind]
    files = {"vocab_file": FIXTURES / name} if name else qwen2_files(materials, tmp_path)
    own = built(kind, files, chat_template="{{ messages }}", model_max_length=77)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for file, content in files_of_tokenizer(own).items():
        (folder / file).write_bytes(content)
    again = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert again(text)["input_ids"] == own(text)["input_ids"], text
    assert (again.eos_token_id, again.pad_token_id) == (own.eos_token_id, own.pad_token_id)
    assert (again.chat_template, again.model_max_length) == ("{{ messages }}", 77)


def test_damaged_files_are_errors_of_the_user(materials: Workshop, tmp_path: Path) -> None:
    random_ = random.Random(3)
    qwen2 = qwen2_files(materials, tmp_path)
    sources = {kind: {"vocab_file": FIXTURES / name} for kind, (_, name) in CASES.items() if name}
    for kind, files in {**sources, "Qwen2Tokenizer": qwen2}.items():
        for round_ in range(12):
            key = random_.choice(list(files))
            content = bytearray(files[key].read_bytes())
            for _ in range(round_ + 1):
                content[random_.randrange(len(content))] = random_.randrange(256)
            damaged = tmp_path / f"damaged{files[key].suffix}"
            damaged.write_bytes(content[: random_.choice([len(content), len(content) // 2, 3, 0])])
            error = error_of(kind, {**files, key: damaged})
            assert error is None or str(damaged) in str(error)


def error_of(kind: str, files: dict[str, Path]) -> UserError | None:
    """The error of the user that the files are; None: a tokenizer could be built."""
    try:
        built(kind, files)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("Qwen2Tokenizer", ["vocab_file"], "processor.tokenizer.merges_file is missing"),
        ("LlamaTokenizer", ["vocab_file"], "this is not a SentencePiece model"),
        ("Llama3Tokenizer", ["vocab_file"], "is not a token"),
    ],
)
def test_files_of_another_type(
    kind: str, files: list[str], message: str, materials: Workshop, tmp_path: Path
) -> None:
    named = qwen2_files(materials, tmp_path)
    with pytest.raises(UserError, match=message):
        built(kind, {key: named[key] for key in files})
