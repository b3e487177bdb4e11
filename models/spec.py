"""What a model is, as plain values: sizes, precision, and the complete config.json.

Owns the dataclasses that describe a model to all other packages, and the problems with its
configuration. Imports neither torch nor transformers, so the configuration can be checked without
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.errors import Problem, UserError

if TYPE_CHECKING:
    from models.lora_config import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one kind of parameter is sharded, named and initialized, in any layer.

    A *region* (attention, MLP, experts, head) is what tensor parallelism shards: between regions,
    every rank has the full hidden dim.
    """

    tp_dim: int | None = None
    """The dim that tensor parallelism shards; None: replicated."""
    in_region: bool = True
    """Used inside a region: if it is not sharded, each rank has a part of its gradient."""
    added_once: bool = False
    """A bias added at the end of a region: only by the first tensor-parallel rank."""
    kv_heads: bool = False
    """Sharded by KV heads; replicated where there are fewer KV heads than ranks."""
    expert: bool = False
    """A stack of experts along dim 0."""
    entry: str = ""
    """Name in files of the tensor of one expert, `w1.weight`; empty: the stack is one tensor in
    files too."""
    in_files: str = ""
    """Full name in files, `transformer.h.{layer}.mlp.up_proj.weight`; empty: as in the decoder. For
    a stack of experts that of one of them, with `{expert}`."""
    is_buffer: bool = False
    """Not trained, and replicated on every rank that has its layer."""
    drawn: bool = False
    """Initialized randomly although it is a bias or a vector."""

    @property
    def is_stacked(self) -> bool:
        """A stack of experts that has a tensor for each expert in files."""
        return bool(self.entry) or (self.expert and bool(self.in_files))


@dataclass(frozen=True)
class ClampedGate:
    """The gate of gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped to `limit`."""

    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts of a decoder."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    """Width of one expert."""
    layers: tuple[bool, ...]
    """One entry a layer: whether it has experts instead of an MLP."""
    block_name: str = "mlp"
    """Name in files of the block of router and experts: `mlp` or `block_sparse_moe`."""
    router_name: str = "gate"
    """Name in files of the router in it."""
    router_bias: bool = False
    down_bias: bool = False
    """Whether plain experts have a bias on their last projection."""
    clamped: ClampedGate | None = None
    """Experts with biases and this gate, gate and up in one tensor; None: plain gated experts."""
    shared_experts: int = 0
    """Number of shared experts, which process every token: one MLP of this many times the width."""
    scoring: str = "softmax"
    """`softmax`, or `sigmoid` with a correction bias that affects only the top-k choice."""
    norm_topk_prob: bool = True
    """Whether the top-k weights of a token are divided by their sum."""
    groups: int = 1
    """Number of groups that the experts are divided into."""
    groups_per_token: int = 1
    """Number of groups among whose experts a token chooses."""
    routed_scaling_factor: float = 1.0
    balance_coefficient: float = 0.0
    """Coefficient of the load-balancing loss; 0 if it is not configured."""

    @property
    def balance_on(self) -> bool:
        """Whether a load-balancing loss is added in training."""
        return self.balance_coefficient > 0


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Sizes of latent attention (MLA): keys and values come from one low-rank vector a token."""

    q_lora_rank: int | None
    """Rank of the queries; None: they come from the hidden states directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    """Size of the part of a query or key head without rotary embedding."""
    qk_rope_head_dim: int
    """Size of the part with rotary embedding; all key heads share it."""
    v_head_dim: int
    rope_interleave: bool
    """Whether pairs to rotate are adjacent, not in the two halves."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """All the numbers the decoder is built from. Every value is final: no default is derived
    later."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    """Number of leading dimensions of a head that are rotated."""
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """`rope_type` and its parameters; None: the plain rotary embedding."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    """Biases on the q, k and v projections."""
    output_bias: bool
    """A bias on the output projection of attention."""
    mlp_bias: bool = False
    """Biases on all projections of the MLP."""
    down_bias: bool = False
    """A bias on the last projection of the MLP."""
    fused_key_value: bool = False
    """One projection for keys and values: of each KV head first the key, then the value."""
    qk_norm: bool = False
    """An RMS norm over each head of the queries and keys, before the rotation."""
    sliding_window: tuple[int | None, ...]
    """One entry a layer: how many tokens (itself included) a token attends to; None: all."""
    initializer_range: float
    attention_dropout: float
    hidden_dropout: float
    """Dropout on what attention and MLP add to the residual stream; not in Hugging Face configs."""
    parameters: Mapping[str, Rule]
    """The rule of every kind of parameter and buffer, by its name below its layer."""
    rope_interleave: bool = False
    """Whether pairs to rotate are adjacent, not in the two halves of the rotated part of a head."""
    output_norms: bool = False
    """Further RMS norms, of what attention and MLP add to the residual stream."""
    attention_sinks: bool = False
    """One learned score a head, added to every softmax of attention without a value."""
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    """Latent attention; `head_dim` is then `rotary_dim`."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtypes of the computation. None: chosen by the mode and the device."""

    compute_dtype: str | None = None
    params_dtype: str | None = None
    layernorm_compute_dtype: str = "float32"
    """Statistics of the RMS norms; float32 in transformers."""
    rotary_dtype: str | None = None
    """The rotation of queries and keys. None: the dtype of the activations, as transformers does.
    The tables of angles are always computed in float32."""
    softmax_compute_dtype: str | None = None
    """Used only where attention is computed explicitly (attention dropout), not by kernels."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model, ready to be built: `models.build.build_model(spec, ...)`."""

    family: str
    """The Hugging Face `model_type`."""
    hf_config: dict[str, Any]
    """The content of config.json, with `model_type` and `architectures`."""
    decoder: DecoderConfig | None
    """None: the transformers module itself is trained."""
    precision: Precision
    seq_length: int | None
    generation: dict[str, Any] = field(default_factory=dict)
    """Generation settings in `model_config`; the section `generation_config` overrides them."""
    lora: LoraConfig | None = None
    """The low-rank adapter that is trained instead of the model; None: there is none."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are not trained (`models.lora_config.is_frozen`)."""
    notes: tuple[str, ...] = ()
    """Keys accepted without effect, and why: `model.model_config.use_past = False: ...`."""


@dataclass(frozen=True, kw_only=True)
class ModelProblem(Problem):
    """A problem with the model's configuration."""

    key: str = ""
    """The key of `model_config` as the user wrote it; empty for keys of config.json."""


class Problems(list[ModelProblem]):
    """A list of problems, with methods that build their messages."""

    def add(self, key: str, value: Any, rule: str, *, nearest: str = "", advice: str = "") -> None:
        """Add a problem with a key of `model_config` as the user wrote it."""
        shown = repr(value) if isinstance(value, str) and not value.isidentifier() else value
        self.log(
            f"model.model_config.{key} = {shown}", rule, nearest=nearest, advice=advice, key=key
        )

    def log(
        self, what: str, rule: str = "", *, nearest: str = "", advice: str = "", key: str = ""
    ) -> None:
        """Add any problem; `key` is the key of `model_config` that causes it, if there is one."""
        self.append(ModelProblem(what=what, rule=rule, nearest=nearest, advice=advice, key=key))


class ModelConfigError(UserError):
    """All problems with a model's configuration."""

    def __init__(self, problems: Iterable[ModelProblem]) -> None:
        super().__init__(problems)
        self.model_problems: tuple[ModelProblem, ...] = tuple(
            p for p in self.problems if isinstance(p, ModelProblem)
        )
