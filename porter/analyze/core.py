"""The traits of one attention, and why one could not be read."""

from __future__ import annotations

from dataclasses import dataclass, field

from porter.analyze.poly import Poly
from porter.analyze.values import Mask, Scalar, Tensor, Value

LAYOUT = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "rearrange",
        "contiguous",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "expand",
        "broadcast_to",
        "expand_as",
        "repeat_interleave",
        "repeat",
        "to",
        "type",
        "type_as",
        "float",
        "clone",
        "getitem",
        "piece",
        "row",
        "shard",
        "bfloat16",
        "half",
    ]
)
CASTS = frozenset(["to", "type", "type_as", "float", "contiguous", "clone", "half", "bfloat16", "double"])
PROJECTED = frozenset({"linear", "embedding", "attention", "rms_norm", "layer_norm", "paged_attention"})


class NotUnderstood(Exception):
    """Why an attention could not be read."""


class Inconsistent(NotUnderstood):
    """The path does not run at the chosen sizes."""


@dataclass(eq=False)
class Core:
    """One attention on one path: its inputs before layout changes, and its traits as values of the file."""

    output: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    scale: list[tuple[str, Value]] = field(default_factory=list)  # ("mul"|"div", factor)
    window: Value | None = None
    masks_window: bool = False  # the window is in the mask that was computed
    by_key: Mask | None = None
    softcap: Value | None = None
    sinks: Value | None = None
    alibi: Tensor | None = None
    alibi_scale: list[tuple[str, Value]] = field(default_factory=list)
    alibi_dtype: str = ""
    default_scale: bool = False
    causal: bool = False  # said by the call itself, without a mask
    rotation: Rotation | None = None
    fused: str = ""  # "", contiguous or grouped
    heads: Poly | None = None
    kv_heads: Poly | None = None
    head_dim: Poly | None = None
    v_head_dim: Poly | None = None
    sources: tuple[Tensor, ...] = ()  # where query, key and value hold their heads in order
    addends: list[tuple[Tensor, list[tuple[str, Value]]]] = field(default_factory=list)
    zeroed: list[Tensor] = field(default_factory=list)  # factors of the scores that only a mask may explain


@dataclass(frozen=True, eq=False)
class Rotation:
    """RoPE between projection and attention: what it turned, how, and the values before it."""

    query: Tensor
    key: Tensor
    interleaved: bool
    rotary_dim: int
    full: bool
    from_config: bool
    base: float
    fields: frozenset[str]
    sizes: tuple[Scalar, ...] = ()


def tensor_of(value: Value | None, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise NotUnderstood(f"the {name} of the attention is not a tensor")
    return value


def layout_chain(value: Tensor) -> list[Tensor]:
    """The chain of pure layout operations under a value, outermost first, ending at what they lay out."""
    chain = [value]
    while chain[-1].op in LAYOUT and isinstance(chain[-1].args[0], Tensor):
        chain.append(chain[-1].args[0])
    return chain
