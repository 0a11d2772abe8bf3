"""Rotary position embedding: parameters from any era's config, inverse frequencies, cos and sin."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from porter.runtime.errors import ConfigError

RopeParameters = dict[str, Any]

_max_model_len: ContextVar[int | None] = ContextVar("max_model_len", default=None)


@contextmanager
def max_model_len(length: int) -> Iterator[None]:
    """Build ports for sequences of at most `length` tokens: longrope then picks the factors that fit."""
    token = _max_model_len.set(length)
    try:
        yield
    finally:
        _max_model_len.reset(token)


def get_rope_parameters(config: object, layer_type: str | None = None) -> RopeParameters:
    """The config's RoPE settings under today's names: rope_type, rope_theta, partial_rotary_factor and the type's own.

    Reads `rope_parameters` (possibly one dict per layer type), else `rope_scaling` and the older single fields.
    Raises ConfigError when a layer type is needed or unknown.
    """
    parameters = dict(_select(getattr(config, "rope_parameters", None), layer_type) or {})
    if not parameters:
        parameters = dict(getattr(config, "rope_scaling", None) or {})
    legacy_type = parameters.pop("type", None)
    parameters["rope_type"] = parameters.get("rope_type") or legacy_type or "default"
    if parameters["rope_type"] == "su":
        parameters["rope_type"] = "longrope"
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = _first(config, ("rope_theta", "rotary_emb_base"), 10000.0)
    if parameters.get("partial_rotary_factor") is None:
        parameters["partial_rotary_factor"] = _first(config, ("partial_rotary_factor", "rotary_pct"), 1.0)
    if parameters["rope_type"] in ("llama3", "yarn", "longrope"):
        _set_original_length(parameters, config)
    return parameters


def _first(config: object, names: tuple[str, ...], default: float) -> float:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)


def _select(parameters: Mapping[str, Any] | None, layer_type: str | None) -> Mapping[str, Any] | None:
    if not parameters or not any(isinstance(value, Mapping) for value in parameters.values()):
        return parameters
    if layer_type is None or parameters.get(layer_type) is None:
        raise ConfigError(
            f"the config's rope_parameters have no entry for layer type {layer_type!r}",
            f"ask for one of: {', '.join(parameters)}",
        )
    selected: Mapping[str, Any] = parameters[layer_type]
    return selected


def _set_original_length(parameters: RopeParameters, config: object) -> None:
    original = getattr(config, "original_max_position_embeddings", None)
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    elif parameters.get("original_max_position_embeddings") is None:
        parameters["original_max_position_embeddings"] = getattr(config, "max_position_embeddings", None)


def _default(p: RopeParameters, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    return _inverse(p["rope_theta"], dim), 1.0


def _inverse(base: float, dim: int) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))


def _linear(p: RopeParameters, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    return _inverse(p["rope_theta"], dim) / p["factor"], 1.0


def _proportional(p: RopeParameters, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    inv_freq = _inverse(p["rope_theta"], dim)
    inv_freq[int(p.get("partial_rotary_factor", 1.0) * dim // 2) :] = 0.0
    return inv_freq / p.get("factor", 1.0), 1.0


def _dynamic(p: RopeParameters, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    # chosen once for max_position, where the stretch of the base is 1: a batch must not change its neighbours
    return _inverse(p["rope_theta"], dim), 1.0


def _stretch(p: RopeParameters, max_position: int) -> float:
    factor = p.get("factor")
    return max_position / p["original_max_position_embeddings"] if factor is None else float(factor)


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(p: RopeParameters, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    base, original = p["rope_theta"], p["original_max_position_embeddings"]
    factor = _stretch(p, max_position)
    scale = p.get("attention_factor")
    if scale is None and p.get("mscale") and p.get("mscale_all_dim"):
        scale = _yarn_scale(factor, p["mscale"]) / _yarn_scale(factor, p["mscale_all_dim"])
    if scale is None:
        scale = _yarn_scale(factor)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    wavelength = base ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    return 1.0 / (factor * wavelength) * (1 - kept) + 1.0 / wavelength * kept, float(scale)


def _longrope(p: RopeParameters, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    original = p["original_max_position_embeddings"]
    factor = _stretch(p, max_position)
    scale = p.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    longest = min(max_position, _max_model_len.get() or max_position)
    factors = torch.tensor(p["long_factor" if longest > original else "short_factor"], device="cpu")
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return 1.0 / (factors.float() * p["rope_theta"] ** exponent), float(scale)


def _llama3(p: RopeParameters, dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    inv_freq = _inverse(p["rope_theta"], dim)
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    turns = p["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq, 1.0


_INIT: dict[str, Callable[[RopeParameters, int, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def rope_init(rope_parameters: RopeParameters, rotary_dim: int, max_position: int) -> tuple[torch.Tensor, float]:
    """(inv_freq float32 `[rotary_dim // 2]` on the CPU, factor on cos and sin). Raises ConfigError if a key lacks."""
    rope_type = rope_parameters.get("rope_type", "default")
    if rope_type not in _INIT:
        raise ConfigError(f"unknown rope_type {rope_type!r}", f"known: {', '.join(_INIT)}")
    try:
        return _INIT[rope_type]({"rope_theta": 10000.0, **rope_parameters}, rotary_dim, max_position)
    except KeyError as error:
        problem = f"rope_type {rope_type!r} needs {error.args[0]!r}"
        raise ConfigError(problem, "add it to the config's rope_parameters") from None


def get_rotary_dim(rope_parameters: RopeParameters, head_dim: int) -> int:
    """How many leading dimensions of a head are rotated."""
    if rope_parameters.get("rope_type") == "proportional":
        return head_dim
    return int(head_dim * rope_parameters.get("partial_rotary_factor", 1.0))


class RotaryEmbedding(nn.Module):
    """forward(positions `[T]`, dtype) -> cos and sin, each `[T, rotary_dim]`, the halves equal.

    Computed in float32 whatever the model's dtype, scaled by the RoPE type's factor, then cast.
    """

    def __init__(
        self, rope_parameters: RopeParameters, head_dim: int, max_position: int, rotary_dim: int | None = None
    ) -> None:
        super().__init__()
        self.rotary_dim = get_rotary_dim(rope_parameters, head_dim) if rotary_dim is None else rotary_dim
        # Not a buffer: a cast of the model must not round it.
        self.inv_freq, self.attention_scaling = rope_init(rope_parameters, self.rotary_dim, max_position)
        self._known: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        angles = torch.outer(positions.float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        scale = self.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def tables(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions 0 to at least `length - 1`: `[positions, rotary_dim // 2]`, made once."""
        known = self._known.get((dtype, device))
        if known is None or len(known[0]) < length:
            cos, sin = self(torch.arange(length, device=device), dtype)
            half = self.rotary_dim // 2
            known = self._known[dtype, device] = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        return known
