"""Evaluation: named sets, early stopping, the best save, and the words of other tools for them."""

from __future__ import annotations

from tests.config.tables import Error, Row

SET = "data_loader: {type: TextDataLoader, dataset_dir: corpus}"
ONE = f"do_eval: True\neval_step_interval: 5\neval_dataset:\n  {SET}\n"
TWO = (
    f"do_eval: True\neval_step_interval: 5\neval_datasets:\n- name: near\n  {SET}\n"
    f"- name: far\n  {SET}\n"
)
DO_EVAL = "do_eval: True, with an eval_dataset"
MONITOR = "    save_checkpoint_steps: 10\n"


def monitor(*lines: str) -> dict[str, str]:
    """The right configuration with more keys of CheckpointMonitor."""
    return {MONITOR: MONITOR + "".join(f"    {line}\n" for line in lines)}


def stopping(*lines: str) -> dict[str, str]:
    """The right configuration with EarlyStopping."""
    return {MONITOR: MONITOR + "  - type: EarlyStopping\n" + "".join(f"    {x}\n" for x in lines)}


TABLE = (
    Row(
        name="evaluation sets in two places",
        add=ONE + f"eval_datasets: [{{name: far, {SET}}}]\n",
        errors=(Error("eval_dataset and eval_datasets are both set", at="eval_dataset:"),),
    ),
    Row(
        name="names of evaluation sets",
        add=f"do_eval: True\neval_datasets:\n- {SET}\n- name: a/b\n  {SET}\n"
        f"- name: far\n  {SET}\n- name: 'far'\n  {SET}\n",
        errors=(
            Error("eval_datasets.0.name is missing", at=f"- {SET}"),
            Error("eval_datasets.1.name = 'a/b'", at="a/b"),
            Error("eval_datasets.3.name = 'far'", at="'far'", near="far-2"),
        ),
    ),
    Row(
        name="an unknown key and a missing file of a named set",
        add=f"do_eval: True\neval_datasets:\n- name: far\n  pakcing: True\n"
        f"  {SET.replace('corpus', 'corpsu')}\n",
        errors=(
            Error("`eval_datasets.0.pakcing`", at="pakcing", near="eval_datasets.0.packing"),
            Error("eval_datasets.0.data_loader.dataset_dir = 'corpsu'", at="corpsu", near="corpus"),
        ),
    ),
    Row(
        name="a map of evaluation sets",
        add=f"do_eval: True\neval_datasets:\n  far:\n    {SET}\n",
        errors=(Error("eval_datasets = ", at="eval_datasets:"),),
    ),
    Row(
        name="early stopping without evaluation",
        replace=stopping(),
        errors=(Error("EarlyStopping", at="EarlyStopping", near=DO_EVAL),),
    ),
    Row(
        name="early stopping by an unknown metric",
        replace=stopping("metric: eval_loss/fra"),
        add=TWO,
        errors=(Error("callbacks.2.metric = 'eval_loss/fra'", at="metric:", near="eval_loss/far"),),
    ),
    Row(
        name="numbers of early stopping",
        replace=stopping("patience: 0", "min_delta: -1", "mode: lower"),
        add=ONE,
        errors=(
            Error("callbacks.2.patience = 0", at="patience"),
            Error("callbacks.2.min_delta = -1", at="min_delta"),
            Error("callbacks.2.mode = 'lower'", at="mode: lower"),
        ),
    ),
    Row(
        name="the worst loss as the best",
        replace=stopping("mode: max"),
        add=ONE,
        errors=(Error("callbacks.2.mode = 'max'", at="mode: max", near="min"),),
    ),
    Row(
        name="the best save by a metric that is not computed",
        replace=monitor("keep_best: True", "best_metric: loss"),
        add=ONE,
        errors=(Error("callbacks.1.best_metric = 'loss'", at="best_metric", near="eval_loss"),),
    ),
    Row(
        name="the best save without evaluation",
        replace=monitor("keep_best: True"),
        errors=(
            Error(
                "callbacks.1.keep_best = True",
                at="keep_best",
                near=DO_EVAL,
            ),
        ),
    ),
    Row(
        name="saves of steps that are not evaluated",
        replace={MONITOR: "    save_checkpoint_steps: 12\n    keep_best: True\n"},
        add=ONE,
        errors=(
            Error("callbacks.1.save_checkpoint_steps = 12", at="steps: 12", near=("10", "15")),
        ),
    ),
    Row(
        name="the best of saves by time",
        replace={
            MONITOR: "    save_checkpoint_steps: 0\n    save_checkpoint_seconds: 60\n"
            "    keep_best: True\n"
        },
        add=ONE,
        errors=(
            Error("callbacks.1.keep_best = True", at="keep_best", near="save_checkpoint_steps: 5"),
        ),
    ),
    Row(
        name="words of other tools for evaluation",
        add="load_best_model_at_end: True\nmetric_for_best_model: loss\n"
        "early_stopping_patience: 3\neval_steps: 10\n",
        errors=(
            Error(
                "`load_best_model_at_end`",
                at="load_best",
                near="callbacks[CheckpointMonitor].keep_best",
            ),
            Error(
                "`metric_for_best_model`",
                at="metric_for",
                near="callbacks[CheckpointMonitor].best_metric",
            ),
            Error(
                "`early_stopping_patience`",
                at="early_stop",
                near="callbacks[EarlyStopping].patience",
            ),
            Error("`eval_steps`", at="eval_steps", near="eval_step_interval"),
        ),
    ),
)
