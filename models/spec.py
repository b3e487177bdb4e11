"""What a model is, as plain values: sizes, precision, and the complete config.json.

Owns the dataclasses every other room reads a model by, and the shape of a model mistake. A leaf of
`models`: it imports neither torch nor transformers, so the configuration can be checked without
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import Problem, UserError


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is done with one kind of parameter, in whatever layer it is.

    A *region* (attention, MLP, experts, head) is what tensor parallelism cuts: in between, every
    rank has all of a state.
    """

    tp_dim: int | None = None
    """The dim that tensor parallelism cuts; None: every rank has all of it."""
    in_region: bool = True
    """Used inside a region: where it is not cut, each rank has a part of its gradient."""
    added_once: bool = False
    """Added to what leaves a region: by the first of the ranks alone."""
    kv_heads: bool = False
    """Cut by key/value heads; all ranks have all of it where there are fewer heads than ranks."""
    expert: bool = False
    """A stack: dim 0 counts experts."""
    entry: str = ""
    """What the files call the tensor of one expert, `w1.weight`; empty: the stack is one tensor in
    files too."""
    is_buffer: bool = False
    """Not trained, and in full on every rank that has its layer."""
    drawn: bool = False
    """Begins with random values although it is a bias or a vector."""


@dataclass(frozen=True)
class ClampedGate:
    """The gate of gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both held within a limit."""

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
    """One entry a layer: whether it has experts in the place of its MLP."""
    block_name: str = "mlp"
    """What the files call the block of router and experts: `mlp` or `block_sparse_moe`."""
    router_name: str = "gate"
    """What they call the router in it."""
    router_bias: bool = False
    clamped: ClampedGate | None = None
    """Experts with biases and this gate, gate and up in one tensor; None: plain gated experts."""
    shared_experts: int = 0
    """Experts that see every token; together one MLP of that many times the width."""
    scoring: str = "softmax"
    """`softmax`, or `sigmoid`: with a correction added for the choice alone."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts are divided by their sum."""
    groups: int = 1
    """The experts are divided into this many groups, and a token chooses among the experts of"""
    groups_per_token: int = 1
    """this many of them."""
    routed_scaling_factor: float = 1.0
    balance_coefficient: float = 0.0
    """What the balance loss is multiplied by; 0 where the configuration does not ask for it."""

    @property
    def balance_on(self) -> bool:
        """Whether a balance loss is added in training."""
        return self.balance_coefficient > 0


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The sizes of latent attention: keys and values come out of one narrow vector a token."""

    q_lora_rank: int | None
    """Width of the narrow vector of the queries; None: they come from the hidden states."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    """Part of a query or key head without positions."""
    qk_rope_head_dim: int
    """Part that is rotated; keys have one for all heads."""
    v_head_dim: int
    rope_interleave: bool
    """Whether neighbours are rotated together, not the halves."""


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
    """Numbers of a head that are rotated, the first ones."""
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    """`rope_type` and its numbers; None is the plain rotary embedding."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    """Biases on the q, k and v projections."""
    output_bias: bool
    """A bias on the output projection of attention."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """An RMS norm over each head of the queries and keys, before the rotation."""
    sliding_window: tuple[int | None, ...]
    """One entry a layer: how many tokens back (itself included) it looks, None for all of them."""
    initializer_range: float
    attention_dropout: float
    hidden_dropout: float
    """Dropout on what attention and MLP add to the residual stream; not in Hugging Face configs."""
    parameters: Mapping[str, Rule]
    """Every kind of parameter and buffer, by its name below its layer, to what is done with it."""
    attention_sinks: bool = False
    """A score a head, learned, that takes part in every softmax of attention and belongs to
    no token."""
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None
    """Latent attention; `head_dim` is then `rotary_dim`."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """In which dtype what is computed. None leaves the choice to the mode and the device."""

    compute_dtype: str | None = None
    params_dtype: str | None = None
    layernorm_compute_dtype: str = "float32"
    """Statistics of the RMS norms; float32 is what transformers does."""
    rotary_dtype: str | None = None
    """The rotation of queries and keys. None: the dtype of the activations, as transformers does.
    The tables of angles are always computed in float32."""
    softmax_compute_dtype: str | None = None
    """Of effect only where attention is computed explicitly (attention dropout); kernels decide for
    themselves."""


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
    """Generation settings written in `model_config`: they rank below the section
    `generation_config`."""
    notes: tuple[str, ...] = ()
    """Keys accepted without effect, and why: `model.model_config.use_past = False: ...`."""


@dataclass(frozen=True, kw_only=True)
class ModelProblem(Problem):
    """A problem with the model's configuration."""

    key: str = ""
    """The key of `model_config` it is about, as the user wrote it; empty when it is in config.json.
    """


class Problems(list[ModelProblem]):
    """A growing list of problems, with the wording that they share."""

    def add(self, key: str, value: Any, rule: str, *, nearest: str = "", advice: str = "") -> None:
        """About a key of `model_config` as the user wrote it."""
        shown = repr(value) if isinstance(value, str) and not value.isidentifier() else value
        self.log(
            f"model.model_config.{key} = {shown}", rule, nearest=nearest, advice=advice, key=key
        )

    def log(
        self, what: str, rule: str = "", *, nearest: str = "", advice: str = "", key: str = ""
    ) -> None:
        """About anything; `key` is the one of `model_config` that is to blame, if one is."""
        self.append(ModelProblem(what=what, rule=rule, nearest=nearest, advice=advice, key=key))


class ModelConfigError(UserError):
    """Everything that is wrong with a model's configuration, at once."""

    def __init__(self, problems: Iterable[ModelProblem]) -> None:
        super().__init__(problems)
        self.model_problems: tuple[ModelProblem, ...] = tuple(
            p for p in self.problems if isinstance(p, ModelProblem)
        )
