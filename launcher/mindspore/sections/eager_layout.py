"""Processes and memory in the eager style: `parallelism`, `recompute` and the batch.

Owns the formulas that need the number of processes: data_parallel is what the other degrees leave,
and gradients are accumulated until the global batch is reached.
"""

from __future__ import annotations

from typing import Any

from launcher.config.draft import Draft, asks_for_nothing
from launcher.mindspore.sections.values import (
    count,
    names,
    off_or_refused,
    processes,
    prune,
    refuse,
    written,
)

_ROOT, _STYLE = "parallelism", "training"
_DEGREES = {
    "tensor_parallel": "model_parallel",
    "context_parallel": "context_parallel",
    "pipeline_parallel": "pipeline_stage",
    "expert_parallel": "expert_parallel",
    "sequence_parallel": "use_seq_parallel",
}
_METHODS = {"colossal": "colossalai_cp", "ulysses": "ulysses_cp", "hybrid": "hybrid_cp"}
_SCHEDULES = ("1f1b", "interleaved_1f1b", "gpipe")
_STRATEGIES = ("optim_grads_params", "optim_grads", "optim")
_WITHOUT_EFFECT = {
    "gradients are averaged over the tokens of the global batch": ("disable_gradient_division",),
    "parallel_config.reshard_after_forward says when weights are freed": (
        "reshard_after_forward_policy",
    ),
    "communication is arranged by PyTorch": (
        *("context_parallel_async", "pipeline_parallel_overlap_p2p"),
        *("pipeline_parallel_overlap_b_f",),
        *("pipeline_parallel_enable_dxdw_split", "pipeline_parallel_p2p_transport", "enable_mc2"),
        *("expert_parallel_async_d2h", "moe_token_dispatcher_type", "npu_nums_per_device"),
    ),
    "no expert needs a token": ("expert_parallel_use_safe_tokens",),
    "attention is causal, inside documents": ("context_parallel_mask_type",),
    "it changes memory only": ("enable_loss_parallel",),
}  # fmt: skip
KEYS: tuple[str, ...] = (
    *("data_parallel_shard", "data_parallel_shard_strategy", *_DEGREES),
    *("context_parallel_method", "ulysses_degree_in_cp", "pipeline_parallel_schedule"),
    *("pipeline_parallel_microbatch_size", "pipeline_parallel_interleave_num"),
    *("pipeline_parallel_layers_per_stage", "cpu_offload", "dense_fsdp_shard_size"),
    *(name for group in _WITHOUT_EFFECT.values() for name in group),
)
"""The keys of `parallelism`."""


def translate(draft: Draft) -> None:
    """Translate `parallelism`, the batch of `training`, and `recompute`."""
    ranks = _data_parallel(draft)
    _batch(draft, ranks)
    _pipeline(draft)
    _context(draft)
    for name, new in _DEGREES.items():
        draft.rename(f"{_ROOT}.{name}", f"parallel_config.{new}")
    for why, group in _WITHOUT_EFFECT.items():
        draft.drop_all([f"{_ROOT}.{name}" for name in group], why)
    off_or_refused(draft, f"{_ROOT}.cpu_offload", "weights in host memory")
    off_or_refused(draft, f"{_ROOT}.dense_fsdp_shard_size", "another number of shards for experts")
    _recompute(draft)


def _degree(draft: Draft, name: str) -> int:
    return max(count(draft, f"{_ROOT}.{name}", 1), 1)


