"""The schema of the configuration: one frozen dataclass a section, a docstring under each field.

Owns names, types, defaults and bounds of every key with a field; launcher/config/extra_keys.py has
the others. Imports the standard library only. Rules between sections live in
launcher/config/rules.py, reading of YAML in launcher/config/resolve.py.
"""

from __future__ import annotations

from launcher.config.schema.callbacks import (
    CALLBACKS,
    CallbackSection,
    CheckpointMonitorSection,
    EvalCallbackSection,
    IgnoredCallbackSection,
    LossMonitorSection,
    MonitorSection,
    OnRequestExitSection,
    RegisteredCallbackSection,
    TensorboardSection,
)
from launcher.config.schema.data import (
    CONVERSATION_LOADERS,
    DataCacheSection,
    DataLoaderSection,
    DatasetSection,
    DatasetTaskSection,
    MegatronConfigSection,
    MixtureSourceSection,
)
from launcher.config.schema.evaluation import EarlyStoppingSection, NamedDatasetSection
from launcher.config.schema.field import FieldInfo, Status, info_of
from launcher.config.schema.model import (
    GenerationSection,
    ModelSection,
    ProcessorSection,
    TokenizerSection,
    TrainerSection,
)
from launcher.config.schema.parallel import (
    ContextSection,
    ParallelConfigSection,
    ParallelOptimizerConfigSection,
    ParallelSection,
    PipelineConfigSection,
    RecomputeSection,
    SwapSection,
)
from launcher.config.schema.preference import (
    JUDGED,
    PAIRS,
    PREFERENCE_ARGUMENTS,
    PREFERENCE_TRAINERS,
    WITH_REFERENCE,
    PreferenceSection,
    ReferenceSection,
)
from launcher.config.schema.root import RUN_MODES, TRACKERS, Config
from launcher.config.schema.training import (
    DYNAMIC_LOSS_SCALE,
    LARGEST_LOSS_SCALE,
    LOSS_SCALES,
    OPTIMIZER_ARGUMENTS,
    SCHEDULE_ARGUMENTS,
    SCHEDULES_WITHOUT_WARMUP,
    WARMUP_ARGUMENTS,
    LrScheduleSection,
    OptimizerSection,
    RunnerSection,
    RunnerWrapperSection,
)

__all__ = [
    "CALLBACKS",
    "CONVERSATION_LOADERS",
    "DYNAMIC_LOSS_SCALE",
    "JUDGED",
    "LARGEST_LOSS_SCALE",
    "LOSS_SCALES",
    "OPTIMIZER_ARGUMENTS",
    "PAIRS",
    "PREFERENCE_ARGUMENTS",
    "PREFERENCE_TRAINERS",
    "RUN_MODES",
    "SCHEDULES_WITHOUT_WARMUP",
    "SCHEDULE_ARGUMENTS",
    "TRACKERS",
    "WARMUP_ARGUMENTS",
    "WITH_REFERENCE",
    "CallbackSection",
    "CheckpointMonitorSection",
    "Config",
    "ContextSection",
    "DataCacheSection",
    "DataLoaderSection",
    "DatasetSection",
    "DatasetTaskSection",
    "EarlyStoppingSection",
    "EvalCallbackSection",
    "FieldInfo",
    "GenerationSection",
    "IgnoredCallbackSection",
    "LossMonitorSection",
    "LrScheduleSection",
    "MegatronConfigSection",
    "MixtureSourceSection",
    "ModelSection",
    "MonitorSection",
    "NamedDatasetSection",
    "OnRequestExitSection",
    "OptimizerSection",
    "ParallelConfigSection",
    "ParallelOptimizerConfigSection",
    "ParallelSection",
    "PipelineConfigSection",
    "PreferenceSection",
    "ProcessorSection",
    "RecomputeSection",
    "ReferenceSection",
    "RegisteredCallbackSection",
    "RunnerSection",
    "RunnerWrapperSection",
    "Status",
    "SwapSection",
    "TensorboardSection",
    "TokenizerSection",
    "TrainerSection",
    "info_of",
]
