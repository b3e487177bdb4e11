"""Which order the rows of fused matrices have, where files do not show it.

What decides, in this sequence: a key of the configuration; the metadata of the files, where Slipway
wrote them; names and shapes. Where none of them does, the order that every version of MindFormers
writes by default is taken, and named in a line of the log. Dense models under core names have no
such default: until 1.6 it was another than since 1.9. They are refused, as a wrong order gives no
error but nonsense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from launcher.errors import UserError
from launcher.layout.box import Shape
from launcher.mindspore.naming.choices import Options, Orders
from launcher.mindspore.naming.sizes import Sizes
from launcher.mindspore.naming.tables import CHATGLM, LEGACY, MCORE, Naming
from launcher.weights.foreign_names import KEYS
from launcher.weights.source import Source

QKV, MLP, BLOCKS, GMM, ROPE = KEYS
"""Keys of the configuration, and of metadata of files that Slipway writes."""


def options_of(keys: Mapping[str, Any]) -> Options:
    """The options that keys of a configuration give."""
    return Options(
        qkv_order=keys.get(QKV), mlp_order=keys.get(MLP), tensor_parallel=keys.get(BLOCKS),
        use_gmm=keys.get(GMM), rearranged_rope=keys.get(ROPE),
    )  # fmt: skip


class Evidence:
    """What the files of one set of weights show. `names`: of its parameters, to their names with
    a prefix of optimizer state where only that is there."""

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        self.source, self.names = source, names
        self.metadata: dict[str, str] = {}
        for header in source.headers.values():
            self.metadata |= {key: v for key, v in header.metadata.items() if key in KEYS}

    def one(self, *ends: str) -> str | None:
        """A parameter whose name ends so; None without one."""
        return next((name for name in self.names if name.endswith(ends)), None)

    def shape(self, name: str) -> Shape:
        """Its global shape."""
        return self.source.shape(self.names[name])

    def cuts(self, name: str) -> int:
        """Into how many parts ranks have cut its rows."""
        return len({piece.box.offset[:1] for piece in self.source.tensors[self.names[name]]})


def choose_orders(
    naming: Naming, sizes: Sizes, evidence: Evidence, options: Options, log: Callable[[str], None]
) -> Orders:
    """The orders of the weights that `evidence` is of. Raises `UserError` where they cannot be
    known and matter."""
    options = _with_metadata(options, evidence)
    notes: list[str] = []
    if naming is MCORE:
        orders = _core(sizes, evidence, options, notes)
    elif naming is LEGACY:
        orders = _legacy(sizes, evidence, options, notes)
    else:
        orders = _chatglm(naming, evidence, options, notes)
    if notes:
        log(f"weights of MindFormers: {', '.join(notes)}")
    return orders


def _with_metadata(options: Options, evidence: Evidence) -> Options:
    found = evidence.metadata
    blocks, gmm, rope = found.get(BLOCKS, ""), found.get(GMM), found.get(ROPE)
    return Options(
        qkv_order=options.qkv_order or _one_of(found.get(QKV), "group", "plain"),
        mlp_order=options.mlp_order or _one_of(found.get(MLP), "pair", "plain"),
        tensor_parallel=options.tensor_parallel or (int(blocks) if blocks.isdecimal() else None),
        use_gmm=options.use_gmm if options.use_gmm is not None else _truth(gmm),
        rearranged_rope=options.rearranged_rope if options.rearranged_rope is not None
        else _truth(rope),
    )  # fmt: skip


def _one_of(value: str | None, *choices: str) -> str | None:
    return value if value in choices else None


def _truth(value: str | None) -> bool | None:
    return {"True": True, "False": False}.get(value or "")


def _legacy(sizes: Sizes, evidence: Evidence, options: Options, notes: list[str]) -> Orders:
    is_telechat = sizes.family == "telechat"
    qkv = evidence.one(".w_qkv.weight", ".w_qkv.bias")
    mlp = evidence.one(".w_gate_hidden.weight", ".w_gate_hidden.bias")
    usual = ("plain", "plain") if is_telechat else ("group", "pair")
    if is_telechat and (options.qkv_order == "group" or options.mlp_order == "pair"):
        raise UserError(
            f"{QKV}: {options.qkv_order}, {MLP}: {options.mlp_order}",
            rule="fused matrices of TeleChat2 are plain",
            nearest="Possible: plain",
        )
    orders = Orders(
        qkv=_chosen(QKV, options.qkv_order, usual[0], notes if qkv else []),
        mlp=_chosen(MLP, options.mlp_order, usual[1], notes if mlp else []),
        gmm=_gmm(sizes, evidence, options),
    )
    plain = [name for name, order in ((qkv, orders.qkv), (mlp, orders.mlp)) if name
             and order == "plain"]  # fmt: skip
    return _with_blocks(orders, plain, evidence, options, notes)


def _chosen(key: str, given: str | None, usual: str, notes: list[str]) -> str:
    notes.append(f"{key}: {given or usual}" + (" (the default)" if given is None else ""))
    return given or usual


def _with_blocks(
    orders: Orders, plain: Iterable[str], evidence: Evidence, options: Options, notes: list[str]
) -> Orders:
    """`orders` with the degree of tensor parallelism, which plain orders depend on."""
    names = list(plain)
    blocks = options.tensor_parallel
    if names and blocks is None:
        cut = next((name for name in names if evidence.cuts(name) > 1), None)
        if cut is not None:
            raise UserError(
                f"`{cut}` has plain rows and was cut into {evidence.cuts(cut)} parts",
                where=str(evidence.source.path),
                rule="plain orders are plain within each tensor parallel rank, and files do not "
                "show how many there were",
                advice=f"Set {BLOCKS} to the model_parallel of the run that wrote the files",
            )
        notes.append(f"{BLOCKS}: 1 (the default)")
    return Orders(qkv=orders.qkv, mlp=orders.mlp, blocks=blocks or 1, gmm=orders.gmm,
                  rearranged=orders.rearranged)  # fmt: skip


def _gmm(sizes: Sizes, evidence: Evidence, options: Options) -> bool:
    """Whether the matrices in stacks of experts have input rows. Their shape shows it, except where
    they are square."""
    name = evidence.one(".ffn.w1.weight")
    if name is None or len(evidence.shape(name)) != 3 or sizes.family == "deepseek_v3":
        return bool(options.use_gmm)
    _, rows, columns = evidence.shape(name)
    if rows != columns:
        return rows == sizes.hidden
    if options.use_gmm is None:
        raise UserError(
            f"`{name}` is {list(evidence.shape(name))}: rows and columns of an expert are equal",
            where=str(evidence.source.path),
            rule="whether experts are stored transposed (moe_config.use_gmm) cannot be seen then",
            advice=f"Set {GMM}: True or False",
        )
    return options.use_gmm


def _chatglm(naming: Naming, evidence: Evidence, options: Options, notes: list[str]) -> Orders:
    rearranged = bool(options.rearranged_rope)
    is_split = evidence.one(".wq.weight") is not None
    if naming is CHATGLM and is_split:
        is_usual = options.rearranged_rope is None
        notes.append(f"{ROPE}: {rearranged}{' (the default)' * is_usual}")
    if rearranged and not is_split and evidence.one(".query_key_value.weight"):
        raise UserError(
            f"{ROPE}: True, and query, key and value are fused",
            where=str(evidence.source.path),
            rule="MindFormers rearranges the rows of separate query and key alone",
            advice=f"Remove {ROPE}",
        )
    return Orders(qkv="plain", mlp="plain", rearranged=rearranged)


def _core(sizes: Sizes, evidence: Evidence, options: Options, notes: list[str]) -> Orders:
    version = _version(sizes, evidence)
    qkv = None if sizes.key_value_rank else evidence.one(
        ".linear_qkv.weight", ".linear_qkv.bias")  # fmt: skip
    mlp = evidence.one(".linear_fc1.weight", ".linear_fc1.bias")
    usual_qkv = "group" if version == "new" or sizes.groups == 1 else None
    usual_mlp = {"new": "pair", "old": "plain"}.get(version)
    missing = [
        key for key, name, given, usual in (
            (QKV, qkv, options.qkv_order, usual_qkv), (MLP, mlp, options.mlp_order, usual_mlp))
        if name and given is None and usual is None
    ]  # fmt: skip
    if missing:
        raise _undecided(evidence, missing)
    orders = Orders(
        qkv=_chosen(QKV, options.qkv_order, usual_qkv or "group", notes if qkv else []),
        mlp=_chosen(MLP, options.mlp_order, usual_mlp or "pair", notes if mlp else []),
    )
    plain = [name for name, order in ((qkv, orders.qkv), (mlp, orders.mlp)) if name
             and order == "plain"]  # fmt: skip
    return _with_blocks(orders, plain, evidence, options, notes)


def _version(sizes: Sizes, evidence: Evidence) -> str:
    """`new` or `old` MindFormers, by names and the shape of experts; empty where both write the
    same."""
    if evidence.one(".linear_qk_nope.weight"):
        return "old"
    if evidence.one(".linear_kv_down_proj.weight"):
        return "new"
    experts = evidence.one(".experts.weight1", ".experts.w1")
    if experts is None:
        return ""
    shape = evidence.shape(experts)
    is_old = len(shape) == 2 and shape[0] == sizes.hidden and sizes.experts > 1
    return "old" if is_old else "new"


def _undecided(evidence: Evidence, keys: list[str]) -> UserError:
    choices = {QKV: "--qkv_order: group or plain", MLP: "--mlp_order: pair or plain"}
    return UserError(
        f"the order of fused rows in {evidence.source.path} is not known",
        rule="files under core names do not show it, and the versions of MindFormers differ",
        nearest="By default 1.9 writes group and pair, 1.6 writes plain and plain",
        advice="Set " + " and ".join(f"{key} ({choices[key]})" for key in keys)
        + ", by use_contiguous_weight_layout_attention and use_interleaved_weight_layout_mlp of "
        "the run that wrote them",
    )  # fmt: skip
