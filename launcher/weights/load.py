"""Loading: strict, box by box, with a table of everything that does not fit.

Owns the agreement between what a model needs and what the files hold. Invariant: either every
element of every target is written exactly once, or nothing is written and the user is told all
differences (`strict_load: False` is the explicit way out, and says what it left alone).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from launcher.errors import Problem, UserError
from launcher.layout.box import Shape
from launcher.weights.memory import Shard
from launcher.weights.plan import plan_box
from launcher.weights.read import fill
from launcher.weights.source import OPTIMIZER_PREFIXES, Source

ROWS_SHOWN = 20


@dataclass(frozen=True)
class LoadReport:
    """What a load did, for the three lines the user sees."""

    loaded: int
    """Tensors of the whole model that the files had."""
    bytes_read: int
    tied: tuple[str, ...] = ()
    not_loaded: tuple[str, ...] = ()
    left_in_files: tuple[str, ...] = field(default=())


def load(
    targets: Mapping[str, Shard],
    source: Source,
    *,
    tied: Mapping[str, str] | None = None,
    ignore_prefixes: Collection[str] = OPTIMIZER_PREFIXES,
    strict: bool = True,
    rank: int = 0,
    expected: Mapping[str, Shape] | None = None,
    leave: Callable[[str], bool] = lambda name: False,
) -> LoadReport:
    """Fill every target from `source`.

    `expected` is the whole model, name to global shape, where `targets` are only what this rank
    holds of it: every rank then finds the same differences. `leave(name)` is True for tensors of
    the files that are known and not wanted. `tied` maps a name that shares the memory of another
    parameter to that parameter: files may hold both, one or the other. Names that start with one of
    `ignore_prefixes` are not looked for. Raises `UserError` with the table of missing, extra and
    misshapen tensors.
    """
    tied = dict(tied or {})
    if expected is None:
        expected = {name: target.shape for name, target in targets.items()}
    found = _tie_names({name: name for name in source.tensors}, expected, tied)
    missing = [name for name in expected if name not in found]
    unknown = [
        name
        for name in source.tensors
        if name not in expected and name not in tied and not name.startswith(tuple(ignore_prefixes))
    ]
    extra = [name for name in unknown if not leave(name)]
    misshapen = [
        name
        for name, shape in expected.items()
        if name in found and source.shape(found[name]) != shape
    ]
    if misshapen or (strict and (missing or extra)):
        raise _differences(expected, source, missing, extra, misshapen)
    jobs = [
        (target.tensor, target.box,
         plan_box(name, target.box, source.tensors[found[name]], prefer_rank=rank))
        for name, target in targets.items() if name in found
    ]  # fmt: skip
    bytes_read = fill(jobs)
    if strict:
        _check_tied(targets, source, tied)
    loaded = sum(name in found for name in expected)
    return LoadReport(loaded, bytes_read, tuple(sorted(tied)), tuple(missing), tuple(unknown))


def _check_tied(targets: Mapping[str, Shard], source: Source, tied: Mapping[str, str]) -> None:
    """Where files hold a tied tensor under both names, it must be one tensor: the model has room
    for one."""
    for alias, name in tied.items():
        if alias not in source.tensors or name not in source.tensors or name not in targets:
            continue
        target = targets[name]
        other = torch.empty_like(target.tensor)
        fill([(other, target.box, plan_box(alias, target.box, source.tensors[alias]))])
        if not torch.equal(other, target.tensor):
            raise UserError(
                f"`{alias}` and `{name}` differ in the files",
                where=str(source.path),
                rule="the model ties them: it has one tensor for both",
                advice="Set tie_word_embeddings: False, or strict_load: False to drop the former",
            )


def _tie_names(
    found: dict[str, str], expected: Mapping[str, Shape], tied: Mapping[str, str]
) -> dict[str, str]:
    """Model name to name in the files: a tied parameter may be filed under its other name."""
    for alias, name in tied.items():
        if name in expected and name not in found and alias in found:
            found[name] = alias
    return {name: file_name for name, file_name in found.items() if name in expected}


def _differences(
    expected: Mapping[str, Shape],
    source: Source,
    missing: list[str],
    extra: list[str],
    misshapen: list[str],
) -> UserError:
    rows = [(name, "missing", str(list(expected[name]))) for name in missing]
    rows += [(name, str(list(source.shape(name))), "unknown") for name in extra]
    rows += [
        (name, str(list(source.shape(name))), str(list(expected[name])))
        for name in misshapen if name in source.tensors
    ]  # fmt: skip
    width = max(len(name) for name, _, _ in rows[:ROWS_SHOWN])
    lines = [f"  {'tensor':{width}}  {'in the files':>16}  {'in the model':>16}"]
    lines += [
        f"  {name:{width}}  {disk:>16}  {model:>16}" for name, disk, model in rows[:ROWS_SHOWN]
    ]
    if len(rows) > ROWS_SHOWN:
        lines.append(f"  ... and {len(rows) - ROWS_SHOWN} more")
    counts = f"{len(missing)} missing, {len(extra)} extra, {len(misshapen)} of another shape"
    return UserError(
        Problem(
            where=str(source.path),
            what=f"the weights do not fit the model ({counts})",
            rule="every parameter is written exactly once",
            advice="Give the weights of this model, or mend model.model_config; "
            + ("strict_load: False loads what fits" if not misshapen else "shapes must agree")
            + "\n" + "\n".join(lines)
            + "\n",
        )
    )  # fmt: skip
