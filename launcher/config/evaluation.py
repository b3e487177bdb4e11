"""What evaluation rows of a configuration have: the names of their metrics, and which values of
them are better.

Imports nothing heavy.
"""

from __future__ import annotations

from launcher.config.mixture import source_names
from launcher.config.schema import Config, DatasetSection

METRICS = ("eval_loss", "eval_perplexity")
"""Of all evaluation data together, and with `/<name>` of one set."""
REWARDS = ("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/margins")
"""Of one set of preferences, which has no perplexity; of pairs also `ACCURACY`."""
_REJECTED = "eval_rewards/rejected"
ACCURACY = "eval_rewards/accuracies"


_EITHER = ("eval_rewards/chosen", _REJECTED)
"""Metrics that may be followed in both directions."""


def mode_of(metric: str, given: str | None) -> str:
    """`min` where lower values of a metric are better, `max` where higher ones are. `given`: the
    configured one, which decides."""
    is_reward = metric.startswith((*REWARDS, ACCURACY)) and not metric.startswith(_REJECTED)
    return given or ("max" if is_reward else "min")


def is_contradiction(metric: str, given: str | None) -> bool:
    """Whether the worst value of a metric would count as its best."""
    return not metric.startswith(_EITHER) and mode_of(metric, given) != mode_of(metric, None)


def metric_names(config: Config) -> list[str]:
    """The metrics that early stopping and `keep_best` may follow."""
    loss = config.preference_loss
    rewards = [] if loss is None else [*REWARDS, *([] if loss == "kto" else [ACCURACY])]
    metrics = METRICS if loss is None else ("eval_loss", *rewards)
    names = list(metrics if config.eval_dataset is not None or loss is None else ("eval_loss",))
    if config.eval_dataset is not None:
        names += [f"eval_loss/{source}" for source in _sources(config.eval_dataset)]
    for section in config.eval_datasets:
        names += [f"{metric}/{section.name}" for metric in metrics]
        names += [f"eval_loss/{section.name}/{source}" for source in _sources(section)]
    return names


def _sources(section: DatasetSection) -> list[str]:
    return source_names(section.data_loader) if isinstance(section.data_loader, list) else []
