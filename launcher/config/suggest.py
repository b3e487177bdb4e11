"""The nearest key, searched in the complete schema.

Owns the list of all dotted keys and the measure of nearness: a key of the same section wins over
an equally near one elsewhere, and the same word elsewhere wins over a merely similar one here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from difflib import SequenceMatcher, get_close_matches
from typing import Any, get_args, get_origin

from launcher.config.extra_keys import ANY_OTHER, EXTRA_SECTIONS, extra_names
from launcher.config.schema import CALLBACKS, Config, info_of
from launcher.config.typing_rules import hints, members

_SYNONYMS = {
    "lr": "learning_rate",
    "max_lr": "learning_rate",
    "epoch": "epochs",
    "epoch_num": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "train_steps": "max_steps",
    "num_steps": "max_steps",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "dp": "data_parallel",
    "tp": "model_parallel",
    "mp": "model_parallel",
    "tensor_parallel": "model_parallel",
    "pp": "pipeline_stage",
    "pipeline_parallel": "pipeline_stage",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "wd": "weight_decay",
    "clip_grad": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "max_seq_length": "seq_length",
    "seq_len": "seq_length",
    "model_path": "pretrained_model_dir",
    "model_name_or_path": "pretrained_model_dir",
    "resume": "resume_training",
    "resume_from_checkpoint": "resume_training",
    "save_steps": "save_checkpoint_steps",
    "save_total_limit": "keep_checkpoint_max",
    "logging_steps": "per_print_times",
    "data_path": "dataset_dir",
    "data_dir": "dataset_dir",
    "columns": "column_map",
    "roles_to_train": "train_on_roles",
    "train_on_inputs": "train_on_roles",
    "train_on_prompt": "train_on_roles",
    "assistant_only_loss": "train_on_roles",
    "completion_only_loss": "train_on_roles",
    "train_on_eos": "train_on_roles",
    "mask_history": "train_on_turns",
    "train_on_last_turn": "train_on_turns",
    "eod": "eod_token_id",
    "eos_token_id": "eod_token_id",
    "warmup": "warmup_steps",
}
"""Words of other launchers for keys of Slipway."""

_PATHS = {
    **dict.fromkeys(("dataset", "datasets", "data", "train_data", "train_datasets"),
                    "train_dataset"),
    **dict.fromkeys(("eval_data", "val_dataset", "validation_dataset"), "eval_dataset"),
    **dict.fromkeys(("load_best_model_at_end", "save_best", "save_best_only", "save_top_k"),
                    "callbacks[CheckpointMonitor].keep_best"),
    **dict.fromkeys(("metric_for_best_model", "best_model_metric", "monitor_metric"),
                    "callbacks[CheckpointMonitor].best_metric"),
    "greater_is_better": "callbacks[CheckpointMonitor].best_mode",
    **dict.fromkeys(("early_stopping", "early_stop", "early_stopping_patience",
                     "early_stopping_steps"), "callbacks[EarlyStopping].patience"),
    **dict.fromkeys(("early_stopping_threshold", "early_stopping_delta"),
                    "callbacks[EarlyStopping].min_delta"),
    **dict.fromkeys(("eval_steps", "evaluation_interval", "eval_interval", "eval_every"),
                    "eval_step_interval"),
    **dict.fromkeys(("peft", "peft_config", "pet", "lora", "lora_config", "adapter_config"),
                    "pet_config"),
    **dict.fromkeys(("finetuning_type", "adapter", "peft_type", "use_lora", "use_peft"),
                    "pet_config.pet_type"),
    **dict.fromkeys(("lora_r", "lora_rank", "r"), "pet_config.lora_rank"),
    "lora_alpha": "pet_config.lora_alpha",
    "lora_dropout": "pet_config.lora_dropout",
    **dict.fromkeys(("lora_target_modules", "lora_target", "lora_target_linear", "target_modules"),
                    "pet_config.target_modules"),
    **dict.fromkeys(("lora_modules_to_save", "additional_target", "modules_to_save"),
                    "pet_config.modules_to_save"),
    **dict.fromkeys(("bnb_4bit_compute_dtype", "qlora", "quantization_method"), "load_in_4bit"),
    **dict.fromkeys(("use_dora", "peft_use_dora", "lora_use_dora"), "pet_config.use_dora"),
    **dict.fromkeys(("use_rslora", "peft_use_rslora", "lora_use_rslora"), "pet_config.use_rslora"),
    **dict.fromkeys(("lora_model_dir", "adapter_name_or_path", "adapter_path", "resume_adapter"),
                    "pet_config.load_adapter"),
    **dict.fromkeys(("unfrozen_parameters", "freeze_trainable_modules", "frozen_parameters",
                     "freeze_modules"), "freeze"),
    **dict.fromkeys(("loss_type", "pref_loss", "rlhf_type", "rl", "dpo_loss_type"),
                    "preference.loss"),
    **dict.fromkeys(("dpo_beta", "pref_beta", "rl_beta", "kto_beta", "orpo_alpha"),
                    "preference.beta"),
    **dict.fromkeys(("rpo_alpha", "cpo_alpha", "pref_ftx", "dpo_ftx", "sft_alpha"),
                    "preference.sft_weight"),
    **dict.fromkeys(("gamma_beta_ratio", "rl_gamma"), "preference.simpo_gamma"),
    **dict.fromkeys(("dpo_label_smoothing", "pref_label_smoothing", "cpo_label_smoothing"),
                    "preference.label_smoothing"),
    **dict.fromkeys(("kto_chosen_weight", "kto_desirable_weight"), "preference.desirable_weight"),
    **dict.fromkeys(("kto_rejected_weight", "kto_undesirable_weight"),
                    "preference.undesirable_weight"),
    **dict.fromkeys(("ref_model", "ref_model_path", "reference_model", "ref_adapters"),
                    "preference.reference.weights"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "dtype", "mixed_precision"),
                    "model.model_config.compute_dtype"),
    **dict.fromkeys(("attn_implementation", "attn_impl", "attn_type", "attn_backend",
                     "attention_backend", "flash_attn", "flash_attention", "use_flash_attn",
                     "use_varlen_attn", "sdp_attention", "sdpa_attention", "flex_attention",
                     "use_flex_attn", "varlen", "use_varlen"), "attention_by_documents"),
    **dict.fromkeys(("full_determinism", "deterministic_mode", "use_deterministic_algorithms",
                     "deterministic_warn_only", "cudnn_deterministic", "determinism"),
                    "deterministic"),
    **dict.fromkeys(("manual_gc", "manual_gc_interval", "gc_steps", "gc_interval", "gc",
                     "garbage_collection", "garbage_collection_steps"), "gc_freq"),
    **dict.fromkeys(("pytorch_alloc_conf", "pytorch_cuda_alloc_conf", "cuda_alloc_conf",
                     "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing",
                     "use_gradient_checkpointing", "recompute_granularity", "recompute_method",
                     "recompute_num_layers"), "recompute_config.recompute"),
    **dict.fromkeys(("activation_checkpoint", "selective_ac_option", "recompute_activations",
                     "recompute_modules"), "recompute_config.recompute_operations"),
    **dict.fromkeys(("activation_memory_budget", "ac_memory_budget"),
                    "recompute_config.memory_budget"),
    **dict.fromkeys(("torch_compile", "use_torch_compile", "torch_compile_backend",
                     "compile_backend"), "compile"),
    **dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype", "moments_dtype", "optim_dtype",
                     "use_precision_aware_optimizer", "optimizer_dtype"),
                    "optimizer.state_dtype"),
    **dict.fromkeys(("fp8_recipe", "fp8_format", "float8", "fp8_hybrid", "recipe_name",
                     "enable_fp8", "fp8_recipe_handler", "fp8", "fp8_training", "enable_fp8_linear",
                     "fp8_backend"), "fp8_config.recipe"),
    **dict.fromkeys(("filter_fqns", "fp8_filter", "module_filter_fqns"), "fp8_config.exclude"),
    **dict.fromkeys(("chunked_cross_entropy", "chunked_cross_entropy_num_chunks", "chunked_loss",
                     "num_output_chunks", "liger_fused_linear_cross_entropy",
                     "cross_entropy_loss_fusion", "cross_entropy_fusion_impl",
                     "fused_linear_cross_entropy", "fused_cross_entropy", "use_liger_kernel",
                     "enable_liger_kernel", "cut_cross_entropy", "use_cut_cross_entropy",
                     "unsloth_cross_entropy_loss", "cross_entropy_chunk_size", "ce_chunk_size"),
                    "loss_chunk_tokens"),
    **dict.fromkeys(("fsdp", "fsdp_config", "fsdp_version", "use_fsdp", "zero_stage"),
                    "parallel.enable_parallel_optimizer"),
    **dict.fromkeys(("activation_offloading", "activation_offload", "cpu_offload_activations"),
                    "swap_config.swap"),
    **dict.fromkeys(("fsdp_reshard_after_forward", "reshard_after_forward_policy"),
                    "parallel_config.reshard_after_forward"),
    **dict.fromkeys(("template", "chat_template_jinja", "chat_template_path"), "chat_template"),
    "enable_thinking": "chat_template_kwargs.enable_thinking",
    **dict.fromkeys(("system_prompt", "default_system", "sys_prompt", "system_message"), "system"),
    **dict.fromkeys(("streamer", "streaming", "stream_output"), "stream"),
    **dict.fromkeys(("interactive_mode", "chat_mode", "chat"), "interactive"),
    **dict.fromkeys(("prompt", "prompts", "messages", "predict_data"), "input_data"),
    "tools_file": "tools",
    **dict.fromkeys(("enable_profiling", "use_pytorch_profiler", "enable_profiler", "profiling",
                     "profiler", "profiler_config", "profile_freq"), "profile"),
    **dict.fromkeys(("profile_step_start", "profiler_steps_start", "profile_start",
                     "profile_begin"), "profile_start_step"),
    **dict.fromkeys(("profile_step_end", "profile_stop", "profile_end", "profiler_steps"),
                    "profile_stop_step"),
    **dict.fromkeys(("profile_ranks", "profiler_ranks"), "profile_rank_ids"),
    **dict.fromkeys(("save_traces_folder", "profile_dir", "profiling_dir", "trace_dir",
                     "profile_path", "profile_save_path", "profiler_output_path"),
                    "profile_output"),
    **dict.fromkeys(("record_memory_history", "enable_memory_snapshot", "memory_snapshot_path"),
                    "profile_memory_snapshot"),
    **dict.fromkeys(("peak_flops", "peak_tflops", "device_peak_flops", "gpu_peak_flops",
                     "theoretical_flops"),
                    "device_peak_tflops"),
    **dict.fromkeys(("optim", "optimizer_type"), "optimizer.type"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "lr_schedule.type"),
}  # fmt: skip
"""Words of other launchers for a key of one section, wherever they are written."""
_OF_SECTION = {
    ("data_loader.config", "eod_token_id"): "eod",
    ("data_loader.config", "eos_token_id"): "eod",
    ("data_loader.config", "pad_token_id"): "pad",
    ("pet_config", "layers"): "layers_to_transform",
    ("optimizer", "dtype"): "state_dtype",
    ("fp8_config", "format"): "recipe",
    ("fp8_config", "enabled"): "recipe",
    ("fp8_config", "enable"): "recipe",
    ("fp8_config", "backend"): "recipe",
    ("recompute_config", "mode"): "recompute",
    ("recompute_config", "policy"): "recompute_operations",
}
"""Words that are keys elsewhere, and have another name in the section of this ending."""
_REMARKS = {
    **dict.fromkeys(
        (
            "attn_implementation",
            "attn_impl",
            "attn_type",
            "attn_backend",
            "attention_backend",
            "flash_attn",
            "flash_attention",
            "use_flash_attn",
            "sdp_attention",
        ),
        "The kernel follows from the device and the dtype; False uses a mask",
    ),
    "deterministic_warn_only": "`auto` warns only where the model is of transformers",
    "manual_gc": "0 is off",
    "train_on_inputs": "True is [system, user, assistant], False is [assistant]",
    "train_on_prompt": "True is [system, user, assistant], False is [assistant]",
    "assistant_only_loss": "True is [assistant], which is the default",
    "completion_only_loss": "True is [assistant], which is the default",
    "train_on_eos": "The end mark of a turn that is learnt is always learnt",
    "mask_history": "True is `last`",
    "recompute_granularity": "`full` is True, `selective` is recompute_operations: True",
    "activation_checkpoint": "Mode `selective` is True, `full` is recompute: True",
    "unfrozen_parameters": "It names what is not trained",
    "freeze_trainable_modules": "It names what is not trained",
}
"""How a value of another launcher is written here."""

_SAME_SECTION = 0.15
_WITHOUT_EFFECT = 0.05
_DEPTH = 0.001
"""Of two keys that are equally near the outer one is meant."""
_ENOUGH = 0.7
_MISSPELT = 0.9


@dataclasses.dataclass(frozen=True)
class SchemaKey:
    """One key of the schema."""

    path: str
    section: str
    name: str
    acts: bool


def section_of(annotation: Any) -> type | None:
    """The dataclass a field holds, or None for a value."""
    for member in members(annotation):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def list_section_of(annotation: Any) -> type | None:
    """The dataclass of the entries, where a field may be a list of sections."""
    for member in members(annotation):
        if get_origin(member) is list:
            return section_of(get_args(member)[0])
    return None


def _keys(kind: type, section: str) -> Iterator[SchemaKey]:
    for key in dataclasses.fields(kind):
        info = info_of(key)
        if info.open_keys:
            continue
        path = f"{section}.{key.name}".lstrip(".")
        yield SchemaKey(path, section, key.name, info.status == "effective")
        inner = section_of(hints(kind)[key.name])
        if inner is not None and key.name != "dataset_config":
            yield from _keys(inner, path)
        entry = list_section_of(hints(kind)[key.name])
        if entry is not None and key.name != "callbacks":  # by type, in CALLBACKS
            yield from _keys(entry, f"{path}[]")
    yield from _extra(section)


def _extra(section: str) -> Iterator[SchemaKey]:
    for name in extra_names(section):
        if name != ANY_OTHER:
            yield SchemaKey(f"{section}.{name}".lstrip("."), section, name, acts=False)


@functools.cache
def schema_keys() -> tuple[SchemaKey, ...]:
    """Every key that is known; those of callbacks as `callbacks[CheckpointMonitor].prefix`."""
    found = list(_keys(Config, ""))
    for name, kind in CALLBACKS.items():
        found += _keys(kind, f"callbacks[{name}]")
    known = {key.path for key in found}
    for section in EXTRA_SECTIONS:
        if section not in known and not section.startswith("callbacks["):
            parent, _, name = section.rpartition(".")
            found.append(SchemaKey(section, parent, name, acts=False))
            found += _extra(section)
    return tuple(found)


def nearest_key(name: str, section: str) -> str:
    """The full dotted key nearest to `name` written in `section`; empty when none is near."""
    for (ending, word), own in _OF_SECTION.items():
        if name == word and section.endswith(ending):
            return f"{section}.{own}"
    if name in _PATHS:
        return _PATHS[name]
    word = _SYNONYMS.get(name, name)
    best, best_score = "", 0.0
    matcher = SequenceMatcher(b=word.lower())
    for key in schema_keys():
        bonus = _SAME_SECTION if key.section == section else 0.0
        bonus -= (0.0 if key.acts else _WITHOUT_EFFECT) + _DEPTH * key.path.count(".")
        matcher.set_seq1(key.name.lower())
        if matcher.real_quick_ratio() + bonus <= max(best_score, _ENOUGH):
            continue
        if matcher.quick_ratio() + bonus <= max(best_score, _ENOUGH):
            continue
        score = matcher.ratio() + bonus
        if score > max(best_score, _ENOUGH):
            best, best_score = key.path, score
    return best


def is_misspelt(name: str, section: str) -> bool:
    """Whether a name that an open section would take is all but that of a key that acts, there or
    at the top level."""
    acting = {key.name for key in schema_keys() if key.acts and key.section in (section, "")}
    return name not in acting and bool(get_close_matches(name, acting, n=1, cutoff=_MISSPELT))


def word_elsewhere(name: str) -> str:
    """The key for a word of other tools; empty where it is none of their known ones."""
    return _PATHS.get(name, "")


def did_you_mean_key(name: str, section: str) -> str:
    """`did you mean `optimizer.weight_decay`?`, or an empty string."""
    key = nearest_key(name, section)
    return f"did you mean `{key}`? {remark(name)}".rstrip() if key else ""


def remark(name: str) -> str:
    """How a value of a word of another launcher is written here; empty where there is nothing to
    add to its key."""
    return _REMARKS.get(name, "")
