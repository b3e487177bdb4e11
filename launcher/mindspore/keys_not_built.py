"""Keys of MindFormers that are known and not built yet, with what to do instead.

A table of section, advice, key, and its type with the values that ask for nothing; any other value
is an error. The first section is the top level; `train_dataset` is for `eval_dataset` too.
"""

from __future__ import annotations

from typing import Any

KEYS_NOT_BUILT: dict[str, dict[str, dict[str, tuple[Any, ...]]]] = {
    "": {
        "The newest complete checkpoint is chosen by its sequence number: remove it": {
            "resume_by_last_timestamp_ckpt": (bool, False)
        },
        "Only text is predicted: remove it": {"modal_type": (str | list[str] | None, None)},
        "Only one adapter at a time: set pet_config.load_adapter": {
            "adapter_id": (str | list[str] | None, None)
        },
        "The loss is always the mean over the tokens: remove it": {
            "calculate_per_token_loss": (bool | None, None, True)
        },
        "Set it to False": {
            "layer_scale": (bool, False),
            "print_struct": (bool, False),
            "push_to_hub": (bool, False),
        },
        "Use model and train_dataset: there is no pipeline object": {
            "pipeline": (dict[str, Any] | None, None)
        },
    },
    "pet_config": {
        "Use the top-level key freeze": {
            "freeze_include": (list[str] | None, None, []),
            "freeze_exclude": (list[str] | None, None, []),
        },
    },
    "parallel": {
        "Checkpoints describe their own layout: remove it": {"strategy_ckpt_load_file": (str, "")},
    },
    "parallel.strategy_ckpt_config": {
        "Checkpoints describe their own layout: remove it": {"load_file": (str, "")},
    },
    "grouped_lr_schedule": {
        "Use lr_schedule: one curve for all parameters": {
            "default": (dict[str, Any], {}),
            "grouped": (list[Any], []),
        },
    },
    "lr_schedule": {
        "Use learning_rate and lr_end": {
            "max_lr": (float | None, None),
            "min_lr": (float | None, None),
        },
    },
    "runner_wrapper": {
        "Set it to False; the global norm is always reported": {"local_norm": (bool, False)},
        "The loss is always the mean over the tokens: remove it": {
            "calculate_per_token_loss": (bool | None, None, True)
        },
    },
    "train_dataset": {
        "Multiply runner_config.epochs by it: remove it": {"repeat": (int, 1)},
        "Set it to False: rows have one length": {"dynamic_batch": (bool, False)},
        "Set processor.tokenizer.pretrained_model_dir": {
            "tokenizer": (dict[str, Any] | None, None)
        },
        "Only text is read: remove it": {
            "transforms": (Any, None),
            "sampler": (Any, None),
            "mask_policy": (Any, None),
            "column_order": (Any, None),
        },
    },
    "train_dataset.data_loader": {
        "It belongs to HFDataLoader of MindFormers; the keys here are transforms, column_map, "
        "prompt_template and train_dataset.packing": {
            "handler": (Any, None),
            "packing": (Any, None),
            "adaptor_config": (Any, None),
            "column_names": (Any, None),
            "name": (Any, None),
        },
        "Set processor.tokenizer.pretrained_model_dir": {
            "tokenizer": (dict[str, Any] | None, None)
        },
        "Every row is read, in an order that depends on the seed: remove it": {
            "sampler": (Any, None),
            "padded_sample": (Any, None),
            "num_padded": (int | None, None, 0),
        },
        "Rows are memory-mapped: remove it": {"cache": (Any, None)},
        "Use columns": {"columns_list": (list[str] | None, None)},
    },
    "moe_config": {
        "Describe the experts in model.model_config, by the keys of config.json: remove it": {
            "expert_num": (int, 1)
        },
    },
    "checkpoint": {
        "Use load_checkpoint, resume_training and the CheckpointMonitor callback": {
            "save_path": (str | None, None),
            "save_max": (int, 5),
            "save_interleaved_steps": (int, 1),
            "no_save_optim": (bool, False),
            "async_save": (bool | str, False),
            "prefix": (str, "CKP"),
            "save_remove_redundancy": (bool, False),
            "load_path": (str, ""),
            "load_balanced": (bool, False),
            "no_load_optim": (bool | None, None),
        },
    },
    "callbacks[CheckpointMonitor]": {
        "Remove it": {"append_info": (list[Any] | None, None, [])},
        "Remove it: files are not encrypted": {"enc_key": (str | None, None)},
    },
}

CALLBACKS_NOT_BUILT = (
    *("ProfileMonitor", "TrainCallBack", "StressDetectCallBack", "StressTestModelMonitor"),
    *("SDCMonitor", "TopkBiasBalanceCallback", "MoEDropRateCallback", "ColdHotExpertMonitor"),
    *("TrainingStateMonitor", "SummaryMonitor", "MaxLogitsMonitor"),
    *("ExpertMigrateCallback", "LossMonitor", "TimeMonitor", "ModelCheckpoint"),
)
"""The same for the types of callbacks."""
