"""Run by an interpreter that has MindSpore, and nothing of this project: what MindSpore reads.

python in_mindspore.py load file.ckpt ckpt        prints {name: [dtype, shape, bytes in hex]}
python in_mindspore.py merge ranks strategy out   merge_pipeline_strategys, unified_safetensors
"""

import importlib
import json
import os
import sys

mindspore = importlib.import_module("mindspore")  # of another environment


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


def convert(path: str, out: str) -> None:
    """Convert a `.ckpt` file to safetensors."""
    mindspore.ckpt_to_safetensors(path, out)
    print("\n{}")


if __name__ == "__main__":
    {"load": load, "merge": merge, "convert": convert}[sys.argv[1]](*sys.argv[2:])
