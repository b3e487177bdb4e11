"""Bad files and folders: the error has four parts, and nothing of them is loaded.

Each row of the first table builds a folder that is wrong in one way. `{folder}` in a text stands
for it. What is right in spite of its look is at the end.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.layout.mesh import Mesh
from launcher.weights.formats.rank_metadata import BLOCK_BYTES, Checksums, RankFileMetadata
from launcher.weights.formats.safetensors import Slot, header_bytes, read_header
from launcher.weights.forms import INDEX_NAME
from launcher.weights.ranks.distributed import check_copies, open_rank_files
from launcher.weights.reading.load import load
from launcher.weights.source import Source, detect, open_complete
from tests.weights.test_load import cut, empty_like, model, save

AGAIN = "Copy the file again from its origin; nothing was loaded from it."
ORIGIN = "Copy it again from its origin."
OTHER_RUN = "Move the files of the other run away."


@dataclass(frozen=True)
class Bad:
    """A folder that is wrong, how it is opened, and what the user must be told."""

    name: str
    build: Callable[[Path], Any]
    says: str
    open: Callable[[Path], Source]


def open_ranks(folder: Path) -> Source:
    """The rank files of a folder, as a tool opens one without a manifest."""
    source = open_rank_files(folder, sorted(folder.glob("rank_*/*.safetensors")))
    check_copies(source)
    return source


# --- complete weights -------------------------------------------------------------------------


def right(folder: Path, name: str = "model.safetensors", tensor: str = "w") -> Path:
    """A file with the tensor `w`, [2], float32: 64 bytes of header and 8 of data."""
    path = folder / name
    path.write_bytes(header_bytes([Slot(tensor, "F32", (2,))], {}) + bytes(8))
    return path


def cut_short(folder: Path) -> None:
    path = right(folder)
    os.truncate(path, path.stat().st_size - 3)


def claims(header: bytes, length: int | None = None) -> Callable[[Path], Any]:
    """A file with this header, which says that it has `length` bytes."""

    def build(folder: Path) -> None:
        claim = len(header) if length is None else length
        (folder / "model.safetensors").write_bytes(claim.to_bytes(8, "little") + header)

    return build


def index(*files: object) -> Callable[[Path], Any]:
    """An index that names these files, and the file `a.safetensors`."""

    def build(folder: Path) -> None:
        right(folder, "a.safetensors")
        content = {"weight_map": {f"w{number}": file for number, file in enumerate(files)}}
        (folder / INDEX_NAME).write_text(json.dumps(content))

    return build


def index_says(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / INDEX_NAME).write_text(text)


def two_of_one_tensor(folder: Path) -> None:
    right(folder, "model-a.safetensors")
    right(folder, "model-b.safetensors")


FILE = "{folder}/model.safetensors"
INDEX = f"{{folder}}/{INDEX_NAME}"
NOT_WHOLE = f"{FILE} is not a valid safetensors file: "
NO_INDEX = f"{INDEX} is not an index of weights: it needs a map named `weight_map` from tensor to "
COMPLETE = (
    Bad("cut short", cut_short,
        f"{NOT_WHOLE}its tensors end at byte 4104, the file at 4101. {AGAIN}", open_complete),
    Bad("header past the end", claims(b"{}", 500),
        f"{NOT_WHOLE}it has 10 bytes and its header claims 500. {AGAIN}", open_complete),
    Bad("not JSON", claims(b"{w: 1}"),
        f"{NOT_WHOLE}its header is not JSON (Expecting property name enclosed in double quotes: "
        f"line 1 column 2 (char 1)). {AGAIN}", open_complete),
    Bad("a key twice", claims(b'{"w": 1, "w": 2}'),
        f"{NOT_WHOLE}duplicate key in its header. {AGAIN}", open_complete),
    Bad("half a character", claims(b'{"\\ud800": {}}'),
        f"{NOT_WHOLE}its header is not JSON ('utf-8' codec can't encode character '\\ud800' in "
        f"position 2: surrogates not allowed). {AGAIN}", open_complete),
    Bad("unknown dtype", claims(b'{"w": {"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}}'),
        f"{NOT_WHOLE}`w` has the unknown dtype 'F4'. {AGAIN}", open_complete),
    Bad("dtype is a list", claims(b'{"w": {"dtype": [], "shape": [0], "data_offsets": [0, 0]}}'),
        f"{NOT_WHOLE}`w` has the unknown dtype []. {AGAIN}", open_complete),
    Bad("index names a missing file", index("a.safetensors", "gone.safetensors"),
        f"{INDEX} names 1 file that cannot be found: gone.safetensors: all files of an index lie "
        "beside it. Copy the missing files beside the index.", open_complete),
    Bad("index names a file outside", index("../a.safetensors"),
        f"{NO_INDEX}file (`w0` is in '../a.safetensors', which is not a file beside or "
        f"below it). {ORIGIN}", open_complete),
    Bad("index names a file by its whole path", index("/etc/hostname"),
        f"{NO_INDEX}file (`w0` is in '/etc/hostname', which is not a file beside or below it). "
        f"{ORIGIN}", open_complete),
    Bad("index names the folder above", index(".."),
        f"{NO_INDEX}file (`w0` is in '..', which is not a file beside or below it). {ORIGIN}",
        open_complete),
    Bad("index names a number", index(3),
        f"{NO_INDEX}file (`w0` is in 3, which is not a file beside or below it). {ORIGIN}",
        open_complete),
    Bad("index names a file too long to be", index("n" * 300),
        f"{NO_INDEX}file (`w0` is in '{'n' * 288}). {ORIGIN}", open_complete),
    Bad("index of another tensor", index("a.safetensors"),
        "{folder}/a.safetensors lacks `w0`: the index beside it lists it there. Copy "
        "both again from their origin.", open_complete),
    Bad("index is a list", index_says("[1]"), f"{NO_INDEX}file (TypeError). {ORIGIN}",
        open_complete),
    Bad("index is no JSON", index_says("{"),
        f"{NO_INDEX}file (Expecting property name enclosed in double quotes: line 1 column 2 "
        f"(char 1)). {ORIGIN}", open_complete),
    Bad("a tensor in two files", two_of_one_tensor,
        "{folder}: `w` is in two files: model-a.safetensors and model-b.safetensors: complete "
        "weights hold each tensor once. Move away the files that do not belong to this model.",
        open_complete),
    Bad("a pipe as a file", lambda folder: os.mkfifo(folder / "model.safetensors"),
        f"{FILE} is not a file. Give a safetensors file.", open_complete),
    Bad("a pipe itself", lambda folder: os.mkfifo(folder / "model.safetensors"),
        f"{FILE} is not a file. Give a safetensors file.",
        lambda folder: open_complete(folder / "model.safetensors")),
    Bad("a folder as a file", lambda folder: (folder / "model.safetensors").mkdir(),
        f"{FILE} cannot be read: Is a directory.", open_complete),
    Bad("a link to itself as a file",
        lambda folder: (folder / "model.safetensors").symlink_to("model.safetensors"),
        f"{FILE} is a link to model.safetensors that cannot be followed: Too many levels of "
        "symbolic links: the cache of the Hub has links, to files of a folder beside it (blobs/). "
        "Download it again, or copy the files that the links lead to.", open_complete),
    Bad("a link to itself as a folder", lambda folder: (folder / "loop").symlink_to("loop"),
        "{folder}/loop cannot be read: Too many levels of symbolic links.",
        lambda folder: open_complete(folder / "loop")),
    Bad("nothing there", lambda folder: None,
        "{folder}/gone cannot be read: No such file or directory.",
        lambda folder: open_complete(folder / "gone")),
    Bad("an empty folder", lambda folder: None,
        "{folder} holds no weights: complete weights are *.safetensors, or files of torch (*.bin, "
        "*.pt, *.ckpt). It holds: nothing.", open_complete),
    Bad("hidden files only", lambda folder: right(folder, "._model.safetensors"),
        "{folder} holds no weights: complete weights are *.safetensors, or files of torch (*.bin, "
        "*.pt, *.ckpt). It holds: ._model.safetensors.", open_complete),
)  # fmt: skip


# --- rank files -------------------------------------------------------------------------------


def replicated(folder: Path) -> list[Path]:
    return save(folder, model(), Mesh(dp_replicate=2))


def sharded(folder: Path) -> list[Path]:
    return save(folder, model(), Mesh(dp_shard=2))


def two_layouts(folder: Path) -> None:
    sharded(folder)
    replicated(folder / "other")[1].replace(folder / "rank_1" / "m_rank_1-1_1.safetensors")


def two_runs(mesh: Mesh) -> Callable[[Path], Any]:
    """Rank 1 is of another run, in the same layout."""

    def build(folder: Path) -> None:
        files = save(folder, model(0), mesh)
        save(folder / "other", model(1), mesh)[1].replace(files[1])

    return build


def two_of_one_rank(folder: Path) -> None:
    first = sharded(folder)[0]
    first.with_name("other_rank_0-1_1.safetensors").write_bytes(first.read_bytes())


def rank_file(folder: Path, number: int, shape: tuple[int, ...], **changes: Any) -> Path:
    """A file of one of two ranks that holds the first [2] of `w`, which has `shape`."""
    note = RankFileMetadata(2, number, {"dp_replicate": 2}, {"w": (shape, Box((0,), (2,)))},
                Checksums(BLOCK_BYTES, ()))  # fmt: skip
    text = json.dumps({**json.loads(note.text(("0" * 16,))), **changes})
    path = folder / f"rank_{number}" / f"m_rank_{number}-1_1.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header_bytes([Slot("w", "F32", (2,))], {"slipway": text}) + bytes(8))
    return path


def two_shapes(folder: Path) -> None:
    rank_file(folder, 0, (2,))
    rank_file(folder, 1, (3,))


def noted(**changes: Any) -> Callable[[Path], Any]:
    return lambda folder: rank_file(folder, 0, (2,), **changes)


def foreign(folder: Path) -> None:
    (folder / "rank_0").mkdir()
    right(folder / "rank_0")


def placed(boxes: Any, shape: Any = (2,)) -> Callable[[Path], Any]:
    return noted(tensors={"w": {"shape": shape, "boxes": boxes}})


RANK_0, RANK_1 = (f"{{folder}}/rank_{rank}/m_rank_{rank}-1_1.safetensors" for rank in (0, 1))
DAMAGED = f"{RANK_0} is damaged: "
CHOOSE = "Choose another checkpoint."
NO_NOTE = f"{DAMAGED}its `slipway` metadata cannot be read. {CHOOSE}"
RANKS = (
    Bad("no rank files", lambda folder: (folder / "rank_0").mkdir(),
        "{folder} holds no rank files: *.safetensors or *.ckpt in rank_*/ is expected.",
        open_ranks),
    Bad("of another program", foreign,
        "{folder}/rank_0/model.safetensors does not describe its layout: rank "
        "files have the layout in their metadata, as Slipway writes it. Move the files of other "
        "programs away.",
        open_ranks),
    Bad("two layouts", two_layouts,
        "{folder} mixes two saves: m_rank_0-1_1.safetensors is of 2 ranks (dp_shard 2), "
        "m_rank_1-1_1.safetensors of 2 ranks (dp_replicate 2): all ranks of a save have one "
        f"layout. {OTHER_RUN}", open_ranks),
    Bad("two runs, of replicas", two_runs(Mesh(dp_replicate=2)),
        f"`scalar` differs in {RANK_0} and {RANK_1}: replicas of one save are equal: these files "
        f"are of two runs or steps. {OTHER_RUN}", open_ranks),
    Bad("two runs, of shards with one copied scalar", two_runs(Mesh(dp_shard=2)),
        f"`scalar` differs in {RANK_0} and {RANK_1}: replicas of one save are equal: these files "
        f"are of two runs or steps. {OTHER_RUN}", open_ranks),
    Bad("two files of one rank", two_of_one_rank,
        "{folder}: {folder}/rank_0/other_rank_0-1_1.safetensors was written by rank 0 of 2: a "
        f"save has one file for each rank; {RANK_0} is of that rank too. {OTHER_RUN}", open_ranks),
    Bad("rank out of range", noted(rank=5),
        f"{{folder}}: {RANK_0} was written by rank 5 of 2: a save has one file for each rank. "
        f"{OTHER_RUN}", open_ranks),
    Bad("two shapes of one tensor", two_shapes,
        f"{{folder}}: `w` is F32 [2] in {RANK_0}, F32 [3] in {RANK_1}: shape and dtype of a "
        f"tensor are the same on all ranks of a save. {OTHER_RUN}", open_ranks),
    Bad("a rank lost that nobody replaces", lambda folder: sharded(folder)[1].unlink(),
        "{folder} does not hold all of `embed` (28 of 52 elements), `norm` (3 of 5 elements), "
        "`proj` (16 of 24 elements): rank 1 has no valid file in {folder}, and no other rank "
        "holds its parts. Copy the missing rank folders, or choose another checkpoint.",
        open_ranks),
    Bad("a hole", placed([[[0], [2]]], [3]),
        "{folder} does not hold all of `w` (2 of 3 elements): rank 1 has no valid file in "
        "{folder}, and no other rank holds its parts. Copy the missing rank folders, or choose "
        "another checkpoint.", open_ranks),
    Bad("more ranks than there can be", noted(world_size=2**62, tensors={
            "w": {"shape": [3], "boxes": [[[0], [2]]]}}),
        "{folder} does not hold all of `w` (2 of 3 elements): ranks 1, 2, 3, 4, 5 ... have no "
        "valid file in {folder}, and no other rank holds their parts. Copy the missing rank "
        "folders, or choose another checkpoint.", open_ranks),
    Bad("box outside", placed([[[1], [2]]]),
        f"{DAMAGED}the box of `w` is not inside its shape [2]. {CHOOSE}", open_ranks),
    Bad("box of another size", placed([[[0], [1]]]),
        f"{DAMAGED}`w` has shape [2], its box [1]. {CHOOSE}", open_ranks),
    Bad("two boxes", placed([[[0], [1]], [[1], [1]]]),
        f"{DAMAGED}its metadata has no box for `w`. {CHOOSE}", open_ranks),
    Bad("box that is half an element off", placed([[[0.5], [2]]], [3]), NO_NOTE, open_ranks),
    Bad("size that is no whole number", placed([[[0], [2.0]]]), NO_NOTE, open_ranks),
    Bad("size that is a truth", placed([[[False], [2]]]), NO_NOTE, open_ranks),
    Bad("shape too large to print", placed([[[0], [2]]], [10**4000]), NO_NOTE, open_ranks),
    Bad("blocks that need too much memory", noted(checksum={
            "algorithm": "xxh3_64", "block_bytes": 1 << 40, "values": ["0" * 16]}),
        NO_NOTE, open_ranks),
    Bad("too many checksums", noted(checksum={
            "algorithm": "xxh3_64", "block_bytes": BLOCK_BYTES, "values": ["0" * 16] * 2}),
        NO_NOTE, open_ranks),
    Bad("axis that cannot be printed", noted(mesh={"\ud800": 2}), NO_NOTE, open_ranks),
    Bad("another version", noted(version=2),
        f"{RANK_0} has the format 2: this version reads format 1. Install the version that wrote "
        "it, or a newer one.", open_ranks),
)  # fmt: skip


@pytest.mark.timeout(60)  # a pipe that is waited for would never end
@pytest.mark.parametrize("bad", COMPLETE + RANKS, ids=lambda bad: bad.name)
def test_what_is_wrong_is_told(tmp_path, bad: Bad) -> None:
    bad.build(tmp_path)
    with pytest.raises(UserError) as caught:
        bad.open(tmp_path)
    assert str(caught.value).replace(str(tmp_path), "{folder}") == bad.says


@pytest.mark.parametrize("name", ["folder", "file"])
def test_what_may_not_be_read_is_told(name: str) -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        right(folder)
        os.chmod(folder, 0o755)
        locked = folder / "model.safetensors" if name == "file" else folder
        os.chmod(locked, 0)
        reported = as_nobody(lambda: open_complete(folder))
        os.chmod(folder, 0o700)
    what = "cannot be listed" if name == "folder" else "cannot be read"
    assert reported.startswith(f"{locked} {what}: Permission denied.")


def as_nobody(function: Callable[[], Any]) -> str:
    """What the user `function` ends in tells, without the rights of root."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "nothing was wrong"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            function()
        except BaseException as error:
            answer = str(error) if isinstance(error, UserError) else repr(error)
        os.write(writer, pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = pickle.loads(file.read())
    os.waitpid(child, 0)
    return str(answer)


# --- what does not fit the model --------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_table(tmp_path) -> None:
    save_file(
        {"same": torch.ones(2), "kind": torch.ones(3, dtype=torch.int32), "more": torch.ones(1),
         "shape": torch.ones(4, 2), "half": torch.ones(5, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
    )  # fmt: skip
    wanted = {"same": torch.ones(2), "kind": torch.ones(3), "gone": torch.ones(2, 2),
              "shape": torch.ones(4, 3), "half": torch.ones(5)}  # fmt: skip
    targets = empty_like(cut(wanted, Mesh(), 0))
    with pytest.raises(UserError) as caught:
        load(targets, open_complete(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: the weights do not fit the model (1 missing, 1 extra, 2 of another shape or "
        "dtype): every parameter is written exactly once. Give the weights of this model, or "
        "correct model.model_config; shapes and dtypes must agree\n"
        "  tensor      in the files      in the model\n"
        "  gone            missing            [2, 2]\n"
        "  more                [1]           unknown\n"
        "  kind              int32           float32\n"
        "  shape            [4, 2]            [4, 3]"
    )
    assert all(target.tensor.isnan().all() for target in targets.values())


# --- what is right in spite of its look -------------------------------------------------------


def test_a_lost_rank_whose_copy_another_has_is_replaced_and_told(tmp_path) -> None:
    tensors = model()
    save(tmp_path, tensors, Mesh(dp_replicate=2, dp_shard=2))[1].unlink()
    source = open_ranks(tmp_path)
    assert source.remarks == (
        f"{tmp_path}: rank 1 has no valid file; its parts are read from the ranks that hold the "
        "same",
    )
    targets = empty_like(cut(tensors, Mesh(), 0))
    load(targets, source, rank=0)
    assert all(torch.equal(targets[name].tensor, tensor) for name, tensor in tensors.items())


def test_hidden_and_unfinished_files_and_links_out_of_the_folder_do_no_harm(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("._model.safetensors", ".model.safetensors", "model.safetensors.tmp", "notes.txt"):
        (folder / name).write_bytes(b"not weights")
    (folder / "model.safetensors").symlink_to(right(tmp_path, "blob"))
    assert detect(folder) == "complete"
    assert list(open_complete(folder).headers) == [folder / "model.safetensors"]


def test_only_small_tensors_are_compared(tmp_path) -> None:
    """One of more than a mebibyte is not, however it differs; one behind it is."""
    large = {"large": torch.zeros((1 << 18) + 1), "small": torch.zeros(3)}
    files = save(tmp_path, large, Mesh(dp_replicate=2))
    start = read_header(files[1]).entries["large"].start
    with open(files[1], "r+b") as file:
        file.seek(start)
        file.write(b"\1")
    open_ranks(tmp_path)
    with open(files[1], "r+b") as file:
        file.seek(read_header(files[1]).entries["small"].start)
        file.write(b"\1")
    with pytest.raises(UserError, match="`small` differs in"):
        open_ranks(tmp_path)
