"""Files of torch load to the same tensors as their safetensors twin; nothing in them is run.

`torch.load` is what our reading is compared with.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.layout.mesh import Mesh
from launcher.weights.formats import header_of
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.reading.load import load
from launcher.weights.reading.tensor_bytes import DTYPE_NAMES
from launcher.weights.source import open_complete
from tests.weights.content import content
from tests.weights.test_fuzz import reported
from tests.weights.test_load import cut, empty_like, model


def bytes_of(tensor: torch.Tensor) -> bytes:
    """In C order, whatever the strides."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What we read in the file at `path` are `tensors`, bit for bit."""
    assert content(open_complete(path)) == {
        name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), bytes_of(tensor))
        for name, tensor in tensors.items()
    }


GENERATOR = torch.Generator().manual_seed(0)
BASE = torch.randn(6, 8, generator=GENERATOR)
DTYPES = [dtype for dtype in DTYPE_NAMES if dtype != torch.complex64]

VIEWS = {
    "all": BASE,
    "rows": BASE[2:5],
    "columns": BASE[:, 3:5],
    "transposed": BASE.t(),
    "every other": BASE[::2, 1::3],
    "one row many times": BASE[:1].expand(5, 8),
    "one element": BASE[3, 4],
    "in three dims": BASE.view(2, 3, 8).permute(2, 0, 1),
    "nothing": BASE[:0],
    "nothing, wide": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


def test_views_of_one_storage(tmp_path) -> None:
    torch.save(VIEWS, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 6000, "the views share a storage"
    assert_same(tmp_path / "w.pt", VIEWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(tmp_path, dtype: torch.dtype) -> None:
    raw = torch.arange(48 * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = raw.view(dtype).view(6, 8)
    tensors = {"w": tensor, "part": tensor[1:3, 2:], "alone": tensor[:2].clone()}
    torch.save(tensors, tmp_path / "w.bin")
    assert_same(tmp_path / "w.bin", tensors)


class Tied(torch.nn.Module):
    """Two names for one parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))


def parameter_with_attribute() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.rank_metadata = "kept by torch, left out by us"  # type: ignore[attr-defined]
    return parameter


def tensor_with_attribute() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.rank_metadata = "kept by torch, left out by us"  # type: ignore[attr-defined]
    return tensor


WEIGHTS = {"a": torch.ones(2), "b": torch.zeros(3)}
OTHERS = {
    "epoch": 3, "name": "run", "bytes": b"x", "list": [1, 2.5, None, True], "pair": (1, "x"),
    "size": torch.Size([2]), "dtype": torch.bfloat16, "device": torch.device("cpu"), 7: "seven",
    "complex": 1j, "set": {1, 2}, "large": 1 << 70, "optimizer": {"state": {0: torch.ones(4)}},
}  # fmt: skip
FORMS: dict[str, tuple[Any, dict[str, torch.Tensor]]] = {
    "map": (WEIGHTS, WEIGHTS),
    "ordered map": (OrderedDict(WEIGHTS), WEIGHTS),
    "state of a module": (Tied().state_dict(), {}),
    "parameters": (dict(Tied().named_parameters(remove_duplicate=False)), {}),
    "attributes": ({"p": parameter_with_attribute(), "t": tensor_with_attribute()}, {}),
    "state_dict": ({"state_dict": WEIGHTS, **OTHERS}, WEIGHTS),
    "model": ({"model": WEIGHTS, **OTHERS}, WEIGHTS),
    "module": ({"module": OrderedDict(WEIGHTS), **OTHERS}, WEIGHTS),
    "twice": ({"module": {"model": WEIGHTS}, "lr": torch.tensor(0.1)}, WEIGHTS),
    "what is no tensor": ({**WEIGHTS, **OTHERS}, WEIGHTS),
    "no weights under a key": ({**WEIGHTS, "model": "llama", "module": {"x": 1}}, WEIGHTS),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form: str, protocol: int) -> None:
    saved, expected = FORMS[form]
    torch.save(saved, tmp_path / "w.pth", pickle_protocol=protocol)
    assert_same(tmp_path / "w.pth", expected or dict(saved))


def test_tied_weights_are_the_same_bytes_of_the_file(tmp_path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "w.bin")
    header = header_of(tmp_path / "w.bin")
    assert header.entries["embed.weight"] == header.entries["head.weight"]


def test_equal_files_have_equal_digests_and_others_have_not(tmp_path) -> None:
    for name, tensors in (("a", WEIGHTS), ("b", WEIGHTS), ("c", {"c": torch.ones(1)})):
        torch.save(tensors, tmp_path / name)
    digests = [header_of(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


# --- folders ----------------------------------------------------------------------------------


def one_file(name: str, key: str = "") -> Callable[[Path, dict[str, torch.Tensor]], None]:
    """Writes a folder with one file of torch."""

    def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        torch.save({key: tensors, "epoch": 1} if key else tensors, folder / name)

    return write


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[:2],
              "pytorch_model-00002-of-00002.bin": names[2:]}  # fmt: skip
    for file, held in shards.items():
        torch.save({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"state": {}}, folder / "training_args.bin")


def transposed(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Every matrix stored column by column."""
    stored = {
        name: tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }
    torch.save(stored, folder / "pytorch_model.bin")


FOLDERS = {
    "pytorch_model.bin": one_file("pytorch_model.bin"),
    "model.pt": one_file("model.pt"),
    "weights.ckpt, nested": one_file("weights.ckpt", "state_dict"),
    "weights.pth, nested": one_file("weights.pth", "model"),
    "sharded": sharded,
    "transposed": transposed,
}
MESHES = (Mesh(), Mesh(dp_shard=3), Mesh(dp_replicate=2, dp_shard=2), Mesh(dp_shard=8))


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_load_as_their_safetensors_twin_does(tmp_path, folder: str) -> None:
    tensors = {**model(), "half": torch.randn(7, 3, generator=GENERATOR).bfloat16()}
    (tmp_path / "twin").mkdir()
    (tmp_path / "torch").mkdir()
    save_file(tensors, tmp_path / "twin" / "model.safetensors")
    FOLDERS[folder](tmp_path / "torch", tensors)
    for mesh in MESHES:
        for rank in range(mesh.world_size):
            loaded = []
            for name in ("twin", "torch"):
                targets = empty_like(cut(tensors, mesh, rank))
                load(targets, open_complete(tmp_path / name), rank=rank)
                loaded.append({name: bytes_of(shard.tensor) for name, shard in targets.items()})
            assert loaded[0] == loaded[1]


def test_of_both_forms_of_a_model_safetensors_are_read(tmp_path) -> None:
    sharded(tmp_path, model())
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert_same(tmp_path, {"w": torch.ones(2)})


# --- what is refused --------------------------------------------------------------------------


class Runs:
    """An object whose pickle calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Weights(torch.Tensor):
    """A kind of tensor that a file brings along."""


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive(data: bytes | None = None, compression: int = zipfile.ZIP_STORED,
            **changed: bytes | None) -> bytes:  # fmt: skip
    """A file of torch, written again: members `changed` (None: left out), compressed or not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data or saved(WEIGHTS))) as old:
        members = {name: old.read(name) for name in old.namelist()}
    for name, value in changed.items():
        members[f"archive/{name.replace('__', '/').replace('_pkl', '.pkl')}"] = value
    with zipfile.ZipFile(buffer, "w", compression) as new:
        for name, value in members.items():
            if value is not None:
                new.writestr(name, value)
    return buffer.getvalue()


def twice_one_name() -> bytes:
    buffer = io.BytesIO(archive())
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer, "a") as file:
        file.writestr("archive/data/0", bytes(8))
    return buffer.getvalue()


def pickled(*instructions: bytes) -> bytes:
    """A file of torch whose pickle is these instructions."""
    return archive(data_pkl=b"\x80\x02" + b"".join(instructions) + b".")


def old_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def conjugate() -> torch.Tensor:
    return torch.ones(2, dtype=torch.complex64).conj()


NOTHING_RUN = "tensors, numbers, texts, lists and maps are read, and nothing in a file is run"
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a command": (lambda: saved({**WEIGHTS, "x": Runs(os.system, "touch run")}),
                  "{path} refers to posix.system, which is not allowed: " + NOTHING_RUN),
    "code": (lambda: saved({"x": Runs(eval, "open('run', 'w')")}), "refers to __builtin__.eval, "),
    "a command, protocol 0": (lambda: archive(data_pkl=b"cposix\nsystem\n(S'touch run'\ntR."),
                              "refers to posix.system, which is not allowed"),
    "an instance": (lambda: archive(data_pkl=b"(S'touch run'\niposix\nsystem\n."),
                    "refers to posix.system, which is not allowed"),
    "an attribute that is asked for": (lambda: saved({"m": Runs(getattr, "text", "upper")}),
                               "refers to __builtin__.getattr, which is not allowed"),
    "a module": (lambda: saved(torch.nn.Linear(1, 1)),
                 "refers to torch.nn.modules.linear.Linear, which is not allowed"),
    "a tensor of another kind": (lambda: saved({"w": torch.ones(2).as_subclass(Weights)}),
                                 "_rebuild_tensor_v2 for a tests.weights.test_torch_files.Weights"),
    "a sparse tensor": (lambda: saved({"w": torch.eye(2).to_sparse()}),
                        "refers to torch._utils._rebuild_sparse_tensor, which is not allowed"),
    "a dtype safetensors has not": (lambda: saved({"w": torch.ones(2, dtype=torch.complex128)}),
                                    "{path}: `w` has the dtype ComplexDouble: these are read: "),
    "not yet conjugated": (lambda: saved({"w": conjugate()}), "`w` has the dtype C64 conj"),
    "no tensor": (lambda: saved({"epoch": 3, "lr": 0.1}),
                  "{path} holds no weights: a map from name to tensor is expected, alone or under "
                  "'state_dict', 'model', 'module', 'model_state_dict'. It holds: epoch, lr."),
    "a list of tensors": (lambda: saved([torch.ones(2)]), "{path} holds no weights"),
    "two sets of weights": (lambda: saved({"model": WEIGHTS, "state_dict": WEIGHTS}),
                            "{path} holds weights as 'state_dict' and as 'model'"),
    "compressed": (lambda: archive(compression=zipfile.ZIP_DEFLATED),
                   "{path} is compressed: its member byteorder: tensors are read in place"),
    "another archive": (lambda: archive(data_pkl=None), "archive that torch.save did not write"),
    "a program": (lambda: archive(constants_pkl=b""), "{path} holds a program of TorchScript"),
    "big end first": (lambda: archive(byteorder=b"big"), "is big-endian"),
    "no byte order": (lambda: archive(byteorder=b"?"), "byteorder is neither little nor big"),
    "a storage missing": (lambda: archive(data__1=None), "the member data/1 is missing"),
    "a storage too short": (lambda: archive(data__1=bytes(8)),
                            "`b` ends at byte 12 of a storage of 8"),
    "one name twice": (twice_one_name, "two of its members have one name"),
    "no end of a pickle": (lambda: archive(data_pkl=b"\x80\x02}"), "its data.pkl cannot be read"),
    "an empty pickle": (lambda: archive(data_pkl=b""), "its data.pkl cannot be read"),
    "a list that is no list": (lambda: pickled(b"}K\x01a"), "it appends to a value that is not a"),
    "a name that cannot be printed": (lambda: pickled(b"X\x03\x00\x00\x00\xed\xa0\x80"),
                                      "its data.pkl cannot be read"),
    "an unknown instruction": (lambda: pickled(b"\x82\x01"), "do not have the instruction EXT1"),
    "old torch": (old_torch, "{path} was written by torch before version 1.6: files of torch are "
                  "zip archives, from which tensors are read one by one. Convert it: "),
    "a bare pickle": (lambda: pickle.dumps({"a": [1.5] * 20}),
                      "{path} is a pickle that torch did not write"),
    "encrypted by MindSpore": (lambda: struct.pack("<I", 0x7F3A5ED9) + bytes(range(1, 100)),
                               "{path} is an encrypted file of MindSpore"),
    "nothing": (lambda: b"", "{path} is empty: it has 0 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, monkeypatch, case: str) -> None:
    make, text = REFUSED[case]
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(make())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        header_of(path)
    assert text.format(path=path) in str(caught.value)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"], "something was run"


def test_a_file_cut_short_anywhere_is_refused(tmp_path) -> None:
    path, whole = tmp_path / "w.pt", saved(WEIGHTS)
    for length in range(4, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is not a valid torch file: its list of members"):
            header_of(path)


def test_a_folder_is_no_file_of_torch(tmp_path) -> None:
    (tmp_path / "w.pt").mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        header_of(tmp_path / "w.pt")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"offset": 41}, id="offset"),
        pytest.param({"size": (7, 8)}, id="rows"),
        pytest.param({"stride": (9, 1)}, id="strides"),
        pytest.param({"stride": (1 << 40, 1)}, id="huge strides"),
        pytest.param({"size": (1 << 40, 1 << 40)}, id="huge shape"),
        pytest.param({"offset": -1}, id="negative offset"),
        pytest.param({"stride": (-8, 1)}, id="negative stride"),
        pytest.param({"stride": (8,)}, id="one stride for two dims"),
        pytest.param({"size": (6, 8.0)}, id="a fraction"),
        pytest.param({"size": (True, 8)}, id="a truth value"),
    ],
)
def test_a_tensor_that_is_not_inside_its_storage(tmp_path, change: dict[str, Any]) -> None:
    class Lying(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 48) if obj is BASE else None

    view = {"offset": 0, "size": (6, 8), "stride": (8, 1), **change}
    rebuild = Runs(torch._utils._rebuild_tensor, BASE, view["offset"], view["size"], view["stride"])
    buffer = io.BytesIO()
    Lying(buffer, 2).dump({"w": rebuild})
    path = tmp_path / "w.pt"
    path.write_bytes(archive(saved({"w": BASE}), data_pkl=buffer.getvalue()))
    with pytest.raises(UserError, match="is not a valid torch file"):
        header_of(path)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_refused_or_stay_inside_themselves(tmp_path, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "w.pt"
    whole, believed, refused = saved({**VIEWS, "epoch": 1}), 0, 0
    for _ in range(150):
        raw = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            raw[rng.randrange(len(raw))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(raw)
        header = reported(header_of, path)
        if header is None:
            refused += 1
            continue
        believed += 1
        for entry in header.entries.values():
            assert entry.strides is not None
            assert 0 <= entry.start <= entry.stop <= len(raw)
            if entry.numel:
                reach = sum((n - 1) * s for n, s in zip(entry.shape, entry.strides, strict=True))
                assert entry.stop - entry.start == (reach + 1) * ITEM_BYTES[entry.dtype]
    assert min(believed, refused) > 15
