"""MindFormers' switches of deterministic kernels, which are one key here: `deterministic`.

On is `deterministic: True`. Off, their default, asks for no kernels in particular and is left out:
whoever wants the fastest ones writes `deterministic: False`.

`train_precision_sync` and `infer_precision_sync` are of the modes of their name. Source of keys and
values: the configuration files of mindformers 2.1.0.
"""

from __future__ import annotations

from launcher.config.draft import Draft
from launcher.mindspore.sections.values import refuse, trains, written

_ON, _OFF = ("on", "true"), ("off", "false")


def translate(draft: Draft) -> None:
    """Translate the switches of the older styles."""
    switch(draft, "context.deterministic")
    switch(draft, "train_precision_sync", acts=trains(draft))
    switch(draft, "infer_precision_sync", acts=not trains(draft))
    draft.prune("context")


def switch(draft: Draft, key: str, *, acts: bool = True) -> None:
    """Translate one switch. `acts`: whether it is of the mode of the run."""
    if draft.find(key) is None:
        return
    value = str(written(draft, key, "off")).lower()
    if value not in (*_ON, *_OFF):
        refuse(draft, key, "must be true or false", nearest="Nearest: True")
    elif value in _OFF:
        draft.drop(key, "it is off: `deterministic` decides")
    elif acts:
        draft.replace(key, {"deterministic": True}, "deterministic kernels are one key here")
    else:
        draft.drop(key, "it is of another run_mode")
