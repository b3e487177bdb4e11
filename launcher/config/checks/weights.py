"""Rules about weights: the assertions of the configuration agree with the files.

Owns the table of `docs/weights.md`: which files one process or several may load, with and without
resharding. Headers are read as plain JSON, tensors never. A run that only saves its strategy
(`only_save_strategy`) needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.checks.found import Files, files_of, is_safetensors
from launcher.config.checks.paths import nearest_path
from launcher.config.derived import mesh_of, predict_mesh_of
from launcher.config.provenance import KeyProblem
from launcher.environment import process_environment
from launcher.errors import UserError
from launcher.layout.mesh import Mesh, other_layout
from launcher.weights.formats import header_of, rank_header_of
from launcher.weights.formats.placeholders import unfinished_download
from launcher.weights.formats.rank_metadata import REDUNDANCY
from launcher.weights.formats.safetensors import ZIP
from launcher.weights.offline.copy_record import FOLDERS, foreign
from launcher.weights.source import check_one_kind, detect, is_rank_folder, weights_below

_PLACES = ("load_checkpoint", "pretrained_model_dir")
_KEYS = ("load_checkpoint", "pretrained_model_dir", "use_parallel")


def weights(check: Check) -> Iterator[KeyProblem]:
    """Weights exist where they are set or required."""
    config = check.config
    if config.only_save_strategy:
        return
    path, found = Path(config.load_checkpoint), files_of(check)
    if not config.load_checkpoint:
        if found is None:
            yield from _no_weights(check)
    elif not path.exists():
        if not _is_own_output(check, path):
            yield check.wrong(
                "load_checkpoint",
                "no such file or directory",
                nearest=nearest_path(config.load_checkpoint),
                advice="Give a file or a directory of weights, relative to the current directory",
            )
    elif found is None and (error := _cannot_be_listed(path)):
        yield from _reported(check, "load_checkpoint", error)
    elif found is None and config.resume_training is not True:
        yield check.wrong(
            "load_checkpoint",
            "contains no weights (*.safetensors, torch files or rank_N directories)",
            nearest=unfinished_download(path) or weights_below(path),
        )
    elif config.resume_training is False and (error := _error_of(check_one_kind, path)):
        yield from _reported(check, "load_checkpoint", error)


def _cannot_be_listed(path: Path) -> UserError | None:
    return _error_of(detect, path)


def _error_of(function: Callable[[Path], object], path: Path) -> UserError | None:
    try:
        function(path)
    except UserError as error:
        return error
    return None


def _is_own_output(check: Check, path: Path) -> bool:
    """Whether the path is one that this run writes, as for a run that always resumes."""
    if check.config.resume_training is not True:
        return False
    return path.resolve().is_relative_to(Path(check.config.output_dir).resolve())


def _no_weights(check: Check) -> Iterator[KeyProblem]:
    config = check.config
    also = ("load_checkpoint", "pretrained_model_dir", "resume_training")
    if config.resume_training is not False:
        return  # the first start of a run that always resumes
    if check.mode == "finetune":
        pretrained = config.pretrained_model_dir
        inside = f" ({pretrained} contains no *.safetensors)" if pretrained else ""
        yield check.wrong(
            "load_checkpoint",
            "finetune requires weights",
            what=f"no weights are given{inside}",
            advice="Set load_checkpoint, or pretrained_model_dir to a directory with *.safetensors",
            also=also,
        )
    elif config.auto_trans_ckpt:
        yield check.wrong(
            "auto_trans_ckpt",
            "there are no weights to reshard",
            advice="Set load_checkpoint, or remove auto_trans_ckpt",
            also=also,
        )


def file_format(check: Check) -> Iterator[KeyProblem]:
    """The files have a supported format, and load_ckpt_format agrees with it."""
    found = None if check.config.only_save_strategy else files_of(check)
    if found is None or found.one is None:
        return
    name, kind = "safetensors" if is_safetensors(found.one) else "ckpt", _kind_of(found)
    if name == "ckpt":
        try:
            _refuse_unread(found)
        except UserError as error:
            yield from _reported(check, found.key, error)
            return
    if check.config.load_ckpt_format not in (None, name) and found.key == "load_checkpoint":
        yield check.wrong(
            "load_ckpt_format",
            f"{found.path} contains {kind}{' (ckpt)' * (kind == 'torch files')}",
            nearest=f"Nearest: {name}",
            advice="Or remove the key",
            also=("load_checkpoint",),
        )


def damage(check: Check) -> Iterator[KeyProblem]:
    """Files of complete weights are not damaged, judged by headers and index. One rank of each
    machine checks them, so that no rank waits for one that has ended."""
    found = None if check.config.only_save_strategy else files_of(check)
    if found is None or found.kind == "distributed" or process_environment().local_rank:
        return
    if is_rank_folder(found.path):
        return  # part of distributed weights
    try:
        found.look()
    except UserError as error:
        yield from _reported(check, found.key, error)


def _reported(check: Check, key: str, error: UserError) -> Iterator[KeyProblem]:
    """The problems of files as problems of the key that names them."""
    for problem in error.problems:
        what = f"{problem.where}: {problem.what}" if problem.where else problem.what
        yield check.wrong(
            key, problem.rule, what=what, nearest=problem.nearest, advice=problem.advice,
            also=_PLACES,
        )  # fmt: skip


def _kind_of(found: Files) -> str:
    """What the files are, in messages."""
    if found.one is not None and is_safetensors(found.one):
        return "safetensors"
    return "torch files" if found.header is None else ".ckpt files of MindSpore"


def _refuse_unread(found: Files) -> None:
    """Raise `UserError` for a format that is known and not supported, without torch."""
    assert found.one is not None
    with found.one.open("rb") as opened:
        is_torch = opened.read(4) == ZIP
    if not is_torch:
        header_of(found.one)
    elif found.kind == "distributed":
        rank_header_of(found.one)  # raises: no rank file is of torch


def cutting(check: Check) -> Iterator[KeyProblem]:
    """auto_trans_ckpt: False asserts that no weights need to be resharded."""
    config = check.config
    found = None if config.only_save_strategy else files_of(check)
    if config.auto_trans_ckpt is not False or found is None:
        return
    mesh = _mesh(check)
    if mesh is None:
        return
    several = mesh.world_size > 1 if config.use_parallel is None else config.use_parallel
    if found.kind != "distributed":
        processes = f"the run has {mesh.world_size} processes" if mesh.world_size > 1 else (
            "use_parallel is True")  # fmt: skip
        wrong = f"{found.path} contains complete weights, but {processes}" if several else ""
    else:
        wrong = _other_layout(check, found, mesh)
    if wrong:
        yield check.wrong(
            "auto_trans_ckpt",
            wrong,
            advice="Set auto_trans_ckpt to True, or remove it",
            also=_KEYS,
        )


def _mesh(check: Check) -> Mesh | None:
    try:
        if check.predicts and check.spec is not None:
            return predict_mesh_of(check.config, check.spec.decoder)
        return mesh_of(check.config)
    except ValueError:
        return None  # reported by another rule


def _other_layout(check: Check, found: Files, mesh: Mesh) -> str:
    """How the layout of the files differs from that of the run; empty when it does not, or is not
    recorded."""
    if isinstance(check.config.resume_training, str) and check.trains:
        return ""  # the save is chosen when it is opened
    if found.ranks is None:
        return ""
    sizes = found.rank_metadata.mesh if found.rank_metadata else None
    # Where axes are unknown, boxes are compared later.
    difference = other_layout(found.ranks, sizes, mesh)
    return f"{found.path} {difference}" if difference else ""


def copies(check: Check) -> Iterator[KeyProblem]:
    """Copies of weights replace only copies that an earlier run wrote."""
    for key, folder in FOLDERS.items():
        is_on = bool(check.value(key)) and not check.config.only_save_strategy
        reason = foreign(Path(check.config.output_dir) / folder, key) if is_on else ""
        if reason:
            yield check.wrong(
                key,
                "only a copy that an earlier run wrote is replaced",
                what=reason,
                advice="Move it away, or set another output_dir",
                also=("output_dir",),
            )


def warnings(check: Check) -> list[str]:
    """Keys about weights that are set and not needed, one line each."""
    config, found = check.config, files_of(check)
    if config.only_save_strategy:
        return []
    reasons: dict[str, str] = {}
    if config.use_parallel and check.world_size == 1:
        reasons["use_parallel"] = "not needed, only one process was started (see torchrun)"
    if found is None:
        return _lines(check, reasons)
    is_complete = found.kind != "distributed"
    held = f"{found.path} contains complete weights"
    if config.auto_trans_ckpt and is_complete and check.world_size == 1:
        reasons["auto_trans_ckpt"] = f"not needed, {held}, and one process loads them"
    if is_complete or found.rank_metadata is not None:
        reason = held if is_complete else f"the files of {found.path} describe their layout"
        reasons["src_strategy_path_or_dir"] = f"not needed, {reason}"
    if is_complete:
        reasons["save_unified_checkpoint"] = f"not needed, {held}"
    if not is_complete or found.is_mindspore:
        reason = "are in MindSpore's format already" if is_complete else "are distributed"
        reasons["save_converted_checkpoint"] = f"no effect, the weights in {found.path} {reason}"
    given = {key: why for key, why in reasons.items() if check.value(key)}
    return _lines(check, _of_files(check, found) | given)


def _of_files(check: Check, found: Files) -> dict[str, str]:
    """Assertions about the files that are wrong and harmless: the files decide. MindFormers does so
    with remove_redundancy since 1.5.0."""
    reasons: dict[str, str] = {}
    asserted = check.config.remove_redundancy
    recorded = found.header.metadata.get(REDUNDANCY) if found.header else None
    if found.kind == "distributed" and recorded in ("True", "False") and asserted not in (
        None, recorded == "True"):  # fmt: skip
        reasons["remove_redundancy"] = (
            f"no effect, {found.one} records {recorded}, which takes precedence"
        )
    form = "safetensors" if found.one and is_safetensors(found.one) else "ckpt"
    if found.key != "load_checkpoint" and check.config.load_ckpt_format not in (None, form):
        reasons["load_ckpt_format"] = (
            f"no effect, load_checkpoint is empty, and {found.path} contains {_kind_of(found)}"
        )
    return reasons


def _lines(check: Check, reasons: dict[str, str]) -> list[str]:
    return [
        f"{check.provenance.where(key)}: {key} = {check.value(key)!r}: {reason}"
        for key, reason in reasons.items()
    ]
