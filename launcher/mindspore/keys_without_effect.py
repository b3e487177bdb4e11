"""Keys of MindFormers that are accepted and have no effect on PyTorch, with the reason of each.

A table of section, reason, key and type. `*` is any other key of the section. The first section is
the top level; `train_dataset` is for `eval_dataset` too.
"""

from __future__ import annotations

from typing import Any

KEYS_WITHOUT_EFFECT: dict[str, dict[str, dict[str, Any]]] = {
    "pet_config": {
        "A is uniform in +-1 / sqrt(inputs) and B is zeros, as in PEFT": {
            "lora_a_init": str,
            "lora_b_init": str,
        },
        "adapters have the dtypes of their layer": {
            "param_init_type": str | None,
            "compute_dtype": str | None,
        },
    },
    "": {
        "every rank reads its own slices": {
            "transform_process_num": int,
            "transform_by_rank": bool,
        },
        "only for ckpt files, and ignored for safetensors": {"load_ckpt_async": bool},
        "old and new configurations are read in the same way": {"use_legacy": bool},
        "there is one checkpoint format": {"use_legacy_format": bool},
        "the number of threads is chosen automatically": {"reshard_worker_num": int},
        "metrics.jsonl has every part of the loss": {"print_separate_loss": bool},
        "layer_scale is off": {"layer_decay": float},
        "a profile is a trace and tables: there is no raw data to delete": {
            "data_simplification": bool,
        },
        "only for ModelArts": {"remote_save_url": str | None},
        "there is no Ascend device": {"exclude_cann_cpu": bool, "npu_num_per_node": int | None},
        "tokens are chosen by PyTorch": {"postprocess_use_numpy": bool},
        "OnRequestExit in callbacks is enough; Ctrl-C and SIGTERM save and end cleanly anyway": {
            "use_graceful_exit": bool
        },
        "reading is not tuned": {
            "auto_tune": bool,
            "filepath_prefix": str,
            "autotune_per_step": int,
        },
        "evaluation reports loss and perplexity": {"eval_callbacks": list[Any]},
        "run_mode decides": {"do_train": bool, "do_predict": bool},
        "the loss is the cross entropy of the next token": {"loss": dict[str, Any] | None},
        "nothing is pushed to a hub": {
            "hub_model_id": str | None,
            "hub_token": str | None,
            "hub_private_repo": bool,
        },
    },
    "generation_config": {
        "keys and values are always kept": {"use_past": bool},
        "speculative decoding changes no token, and is off": {
            "parallel_decoding": str | None,
            "window_size": int,
            "level": int,
            "guess_set_size": int,
        },
    },
    "optimizer": {
        "AdamW is always fused": {"use_fused_adamw": bool},
        "register_path is used instead": {"auto_register": str | None},
    },
    "lr_schedule": {"register_path is used instead": {"auto_register": str | None}},
    "trainer": {
        "register_path is used instead": {"auto_register": str | None},
        "the model is described by model.model_config": {"model_name": str},
    },
    "model": {
        "model_config determines the architecture": {"arch": dict[str, Any]},
    },
    "processor": {
        "only text is read": {"image_processor": Any, "audio_processor": Any},
        "register_path is used instead": {"auto_register": str | None},
        "there is one kind of processor": {"type": str},
        "tensors are of PyTorch": {"return_tensors": str},
    },
    "processor.tokenizer": {
        "there are no such tokens in a causal language model": {
            "mask_token": str | None,
            "gmask_token": str | None,
            "end_token": str | None,
        },
        "register_path is used instead": {"auto_register": str | None},
        "only --trust_remote_code on the command line is used": {"trust_remote_code": bool},
    },
    "runner_config": {
        "only language models are trained": {"num_classes": int, "image_size": int},
        "a resumed run knows where it was": {
            "initial_epoch": int,
            "has_trained_epoches": int,
            "has_trained_steps": int,
        },
        "the top-level key decides": {"load_checkpoint": str | None},
    },
    "parallel_config": {
        "obsolete; the switch is parallel.enable_parallel_optimizer": {
            "optimizer_shard": bool | None
        },
        "there is no automatic strategy search": {"mem_coeff": float},
        "sequences go through the pipeline in one piece, with the same result": {
            "seq_split_num": int
        },
    },
    "parallel": {
        "degrees come from parallel_config": {"parallel_mode": int | str},
        "every rank reads exactly its share of the global batch": {
            "full_batch": bool,
            "dataset_strategy": list[Any] | str | None,
        },
        "there is no automatic strategy search": {
            "search_mode": str,
            "auto_parallel_search_mode": str | None,
        },
        "the loss is always the mean over the tokens": {
            "gradients_mean": bool,
            "loss_repeated_mean": bool,
        },
        "it configures MindSpore's graph compiler": {"enable_alltoall": bool},
        "checkpoints describe their own layout": {"strategy_ckpt_save_file": str},
        "the number of processes decides": {"device_num": int | None},
    },
    "parallel.parallel_optimizer_config": {
        "FSDP2 always keeps accumulated gradients sharded": {"gradient_accumulation_shard": bool},
        "FSDP2 shards small parameters too": {"parallel_optimizer_threshold": int},
    },
    "parallel.strategy_ckpt_config": {
        "checkpoints describe their own layout": {"save_file": str, "only_trainable_params": bool},
    },
    "context": {
        "PyTorch runs eagerly": {"mode": int | str},
        "the rank decides": {"device_id": int},
        "the allocator of PyTorch decides": {"max_device_memory": str, "mempool_block_size": str},
        "it configures MindSpore's graph compiler": {
            "max_call_depth": int,
            "save_graphs": bool | int,
            "save_graphs_path": str,
            "jit_config": dict[str, Any],
            "memory_optimize_level": str,
        },
        "there is no Ascend device": {"ascend_config": dict[str, Any]},
        "processes are not bound to cores": {"affinity_cpu_list": Any},
        "it configures MindSpore's context": {"*": Any},
    },
    "runner_wrapper": {
        "there is one training step": {"type": str},
        "register_path is used instead": {"auto_register": str | None},
    },
    "train_dataset": {
        "runner_config.batch_size decides": {"batch_size": int | None},
        "the columns are always input_ids and labels": {
            "input_columns": list[str] | None,
            "output_columns": list[str] | None,
            "construct_args_key": list[str] | None,
        },
        "rows are prepared once and memory-mapped": {
            "python_multiprocessing": bool,
            "numa_enable": bool,
            "prefetch_size": int,
            "auto_tune": bool,
            "filepath_prefix": str,
            "autotune_per_step": int,
        },
        "the top-level do_eval decides": {"do_eval": bool},
        "the data is not profiled": {"profile": bool},
        "rows have one length": {"divisor": int | None, "remainder": int | None},
        "packing always keeps documents apart": {"eod_reset": bool},
        "document boundaries are known from the source": {"eod_token_id": int | None},
        "metrics.jsonl reports the tokens of a step": {"token_monitor": bool},
        "it is for image models": {"mixup_op": Any},
    },
    "train_dataset.data_loader": {
        "nothing is downloaded": {
            "revision": str | None,
            "token": Any,
            "use_auth_token": Any,
            "download_config": Any,
            "download_mode": str | None,
            "verification_mode": str | None,
            "ignore_verifications": bool,
            "save_infos": bool,
        },
        "files are read in place, and tokens are cached in output_dir": {
            "cache_dir": str | None,
            "keep_in_memory": bool | None,
            "num_proc": int | None,
        },
        "columns have the types of the files": {"features": Any},
        "only --trust_remote_code on the command line is used": {"trust_remote_code": bool | None},
        "attention follows from the document boundaries": {
            "create_attention_mask": bool,
            "create_compressed_eod_mask": bool,
            "compressed_eod_mask_length": int,
        },
        "rows are prepared once and memory-mapped": {"use_broadcast_data": bool},
        "the columns are always input_ids and labels": {"column_names": list[str] | None},
        "a checkpoint has the position in a stream; runner_config.max_steps is its length": {
            "size": int | None,
            "dataset_state_dir": str | None,
            "save_step": int | None,
            "resume_step": int | None,
            "batch_size": int | None,
        },
        "every rank reads exactly its share": {"num_shards": int | None, "shard_id": int | None},
    },
    "train_dataset_task": {
        "there is no wrapper around a data set": {"type": str},
    },
    "recompute_config": {
        "gathered weights are always freed and gathered again": {
            "parallel_optimizer_comm_recompute": bool
        },
        "communication is recomputed with its layer or module": {
            "select_comm_recompute": bool | list[Any] | dict[str, Any],
            "mp_comm_recompute": bool,
            "select_comm_recompute_exclude": bool | list[Any] | dict[str, Any],
        },
        "use_seq_parallel keeps them sliced": {"recompute_slice_activation": bool},
    },
    "swap_config": {
        "copies overlap with the computation": {"default_prefetch": int},
    },
    "moe_config": {
        "experts are described in model.model_config": {
            "capacity_factor": float,
            "aux_loss_factor": float,
            "num_experts_chosen": int,
            "expert_group_size": int | None,
            "group_wise_a2a": bool,
            "comp_comm_parallel": bool,
            "comp_comm_parallel_degree": int,
            "save_token_distribution": bool,
            "cur_layer": int,
            "enable_cold_hot_expert": bool,
            "update_step": int,
            "hot_expert_num": int,
            "cold_token_percent": float,
            "moe_module_name": str,
            "routing_policy": str,
            "norm_topk_prob": bool,
            "enable_sdrop": bool,
            "use_fused_ops_topkrouter": bool,
            "router_dense_type": str,
            "shared_expert_num": int,
            "use_shared_expert_gating": bool,
            "max_router_load": int,
            "topk_method": str,
            "topk_group": int | None,
            "n_group": int | None,
            "first_k_dense_replace": bool | int,
            "moe_intermediate_size": int,
            "routed_scaling_factor": float,
            "aux_loss_types": list[Any] | None,
            "aux_loss_factors": list[Any] | None,
            "z_loss_factor": float,
            "balance_via_topk_bias": bool,
            "topk_bias_update_rate": float,
            "use_allgather_dispatcher": bool,
            "expert_model_parallel": int | None,
            "use_gating_sigmoid": bool,
            "use_gmm": bool,
            "enable_gmm_safe_tokens": bool,
            "use_fused_ops_permute": bool,
            "callback_moe_droprate": bool,
            "moe_init_method_std": float,
            "enable_deredundency": bool,
            "npu_nums_per_device": int,
        },
    },
    "monitor_config": {
        "metrics.jsonl has loss and gradient norm of every step": {
            "monitor_on": bool,
            "print_struct": bool,
            "dump_path": str,
            "target": list[str] | None,
            "invert": bool,
            "step_interval": int,
            "local_loss_format": str | list[str] | None,
            "local_norm_format": str | list[str] | None,
            "device_local_norm_format": str | list[str] | None,
            "device_local_loss_format": str | list[str] | None,
            "optimizer_state_format": str | list[str] | None,
            "weight_state_format": str | list[str] | None,
            "max_attention_logit_format": str | list[str] | None,
            "throughput_baseline": float | None,
            "stable_rank_config": dict[str, Any] | None,
            "health_checkpoint": dict[str, Any] | None,
        },
    },
    "tensorboard": {
        "the writer decides": {"tensorboard_queue_size": int},
        "the loss scale is one of the metrics in TensorBoard": {
            "log_loss_scale_to_tensorboard": bool
        },
        "the time of a step is always written": {"log_timers_to_tensorboard": bool},
        "the load of experts is not recorded": {"log_expert_load_to_tensorboard": bool},
    },
    "metric": {
        "evaluation reports loss and perplexity": {
            "type": str | list[str] | None,
            "eval_type": Any,
        },
        "register_path is used instead": {"auto_register": str | None},
    },
    "checkpoint": {
        "the number of threads is chosen automatically": {"reshard_worker_num": int},
    },
    "callbacks[MFLossMonitor]": {
        "the learning rate in use is printed": {"learning_rate": float | None},
        "known from parallel_config": {"micro_batch_num": int | None},
        "known from the top level": {"micro_batch_interleave_num": int | None},
        "known from runner_config": {
            "origin_epochs": int | None,
            "global_batch_size": int | None,
            "gradient_accumulation_steps": int | None,
        },
        "known from the data": {"dataset_size": int | None},
        "known from the checkpoint": {"initial_epoch": int | None, "initial_step": int | None},
        "the top-level key decides": {"check_for_nan_in_loss_and_grad": bool | None},
        "the loss is always per token": {"calculate_per_token_loss": bool | None},
    },
    "callbacks[CheckpointMonitor]": {
        "the model of the run is saved": {"saved_network": Any},
        "files are not encrypted": {"enc_mode": str},
        "it belongs to the Python interface of MindFormers": {"config": Any},
        "known from runner_config": {"global_batch_size": int | None},
        "the norm is that of the full embedding": {"embedding_size": int},
        "the record is in output_dir": {"health_ckpts_record_dir": str},
        "there is one checkpoint format": {"use_legacy_format": bool},
    },
    "callbacks[OnRequestExit]": {
        "CheckpointMonitor saves whenever a run is ended cleanly": {"save_ckpt": bool},
        "there is no such format": {"save_mindir": bool},
        "CheckpointMonitor names the files": {"file_name": str},
        "CheckpointMonitor sets the directory": {"directory": str},
        "SIGTERM and SIGINT always end a run cleanly": {"sig": int},
    },
}

CHOICES: dict[str, tuple[Any, ...]] = {
    "parallel.parallel_mode": (
        *(0, 1, 2, 3, "DATA_PARALLEL", "SEMI_AUTO_PARALLEL", "AUTO_PARALLEL", "HYBRID_PARALLEL"),
        *("STAND_ALONE", "MANUAL_PARALLEL", "data_parallel", "semi_auto_parallel"),
        *("auto_parallel", "hybrid_parallel", "stand_alone"),
    ),
    "parallel.search_mode": (
        *("sharding_propagation", "recursive_programming", "dynamic_programming"),
    ),
    "context.mode": (0, 1, "GRAPH_MODE", "PYNATIVE_MODE"),
    "runner_wrapper.type": ("MFTrainOneStepCell", "MFPipelineWithLossScaleCell"),
}
"""The values that some of these keys may have."""
