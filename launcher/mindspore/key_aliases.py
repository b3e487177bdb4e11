"""Second names that MindFormers has for keys: older and newer spellings, and other places."""

from __future__ import annotations

ALIASES = {
    "generation": "generation_config",
    "profiler_level": "profile_level",
    "load_balanced": "balanced_load",
    "top_k": "generation_config.top_k",
    "parallel_config.micro_batch_interleave_num": "micro_batch_interleave_num",
    "generation_config.max_decode_length": "generation_config.max_length",
    "lr_schedule.base_lr": "lr_schedule.learning_rate",
    "model.model_config.pet_config": "pet_config",
    "pet_config.exclude_layers": "pet_config.exclude_modules",
    "checkpoint.reshard_worker_number": "checkpoint.reshard_worker_num",
}
"""Alias to key; a section before its keys."""
