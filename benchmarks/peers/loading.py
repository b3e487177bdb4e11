"""Ways to get the weights of a Hugging Face directory into the memory of n tensor-parallel ranks.

Each is a function of (folder, rank, ranks) that returns once every byte of every parameter of the
rank is resident: what maps files is touched page by page. `raw` is the floor: so many bytes read
into fresh memory of the same kind, whatever they mean.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoints import layout_of
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.reading.load import load
from launcher.weights.reading.read import PORTION_BYTES, READERS
from launcher.weights.reading.tensor_bytes import Storages
from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.source import Source, open_complete
from launcher.weights.tensor_mapping import mapped, shapes_in_files
from launcher.weights.threads import in_parallel
from models.families import DECODERS
from models.names import mappings_of

Loader = Callable[[Path, int, int], Any]


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json of a directory."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def slipway(folder: Path, rank: int, ranks: int) -> Any:
    """Our engine, from planning on."""
    return load_from(open_complete(folder), config_of(folder), Mesh(tp=ranks), rank)


def resliced(folder: Path, rank: int, ranks: int) -> Any:
    """Our engine, from the rank files of another layout."""
    files = sorted(folder.glob("rank_*/*.safetensors"))
    return load_from(open_rank_files(folder, files), config_of(folder), Mesh(tp=ranks), rank)


def load_from(source: Source, config: dict[str, Any], mesh: Mesh, rank: int) -> Any:
    """What `rank` holds, filled from `source`."""
    layout = layout_of(config, mesh)
    held = empty_shards(layout, rank)
    mappings = mappings_of(DECODERS[config["model_type"]].parameters)
    load(
        mapped(held, mappings), source, rank=rank, expected=shapes_in_files(layout.shapes, mappings)
    )
    return held


def empty_shards(layout: Any, rank: int) -> dict[str, Shard]:
    """Fresh memory for what `rank` holds."""
    return {
        name: Shard(p.shape, p.boxes[0], torch.empty(p.boxes[0].size, dtype=torch.bfloat16))
        for name, p in layout.of(rank).items()
    }


def raw(folder: Path, rank: int, ranks: int) -> Any:
    """As many bytes as the rank needs, in long reads, into tensors of the same sizes. The ranks
    begin at equal distances in all files end to end, so that each byte is read by about one."""
    held = empty_shards(layout_of(config_of(folder), Mesh(tp=ranks)), rank)
    files = sorted(folder.rglob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    position, file, tasks = rank * (sum(sizes) // ranks // 8 * 8), 0, []
    while position >= sizes[file]:
        position, file = position - sizes[file], file + 1
    storages = Storages(shard.tensor for shard in held.values())
    for shard in held.values():
        memory = shard.tensor.reshape(-1).view(torch.uint8).numpy().data
        while memory:
            if position + 8 >= sizes[file]:
                file, position = (file + 1) % len(files), 0
            count = min(len(memory), PORTION_BYTES, sizes[file] - position)
            tasks.append((files[file], position, memory[:count], shard.tensor))
            memory, position = memory[count:], position + count
    with Files() as opened:
        for path in files:
            opened.descriptor(path)

        def read(task: tuple[Path, int, memoryview, torch.Tensor]) -> None:
            path, position, memory, tensor = task
            storages.under(tensor)  # large pages, as ours has them
            read_exactly(opened.descriptor(path), path, memory, position)

        in_parallel(read, tasks, READERS)
    return held


def transformers(folder: Path, rank: int, ranks: int) -> Any:
    """`from_pretrained`, with its tensor-parallel plan where there are several ranks."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if ranks > 1:
        from transformers.distributed import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=ranks)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
    touch(model.parameters())
    return model


def dcp_hugging_face(folder: Path, rank: int, ranks: int) -> Any:
    """torch.distributed.checkpoint's reader of Hugging Face directories."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    state = dcp_state(config_of(folder), Mesh(tp=ranks), rank)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks == 1)
    touch(state.values())
    return state


def dcp_resharded(folder: Path, rank: int, ranks: int) -> Any:
    """torch.distributed.checkpoint, from its own files of another layout."""
    import torch.distributed.checkpoint as dcp

    state = dcp_state(config_of(folder), Mesh(tp=ranks), rank)
    dcp.load(state, checkpoint_id=folder / "dcp", no_dist=ranks == 1)
    touch(state.values())
    return state


def dcp_state(config: dict[str, Any], mesh: Mesh, rank: int) -> dict[str, torch.Tensor]:
    """Fresh memory for the tensors of the files, cut as ours are."""
    mappings = mappings_of(DECODERS[config["model_type"]].parameters)
    return as_dtensors(mesh, mapped(empty_shards(layout_of(config, mesh), rank), mappings))


def as_dtensors(mesh: Mesh, held: dict[str, Shard]) -> dict[str, torch.Tensor]:
    """The shards as DTensors over all ranks, in the same memory; plain tensors on one rank."""
    if mesh.world_size == 1:
        return {name: shard.tensor for name, shard in held.items()}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Cut

    device_mesh = init_device_mesh("cpu", (mesh.world_size,))
    state = {}
    for name, shard in held.items():
        cut = [dim for dim, n in enumerate(shard.shape) if n != shard.box.size[dim]]
        state[name] = DTensor.from_local(
            shard.tensor, device_mesh, [Cut(cut[0]) if cut else Replicate()], run_check=False,
            shape=torch.Size(shard.shape), stride=torch.empty(shard.shape, device="meta").stride(),
        )  # fmt: skip
    return state


def touch(tensors: Iterable[torch.Tensor]) -> None:
    """Look at every page."""
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor).detach().contiguous()
        local.reshape(-1).view(torch.uint8)[::4096].sum()


LOADERS: dict[str, Loader] = {
    "Slipway": slipway, "raw": raw, "transformers": transformers, "DCP": dcp_hugging_face,
    "Slipway re-sliced": resliced, "DCP re-sharded": dcp_resharded,
}  # fmt: skip


def is_group_needed(name: str) -> bool:
    """Whether a way to load talks to other ranks."""
    return name in ("transformers", "DCP", "DCP re-sharded")


def import_all() -> None:
    """Import what the loaders import, so that forked ranks need not."""
    for module in (
        "torch.distributed.checkpoint", "torch.distributed.checkpoint.hf_storage",
        "torch.distributed.tensor", "transformers.distributed",
        "transformers.models.llama.modeling_llama",
        "transformers.models.qwen3_moe.modeling_qwen3_moe", "launcher.builders.layout",
        "transformers.integrations.tensor_parallel", "safetensors.torch",
    ):  # fmt: skip
        importlib.import_module(module)
