"""Keys that set other keys.

Owns the list of these steps. Each takes the merged tree and returns another one; a problem is added
to the list that it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from launcher.config.aliases import moved
from launcher.config.nodes import Node, find, put, without
from launcher.config.provenance import KeyProblem
from launcher.environment import process_environment
from launcher.errors import Problem, UserError
from launcher.weights.adapters.found import find_adapter

_MOVED_GENERATION_KEYS = (
    *("max_length", "max_decode_length", "max_new_tokens", "min_length", "min_new_tokens"),
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "use_past"),
)
_SHARED_GENERATION_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
"""Keys of config.json too, so they stay in model_config."""


def trust(tree: Node, problems: list[Problem]) -> Node:
    """`trust_remote_code` is used from the command line only."""
    node = find(tree, "trust_remote_code")
    if node is None or _is_from_command_line(node) or node.value in (False, None):
        return tree
    problems.append(
        KeyProblem(
            what=f"trust_remote_code = {node.plain()!r}",
            where=node.where,
            rule="remote code can be allowed on the command line only",
            advice="Remove it, and pass `--trust_remote_code true`",
            key="trust_remote_code",
        )
    )
    return without(tree, "trust_remote_code")


def _is_from_command_line(node: Node) -> bool:
    return node.where.startswith("command line")


def run_mode(tree: Node, problems: list[Problem]) -> Node:
    """`resume` is train with resume_training; `predict_with_train_model` is predict."""
    mode = find(tree, "run_mode")
    if mode is None or mode.value not in ("resume", "predict_with_train_model"):
        return tree
    if mode.value == "predict_with_train_model":
        return put(tree, "run_mode", Node(value="predict", where=mode.where))
    where = f"{mode.where} resume" if _is_from_command_line(mode) else mode.where
    tree = put(tree, "run_mode", Node(value="train", where=where))
    resume = find(tree, "resume_training")
    is_off = resume is not None and str(resume.value).lower() == "false"
    same_place = resume and _is_from_command_line(mode) == _is_from_command_line(resume)
    if resume is not None and is_off and same_place:
        problems.append(
            KeyProblem(
                what=f"run_mode = 'resume', but resume_training = {resume.value!r}",
                where=resume.where,
                rule="run_mode resume means train with resume_training: True",
                advice="Remove resume_training, or set run_mode to train",
                key="resume_training",
            )
        )
    elif resume is None or resume.value is None or is_off:
        tree = put(tree, "resume_training", Node(value=True, where=where))
    return tree


def generation(tree: Node, problems: list[Problem]) -> Node:
    """Generation keys of model_config are used where generation_config does not set them."""
    sections = [find(tree, key) for key in ("model", "model.model_config", "generation_config")]
    written = [node for node in sections if node is not None and node.value is not None]
    if any(not isinstance(node.value, dict) for node in written):
        return tree  # reported when it is read
    for key in (*_MOVED_GENERATION_KEYS, *_SHARED_GENERATION_KEYS):
        path = f"model.model_config.{key}"
        target = "max_length" if key == "max_decode_length" else key
        node, given = find(tree, path), find(tree, f"generation_config.{target}")
        if key in _MOVED_GENERATION_KEYS:
            tree = without(tree, path)
        if node is not None and node.value is not None and given is None:
            tree = put(tree, f"generation_config.{target}", node)
    return tree


def dataset_tasks(tree: Node, problems: list[Problem]) -> Node:
    """`train_dataset_task.dataset_config` is usually the alias of train_dataset, which is used."""
    for name in ("train_dataset", "eval_dataset"):
        path = f"{name}_task.dataset_config"
        inner, outer = find(tree, path), find(tree, name)
        if inner is None:
            continue
        if outer is None or outer.value is None:
            tree = moved(without(tree, name), path, name, problems)
        elif outer.plain() == inner.plain():
            tree = without(tree, path)
    return tree


def row_lengths(tree: Node, problems: list[Problem]) -> Node:
    """`data_loader.config.seq_length` is train_dataset.seq_length where that is not set."""
    named = find(tree, "eval_datasets")
    entries = named.value if named is not None and isinstance(named.value, list) else []
    names = [f"eval_datasets.{index}" for index in range(len(entries))]
    for name in ("train_dataset", "eval_dataset", *names):
        node = find(tree, f"{name}.data_loader.config.seq_length")
        given = find(tree, f"{name}.seq_length")
        if node is not None and node.value is not None and (given is None or given.value is None):
            tree = put(tree, f"{name}.seq_length", node)
    return tree


def data_parallel(tree: Node, problems: list[Problem]) -> Node:
    """`data_parallel: auto` is the number of processes divided by the other degrees."""
    path = "parallel_config.data_parallel"
    node = find(tree, path)
    if node is None or node.value != "auto":
        return tree
    environment = process_environment()
    processes = environment.planned_world_size or environment.world_size
    others = 1
    for name in ("model_parallel", "pipeline_stage", "context_parallel"):
        degree = find(tree, f"parallel_config.{name}")
        value = str(degree.value) if degree is not None else "1"
        others *= int(value) if value.isdecimal() and int(value) else 1  # reported when it is read
    return put(tree, path, Node(value=max(processes // others, 1), where=node.where))


def pet_type(tree: Node, problems: list[Problem]) -> Node:
    """A written pet_config without its type is that of LoRA."""
    node = find(tree, "pet_config")
    if node is None or not isinstance(node.value, dict) or not node.value:
        return tree
    if "pet_type" in node.value:
        return tree
    return put(tree, "pet_config.pet_type", Node(value="lora", where=node.where))


def base_of_adapter(tree: Node, problems: list[Problem]) -> Node:
    """The directory of the model under the adapter that is loaded is pretrained_model_dir, where
    that is not set: config.json and the tokenizer are found there."""
    nodes = {
        key: find(tree, key) for key in ("pretrained_model_dir", "load_checkpoint", "run_mode",
                                         "resume_training", "pet_config.load_adapter")
    }  # fmt: skip
    value = {key: None if node is None else node.value for key, node in nodes.items()}
    resumes = str(value["resume_training"] or "false").lower() != "false"
    if value["run_mode"] not in ("train", "finetune"):
        resumes = False
    path = value["pet_config.load_adapter"] or (None if resumes else value["load_checkpoint"])
    if value["pretrained_model_dir"] or not isinstance(path, str):
        return tree
    try:
        found = find_adapter(Path(path))
    except (UserError, OSError, ValueError):
        return tree  # reported by a rule
    if found is None or not (Path(found.base.path or ".nothing") / "config.json").is_file():
        return tree
    node = Node(value=found.base.path, where=str(found.file))
    return put(tree, "pretrained_model_dir", node)


IMPLIED: tuple[Callable[[Node, list[Problem]], Node], ...] = (
    trust,
    run_mode,
    generation,
    dataset_tasks,
    row_lengths,
    data_parallel,
    pet_type,
    base_of_adapter,
)
