"""Folders with more than one set of complete weights: the choice is that of `transformers`,
and where nothing decides, both are named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.weights import verify
from launcher.weights.complete import choose
from launcher.weights.forms import INDEX_NAME
from launcher.weights.ranks.saves import open_any_format
from launcher.weights.source import check_one_kind, open_complete, weights_below

ROWS = 2
Build = Callable[[Path], object]


def file(name: str, *tensors: str, rows: int = ROWS, value: float = 0.0) -> Build:
    """A file of these tensors, of torch where its name says so."""

    def build(folder: Path) -> None:
        content = {tensor: torch.full((rows,), value) for tensor in tensors or ("l.0.w", "l.1.w")}
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)

    return build


def index(name: str, **files: str) -> Build:
    """An index: tensor (`_` for a dot) to file."""
    weight_map = {tensor.replace("_", "."): place for tensor, place in files.items()}
    return lambda folder: (folder / name).write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def shards(stem: str = "model", end: str = "safetensors", rows: int = ROWS) -> tuple[Build, Build]:
    names = [f"{stem}-0000{number}-of-00002.{end}" for number in (1, 2)]
    return file(names[0], "l.0.w", rows=rows), file(names[1], "l.1.w", rows=rows)


SHARDS = {"l_0_w": "model-00001-of-00002.safetensors", "l_1_w": "model-00002-of-00002.safetensors"}
WHOLE, INDEX = file("model.safetensors", value=1.0), index(INDEX_NAME, **SHARDS)
OTHER_SHARDS = shards(rows=3)
BINS = {k: v.replace("model", "pytorch_model").replace("safetensors", "bin")
        for k, v in SHARDS.items()}  # fmt: skip
BIN, BIN_INDEX = file("pytorch_model.bin"), index("pytorch_model.bin.index.json", **BINS)
MAP = index("param_name_map.json", l_0_w="part0.safetensors", l_1_w="part1.safetensors")
PARTS = file("part0.safetensors", "l.0.w"), file("part1.safetensors", "l.1.w")

TAKEN: dict[str, tuple[list[Build], str, str]] = {
    # what is in the folder: what is read, and what is passed over
    "new whole file, old shards": (
        [WHOLE, *shards(), INDEX], "model.safetensors", f"{INDEX_NAME} (2 files)"),
    "shards without an index": (
        [WHOLE, *shards()], "model.safetensors", "model-*-of-00002.safetensors (2 files)"),
    "shards that are gone": (
        [WHOLE, INDEX], "model.safetensors", f"{INDEX_NAME} (2 of its 2 files are gone)"),
    "one shard is gone": (
        [WHOLE, shards()[0], INDEX], "model.safetensors",
        f"{INDEX_NAME} (1 of its 2 files are gone)"),
    "an index that is cut short": (
        [WHOLE, lambda folder: (folder / INDEX_NAME).write_text('{"weight_map": {"l.0')],
        "model.safetensors", f"{INDEX_NAME} (which is not an index of weights)"),
    "shards in a folder of their own": (
        [file("parts/a.safetensors", "l.0.w"), file("parts/b.safetensors", "l.1.w"),
         index(INDEX_NAME, l_0_w="parts/a.safetensors", l_1_w="parts/b.safetensors")],
        "a.safetensors", ""),
    "a map of MindSpore whose parts are gone": (
        [WHOLE, MAP], "model.safetensors", "param_name_map.json (2 of its 2 files are gone)"),
    "shards that cannot be read": (
        [WHOLE, INDEX, *(lambda folder, n=name: (folder / n).write_bytes(b"") for name in
                         SHARDS.values())], "model.safetensors", f"{INDEX_NAME} (2 files)"),
    "an index of the whole file": (
        [WHOLE, index(INDEX_NAME, l_0_w="model.safetensors", l_1_w="model.safetensors")],
        "model.safetensors", ""),
    "both forms": ([WHOLE, BIN], "model.safetensors", "pytorch_model.bin"),
    "both forms in shards": (
        [*shards(), INDEX, *shards("pytorch_model", "bin"), BIN_INDEX],
        "model-00001-of-00002.safetensors", "pytorch_model-*-of-00002.bin (2 files)"),
    "lost shards, and a file of torch": (
        [INDEX, BIN], "pytorch_model.bin", f"{INDEX_NAME} (2 of its 2 files are gone)"),
    "another extension is not looked for": (
        [BIN, file("adapter_model.safetensors"), file("vision.safetensors", "v")],
        "pytorch_model.bin", "adapter_model.safetensors, vision.safetensors"),
    "a variant": ([WHOLE, file("model.fp16.safetensors")], "model.safetensors",
                  "model.fp16.safetensors"),
    "a variant of shards, with its own index": (
        [WHOLE, *shards("model.fp16"), index("model.safetensors.index.fp16.json", **SHARDS)],
        "model.safetensors", "model.fp16-00001-of-00002.safetensors"),
    "variants of torch": ([BIN, file("pytorch_model.fp16.bin")], "pytorch_model.bin",
                          "pytorch_model.fp16.bin"),
    "a variant alone": ([file("model.bf16.safetensors")], "model.bf16.safetensors", ""),
    "weights as Meta names them": (
        [*shards(), INDEX, file("consolidated.safetensors", "tok"),
         file("original/consolidated.00.pth", "tok")],
        "model-00001-of-00002.safetensors", "consolidated.safetensors, original/"),
    "what a trainer leaves": (
        [WHOLE, *(file(name, "s") for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth",
                                               "training_args.bin"))], "model.safetensors", ""),
    "MindSpore's complete weights": (
        [MAP, *PARTS, file("hyper_param.safetensors", "step_num", rows=1)],
        "part0.safetensors", ""),
    "MindSpore's, with an index of Hugging Face": (
        [MAP, *PARTS, index(INDEX_NAME, l_0_w="part0.safetensors", l_1_w="part1.safetensors")],
        "part0.safetensors", ""),
    "files that no index names": ([file("a.safetensors", "l.0.w"), file("b.safetensors", "l.1.w")],
                                  "a.safetensors", ""),
    "a head in one of them": (
        [file("model.safetensors", "l.0.w", "l.1.w", "lm_head.weight"), *shards(), INDEX],
        "model.safetensors", f"{INDEX_NAME} (2 files)"),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_one_set_is_read_and_the_others_are_named(tmp_path: Path, case: str) -> None:
    built, taken, passed_over = TAKEN[case]
    for build in built:
        build(tmp_path)
    said: list[str] = []
    source = open_any_format(tmp_path, log=said.append)
    assert next(iter(source.headers)).name == taken
    assert {"l.0.w", "l.1.w"} <= source.tensors.keys()
    if passed_over:
        (line,) = said
        assert line.startswith(f"{tmp_path}: ")
        assert f"as transformers does; passed over: {passed_over}" in line
    else:
        assert not said
    assert open_complete(tmp_path).headers.keys() == source.headers.keys()
    verdict = verify(tmp_path)
    assert not verdict.faults
    assert list(verdict.remarks) == said


REFUSED: dict[str, tuple[list[Build], tuple[str, ...]]] = {
    "two models": ([WHOLE, *OTHER_SHARDS, INDEX], (
        "model.safetensors", f"{INDEX_NAME} (2 files)",
        "`l.0.w` is [2] in one, [3] in another")),
    "more layers": ([file("model.safetensors", "l.0.w", "l.1.w", "l.2.w"), *shards(), INDEX], (
        "`l.2.w` is in one of them alone",)),
    "shards of another model": ([WHOLE, *OTHER_SHARDS], ("model-*-of-00002.safetensors",)),
    "a map of MindSpore": ([WHOLE, MAP, *PARTS], ("model.safetensors", "param_name_map.json")),
    "two indexes": ([*shards(), INDEX, MAP, *PARTS], (INDEX_NAME, "param_name_map.json")),
    "two sets of torch": ([BIN, *shards("pytorch_model", "bin"), BIN_INDEX], (
        "pytorch_model.bin and pytorch_model.bin.index.json (2 files)",)),
    "shards of torch without an index": ([BIN, *shards("pytorch_model", "bin")], (
        "pytorch_model.bin and pytorch_model-*-of-00002.bin (2 files)",)),
    "two counts of shards": (
        [*shards(), *(file(f"model-0000{n}-of-00003.safetensors", f"x.{n}") for n in (1, 2, 3))],
        ("model-*-of-00002.safetensors (2 files) and model-*-of-00003.safetensors (3 files)",)),
    "nothing but variants": (
        [file("model.fp16.safetensors"), file("model.bf16.safetensors")],
        ("model.bf16.safetensors and model.fp16.safetensors",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_where_nothing_decides_both_are_named(tmp_path: Path, case: str) -> None:
    built, names = REFUSED[case]
    for build in built:
        build(tmp_path)
    for look in (open_complete, open_any_format, choose):
        with pytest.raises(UserError) as caught:
            look(tmp_path)
        said = str(caught.value)
        assert said.startswith(f"{tmp_path} holds two sets of weights: ")
        assert all(name in said for name in names)
    assert verify(tmp_path).faults[0].startswith(f"{tmp_path} holds two sets of weights")


def test_a_shard_that_no_index_misses_is_named(tmp_path: Path) -> None:
    shards()[1](tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        open_complete(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} lacks 1 file of model-*-of-00002.safetensors: "
        "model-00001-of-00002.safetensors: by the names of the others there are 2. The "
        "download of model-00001-of-00002.safetensors.incomplete was not finished. Copy the "
        "missing files beside the others."
    )


def test_a_whole_file_that_is_cut_short_is_not_passed_over(tmp_path: Path) -> None:
    for build in (WHOLE, *shards(), INDEX):
        build(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"model\.safetensors is not a valid safetensors file"):
        open_complete(tmp_path)


def test_rank_folders_beside_complete_weights(tmp_path: Path) -> None:
    """Those of logs do no harm."""
    WHOLE(tmp_path)
    file("rank_0/worker.log.bin", "s")(tmp_path)
    (tmp_path / "rank_0/worker.log.bin").rename(tmp_path / "rank_0/worker.log")
    assert open_any_format(tmp_path).kind == "complete"
    file("rank_0/net_rank_0-1_1.safetensors")(tmp_path)
    for look in (check_one_kind, open_any_format, verify):
        with pytest.raises(UserError) as caught:
            look(tmp_path)
        assert "two sets of weights: model.safetensors and rank_0/" in str(caught.value)
        assert f"One of them is `{tmp_path / 'model.safetensors'}`" in str(caught.value)
    assert open_any_format(tmp_path / "model.safetensors").kind == "single"


def test_the_index_may_list_what_a_model_derives(tmp_path: Path) -> None:
    """A head that is tied and a table of angles may be in no file; a weight may not."""
    for build in shards():
        build(tmp_path)
    INDEX(tmp_path)
    content = json.loads((tmp_path / INDEX_NAME).read_text())
    for name in ("lm_head.weight", "h.0.rotary_emb.inv_freq"):
        content["weight_map"][name] = SHARDS["l_1_w"]
    (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    assert open_complete(tmp_path).promised.keys() == {"lm_head.weight", "h.0.rotary_emb.inv_freq"}
    verdict = verify(tmp_path)
    assert not verdict.faults
    assert "lacks `lm_head.weight`, which the index lists" in " ".join(verdict.remarks)
    content["weight_map"]["l.2.w"] = SHARDS["l_1_w"]
    (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lacks `l\.2\.w`: the index beside it lists"):
        open_complete(tmp_path)


def test_a_link_to_a_file_that_is_gone_is_gone(tmp_path: Path) -> None:
    """As in a cache of the hub that was cleared."""
    for build in (*shards(), INDEX):
        build(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("blobs/1")
    assert len(open_complete(tmp_path).headers) == 2
    (tmp_path / SHARDS["l_0_w"]).unlink()
    (tmp_path / SHARDS["l_0_w"]).symlink_to("blobs/2")
    with pytest.raises(UserError, match="is a link to blobs/2 that cannot be followed"):
        open_complete(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    WHOLE(tmp_path)
    assert [path.name for path in open_complete(tmp_path).headers] == ["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "net.safetensors"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("../../blobs/1f")
    with pytest.raises(UserError) as caught:
        open_complete(tmp_path)
    assert f"{tmp_path / name} is a link to ../../blobs/1f that cannot be followed" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("places", "nearest"),
    [
        (["checkpoint-9", "checkpoint-10", "runs"], "checkpoint-10"),
        (["checkpoint", "checkpoint-10"], "checkpoint"),
        (["snapshots/1f2e", "blobs"], "snapshots/1f2e"),
    ],
)
def test_the_way_down_to_weights(tmp_path: Path, places: list[str], nearest: str) -> None:
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        if place not in ("runs", "blobs"):
            WHOLE(tmp_path / place)
    assert weights_below(tmp_path) == f"did you mean `{tmp_path / nearest}`?"
