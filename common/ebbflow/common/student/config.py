"""The shape of a student, in the words of Hugging Face's ERNIE-4.5 configurations; without torch."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from ebbflow.common.errors import EbbflowError, Reason

# Largest value of every size: far above any student, small enough that products stay ordinary integers.
_LIMITS = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 24,
}
_LARGEST_NUMBER = 1e12
# Fields of a config.json that change nothing in what the decoder computes.
_IRRELEVANT = frozenset({
    "_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "initializer_range",
    "is_decoder", "label2id", "output_attentions", "output_hidden_states", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
})  # fmt: skip
# Fields with the one value that this decoder computes.
_FIXED: dict[str, Any] = {
    "model_type": "ernie4_5",
    "hidden_act": "silu",
    "compression_ratio": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What a decoder is built from.

    The defaults are those of ERNIE-4.5-0.3B, save the sizes, which have none.

    Raises:
        EbbflowError: INVALID_REQUEST naming the field that cannot be.
    """

    vocab_size: int
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward layers."""
    num_hidden_layers: int
    num_attention_heads: int
    """Query heads; a multiple of `num_key_value_heads`."""
    num_key_value_heads: int
    head_dim: int
    """Width of a head, even; `num_attention_heads * head_dim` need not be `hidden_size`."""
    max_position_embeddings: int
    """Longest context in tokens."""
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    use_bias: bool = False
    """Whether every projection has a bias; the output head never has one."""
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self) -> None:
        for field, limit in _LIMITS.items():
            value = getattr(self, field)
            _check(type(value) is int and 1 <= value <= limit, field, value, f"a whole number from 1 to {limit}")
        _check(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _check(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}")
        for field, least in (("rope_theta", 1.0), ("rms_norm_eps", 0.0)):
            value = getattr(self, field)
            _check(
                type(value) in (int, float) and least < value < _LARGEST_NUMBER, field, value, f"a number above {least}"
            )
        for field in ("tie_word_embeddings", "use_bias"):
            _check(type(getattr(self, field)) is bool, field, getattr(self, field), "true or false")
        for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, field)
            possible = value is None or (type(value) is int and 0 <= value < self.vocab_size)
            _check(possible, field, value, "null or a token of the vocabulary")

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all key heads together, which is that of the values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """How many numbers a student of this shape has; a tied head counts once."""
        return sum(rows * columns for rows, columns in (_as_matrix(s) for s in self.tensor_shapes().values()))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the student by its Hugging Face name, in the order of computation."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            shapes[prefix + "input_layernorm.weight"] = (self.hidden_size,)
            shapes[prefix + "post_attention_layernorm.weight"] = (self.hidden_size,)
            for name, shape in self._projections().items():
                shapes[f"{prefix}{name}.weight"] = shape
                if self.use_bias:
                    shapes[f"{prefix}{name}.bias"] = shape[:1]
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _projections(self) -> dict[str, tuple[int, int]]:
        """Projections of one layer: outputs and inputs."""
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.query_width, hidden),
            "self_attn.k_proj": (self.key_width, hidden),
            "self_attn.v_proj": (self.key_width, hidden),
            "self_attn.o_proj": (hidden, self.query_width),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a config.json that transformers reads as `Ernie4_5ForCausalLM`."""
        fields = asdict(self)
        theta = fields.pop("rope_theta")
        return {
            "architectures": ["Ernie4_5ForCausalLM"],
            "model_type": "ernie4_5",
            "hidden_act": "silu",
            **fields,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        }

    @classmethod
    def from_hf(cls, config: Any) -> Self:
        """Reads the parsed content of a config.json, in the words of transformers 4 or 5.

        A field that is not known is an error unless it is null or false: a decoder that ignored one could compute
        something else than was trained.

        Raises:
            EbbflowError: CHECKPOINT_UNREADABLE naming the field.
        """
        if not isinstance(config, dict):
            raise _unreadable("model_type", "is missing")
        fields = _without_fixed(config)
        fields["rope_theta"] = _take_theta(fields)
        fields["eos_token_id"] = _single(fields.get("eos_token_id", 2))
        _derive_nulls(fields)
        known = cls.__dataclass_fields__.keys()
        for field in sorted(fields.keys() - known):
            if fields.pop(field) not in (None, False):
                raise _unreadable(field, "is not supported by this version")
        for field in sorted((_LIMITS.keys() & known) - fields.keys()):
            raise _unreadable(field, "is missing")
        try:
            return cls(**fields)
        except EbbflowError as error:
            raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, str(error), **error.metadata) from error


def _check(possible: bool, field: str, value: object, wanted: str) -> None:
    if not possible:
        raise EbbflowError(Reason.INVALID_REQUEST, f"{field} must be {wanted}, not {value!r:.80}", field=field)


def _unreadable(field: str, fault: str) -> EbbflowError:
    return EbbflowError(
        Reason.CHECKPOINT_UNREADABLE, f"the configuration's field {field[:80]!r} {fault}", field=field[:80]
    )


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])


def _without_fixed(config: dict[str, Any]) -> dict[str, Any]:
    """Drops what needs no reading, after checking what may have one value only."""
    if "model_type" not in config:
        raise _unreadable("model_type", "is missing")
    for field, value in _FIXED.items():
        if field in config and config[field] != value:
            raise _unreadable(field, f"must be {value!r}, not {config[field]!r:.80}")
    return {field: value for field, value in config.items() if field not in _FIXED and field not in _IRRELEVANT}


def _take_theta(fields: dict[str, Any]) -> Any:
    """Takes the rotary embedding's base out of `fields`, where version 4 and 5 of transformers keep it."""
    scaling, legacy = fields.pop("rope_scaling", None), fields.pop("rope_theta", None)
    rope = fields.pop("rope_parameters", None) or scaling or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        raise _unreadable("rope_parameters", "has a rope_type other than 'default'")
    for field in sorted(rope.keys() - {"rope_type", "type", "rope_theta"}):
        if not (field == "partial_rotary_factor" and rope[field] == 1.0):
            raise _unreadable(f"rope_parameters.{field}", "is not supported by this version")
    theta = rope.get("rope_theta", legacy)
    return 500_000.0 if theta is None else theta


def _derive_nulls(fields: dict[str, Any]) -> None:
    """Gives sizes that are null the values that transformers derives for them; those that are missing stay missing."""
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if fields.get("num_key_value_heads", heads) is None:
        fields["num_key_value_heads"] = heads
    if fields.get("head_dim", hidden) is None and type(hidden) is int and type(heads) is int and heads > 0:
        fields["head_dim"] = hidden // heads


def _single(eos: object) -> Any:
    """Takes the only element of a list of end tokens."""
    return eos[0] if isinstance(eos, list) and len(eos) == 1 else eos
