"""Run by an interpreter that has MindSpore, and nothing of this project: what MindSpore reads.

python in_mindspore.py load file.ckpt ckpt        prints {name: [dtype, shape, bytes in hex]}
python in_mindspore.py merge ranks strategy out   merge_pipeline_strategys, unified_safetensors
python in_mindspore.py records folder             writes MindRecord files, and what it reads
"""

import importlib
import json
import os
import sys

numpy = importlib.import_module("numpy")
mindspore = importlib.import_module("mindspore")  # of another environment
record = importlib.import_module("mindspore.mindrecord")


def load(path: str, file_format: str) -> None:
    """Print every parameter, and every text, that MindSpore loads."""
    with open(path, "rb") as file:
        has_crc = file.read()[-17:-10] == b"crc_num"
    found = mindspore.load_checkpoint(path, format=file_format, crc_check=has_crc)
    content = {
        name: ["str", [], value] if isinstance(value, str) else
        [str(value.dtype), list(value.shape), value.asnumpy().tobytes().hex()]
        for name, value in found.items()
    }  # fmt: skip
    print("\n" + json.dumps(content))


def merge(ranks: str, strategy: str, out: str) -> None:
    """Merge the strategy files of all stages, and with them the rank files."""
    merged = os.path.join(out, "merged.ckpt")
    mindspore.parallel.merge_pipeline_strategys(strategy, merged)
    mindspore.unified_safetensors(ranks, merged, os.path.join(out, "complete"))
    print("\n{}")


def records(folder: str) -> None:
    """Write random rows of several schemas with FileWriter; `<name>.json` is what is read back."""
    schemas = {
        "tokens": ({"input_ids": ("int32", [-1])}, 1, 3000),
        "labels": ({"input_ids": ("int32", [-1]), "labels": ("int32", [-1])}, 4, 2000),
        "scalars": ({"i": ("int32", None), "l": ("int64", None), "f": ("float32", None),
                     "d": ("float64", None), "t": ("string", None)}, 3, 1500),
        "all": ({"i": ("int32", None), "t": ("string", None), "ai": ("int32", [2, -1]),
                 "al": ("int64", [-1]), "af": ("float32", [3]), "ad": ("float64", [-1])}, 12, 2500),
    }  # fmt: skip
    for number, (name, (schema, shards, rows)) in enumerate(schemas.items()):
        random = numpy.random.default_rng(number)
        path = os.path.join(folder, name + ".mindrecord")
        writer = record.FileWriter(path, shards)
        writer.set_header_size(1 << 20)
        writer.set_page_size(1 << 16)
        columns = {
            column: {"type": kind} if shape is None else {"type": kind, "shape": shape}
            for column, (kind, shape) in schema.items()
        }
        writer.add_schema(columns, name)
        # An index field would come from the index file, as text.
        writer.write_raw_data([row_of(schema, random) for _ in range(rows)])
        writer.commit()
        first = path if shards == 1 else path + "0".zfill(len(str(shards - 1)))
        read = mindspore.dataset.MindDataset(first, shuffle=False, num_parallel_workers=1)
        found = [
            {key: str(value) if value.dtype.kind == "U" else value.tolist()
             for key, value in row.items()}
            for row in read.create_dict_iterator(num_epochs=1, output_numpy=True)
        ]  # fmt: skip
        with open(os.path.join(folder, name + ".json"), "w") as file:
            json.dump({"first": first, "rows": found}, file)
    print("\n{}")


def row_of(schema: dict, random: "numpy.random.Generator") -> dict:  # type: ignore[type-arg]
    """A random row, with integers of every width."""
    row = {}
    for name, (kind, shape) in schema.items():
        sizes = [int(random.integers(1, 300)) if size == -1 else size for size in shape or ()]
        if kind == "string":
            row[name] = "\u00e9\u4e2d x" * int(random.integers(0, 80))
            continue
        values = random.normal(size=sizes)
        if kind.startswith("int"):
            bits = 8 * numpy.dtype(kind).itemsize - 1
            wide = random.integers(-(1 << bits), (1 << bits) - 1, size=sizes, dtype=numpy.int64)
            values = wide >> random.integers(0, bits, size=sizes)
        values = numpy.asarray(values).astype(kind)
        row[name] = values if shape is not None else values.item()
    return row


def convert(path: str, out: str) -> None:
    """Convert a `.ckpt` file to safetensors."""
    mindspore.ckpt_to_safetensors(path, out)
    print("\n{}")


if __name__ == "__main__":
    commands = {"load": load, "merge": merge, "convert": convert, "records": records}
    commands[sys.argv[1]](*sys.argv[2:])