def _data_parallel(draft: Draft) -> int:
    """Write the degree of data parallel, and how it is sharded. Returns the degree."""
    key, target = f"{_ROOT}.data_parallel_shard", "parallel_config.data_parallel"
    others = 1
    for name in ("tensor_parallel", "context_parallel", "pipeline_parallel"):
        others *= _degree(draft, name)
    ranks = count(draft, key, -1)
    if ranks < 1 and ranks != -1:
        refuse(draft, key, "must be a number of ranks, or -1 for what the other degrees leave")
        ranks = 1
    if ranks == -1:
        ranks = max((processes() or others) // others, 1)
        draft.imply(target, ranks, _STYLE)
        why = f"what the other degrees leave of {processes() or others} process(es)"
        draft.replace(key, {target: ranks}, why)
    else:
        draft.rename(key, target)
    strategy = written(draft, f"{_ROOT}.data_parallel_shard_strategy", _STRATEGIES[0])
    if strategy not in _STRATEGIES:
        refuse(
            draft,
            f"{_ROOT}.data_parallel_shard_strategy",
            f"must be one of: {', '.join(_STRATEGIES)}",
        )
    sharded = {"parallel.enable_parallel_optimizer": True}
    why = "weights, gradients and optimizer state are sharded"
    draft.imply("parallel.enable_parallel_optimizer", True, _STYLE)
    draft.replace(f"{_ROOT}.data_parallel_shard_strategy", sharded, why)
    return ranks


def _batch(draft: Draft, ranks: int) -> None:
    """The global batch is local_batch_size x ranks x accumulation; a pipeline accumulates over its
    micro-batches, which are parts of the local batch."""
    local = count(draft, f"{_STYLE}.local_batch_size", 1)
    total = count(draft, f"{_STYLE}.global_batch_size", 1)
    stages = _degree(draft, "pipeline_parallel")
    micro = count(draft, f"{_ROOT}.pipeline_parallel_microbatch_size", 1) if stages > 1 else local
    unit = local * ranks
    if min(local, total, micro) < 1 or total % unit or local % micro:
        place = "global_batch_size" if draft.find(f"{_STYLE}.global_batch_size") else "steps"
        draft.refuse(
            f"{_STYLE}.{place}",
            f"global_batch_size ({total}) must be a multiple of local_batch_size ({local}) x "
            f"data-parallel ranks ({ranks})" + (
                f", and local_batch_size of the micro-batch ({micro})" if stages > 1 else ""),
            nearest=f"Nearest: {max(total // max(unit, 1), 1) * unit}",
        )  # fmt: skip
        steps = 1
    else:
        steps = total // unit * (local // micro)
    target = "parallel_config.micro_batch_num" if stages > 1 else (
        "runner_config.gradient_accumulation_steps")  # fmt: skip
    draft.imply("runner_config.batch_size", micro, _STYLE)
    draft.imply(target, steps, _STYLE)
    why = f"{local} x {ranks} ranks x {total // max(unit, 1)} = {total}"
    draft.replace(f"{_STYLE}.local_batch_size", {"runner_config.batch_size": micro})
    draft.replace(f"{_STYLE}.global_batch_size", {target: steps}, why)
    size = f"{_ROOT}.pipeline_parallel_microbatch_size"
    if stages > 1:
        draft.replace(size, {"runner_config.batch_size": micro})
    draft.drop(size, "there is no pipeline")


def _pipeline(draft: Draft) -> None:
    key = f"{_ROOT}.pipeline_parallel_schedule"
    laps = _degree(draft, "pipeline_parallel_interleave_num")
    kind = written(draft, key, _SCHEDULES[0])
    if kind not in _SCHEDULES:
        refuse(draft, key, f"must be one of: {', '.join(_SCHEDULES)}")
        kind = _SCHEDULES[0]
    if laps > 1 and kind == "1f1b":
        kind = "interleaved_1f1b"
        draft.imply("parallel.pipeline_config.pipeline_scheduler", kind, _STYLE)
    draft.replace(key, {"parallel.pipeline_config.pipeline_scheduler": kind})
    interleave = f"{_ROOT}.pipeline_parallel_interleave_num"
    if laps > 1:
        draft.rename(interleave, "model.model_config.pp_interleave_num")
    else:
        draft.drop(interleave, "one stage a rank")
    _layers(draft, laps)


def _layers(draft: Draft, laps: int) -> None:
    """Layers of each rank: null, `auto`, or one text a rank with a range for each of its stages,
    `0-3` or `0-3,8-11`."""
    key = f"{_ROOT}.pipeline_parallel_layers_per_stage"
    value = written(draft, key)
    if value in (None, "auto"):
        draft.drop(key, "even shares")
        return
    rows = [_ranges(item) for item in value] if isinstance(value, list) else []
    sizes = [[end - start for start, end in row] for row in rows if row is not None]
    if not sizes or len(sizes) != len(rows) or any(len(row) != laps for row in sizes):
        refuse(draft, key, f"must be one text a rank, with {laps} range(s) of layers such as 0-3")
        return
    layers = [row[lap] for lap in range(laps) for row in sizes]
    why = "layers of each stage"
    draft.replace(key, {"parallel.pipeline_config.stage_layers": layers}, why)


def _ranges(value: Any) -> list[tuple[int, int]] | None:
    """`0-3,8` as [(0, 4), (8, 9)]; None for something else. A list of numbers is its two ends."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [(value[0], value[-1] + 1)] if value[0] <= value[-1] else None
    found = []
    for part in str(value).split(","):
        ends = [end.strip() for end in part.split("-")]
        if len(ends) > 2 or not all(end.isdecimal() and len(end) < 10 for end in ends):
            return None
        found.append((int(ends[0]), int(ends[-1]) + 1))
    return found if all(start < end for start, end in found) else None


def _context(draft: Draft) -> None:
    key = f"{_ROOT}.context_parallel_method"
    method = written(draft, key, "colossal")
    if isinstance(method, str) and method in _METHODS:
        target = "parallel_config.context_parallel_algo"
        needed = _degree(draft, "context_parallel") > 1
        draft.replace(key, {target: _METHODS[method]} if needed else {}, "one rank has the sequence"
                      if not needed else "")  # fmt: skip
    else:
        refuse(draft, key, f"must be one of: {', '.join(_METHODS)}")
    degree = f"{_ROOT}.ulysses_degree_in_cp"
    if written(draft, degree) is None or method != "hybrid":
        draft.drop(degree, "the method decides")
    draft.rename(degree, "parallel_config.ulysses_degree_in_cp")


def _recompute(draft: Draft) -> None:
    mode = str(written(draft, "recompute.mode", "None")).lower()
    key = "recompute_config.recompute"
    if mode == "full":
        layers = _layers_to_recompute(draft)
        draft.replace("recompute.mode", {key: layers})
        draft.replace("recompute.full_recompute_layer", {key: layers}, "which changes memory only")
    elif mode == "select":
        selected = {"recompute_config.select_recompute": _modules(draft)}
        draft.replace("recompute.mode", selected)
        draft.replace("recompute.select_module", selected)
    elif mode == "none":
        draft.drop("recompute.mode", "it is off")
    else:
        refuse(draft, "recompute.mode", "must be one of: None, full, select")
    unused = "another mode is set"
    draft.drop_all(("recompute.full_recompute_layer", "recompute.select_module"), unused)
    draft.drop("recompute.exclude_op", "operators of MindSpore; it changes memory only")
    prune(draft, "recompute")
    for section in ("swap", "recompute_comm"):
        _switched_off(draft, section)


def _switched_off(draft: Draft, section: str) -> None:
    values = [written(draft, f"{section}.{name}") for name in names(draft, section)]
    if written(draft, f"{section}.enable") is False or all(map(asks_for_nothing, values)):
        draft.drop(section, "it is off")
    elif section == "recompute_comm":
        draft.drop(section, "communication is recomputed with its layer or module")
    else:
        off_or_refused(draft, section, "swapping in this style")


def _layers_to_recompute(draft: Draft) -> bool | list[int]:
    """True, or the number of the first layers where there is one stage. Other layers cannot be
    named here: then all are recomputed, which changes memory only."""
    key = "recompute.full_recompute_layer"
    value = written(draft, key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    rows = [_ranges(item) for item in items]
    if any(row is None for row in rows):
        refuse(draft, key, "must be a list of layers and ranges such as 0-3")
    reach = 0
    for start, end in sorted(part for row in rows for part in row or ()):
        if start > reach:
            return True
        reach = max(reach, end)
    layers = count(draft, "model.model_config.num_hidden_layers", 0)
    if reach == 0 or 0 < layers <= reach or _degree(draft, "pipeline_parallel") > 1:
        return True
    return [reach]


def _modules(draft: Draft) -> list[str]:
    """The patterns of modules, as regular expressions from the layer on."""
    selected = written(draft, "recompute.select_module", {})
    return [_from_layer(str(name)) for name in selected] if isinstance(selected, dict) else []


def _from_layer(pattern: str) -> str:
    """`layers.*.mlp.*` -> `mlp`: the modules of a layer have names below it here."""
    _, mark, rest = pattern.rpartition("layers.*.")
    name = (rest if mark else pattern).removesuffix(".*")
    return name.replace(".", r"\.").replace(r"*", ".*")
