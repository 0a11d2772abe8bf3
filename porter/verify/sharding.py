"""Which tensor-parallel sizes a config allows, and why not the others: told by building one rank of each."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from porter.runtime.errors import ConfigError
from porter.runtime.loader import build_port
from porter.runtime.model_runner import torch_defaults
from porter.runtime.parallel import as_rank

_MOST = 64
_LAYERS = 8  # enough to have one of each kind


@dataclass(frozen=True)
class Sizes:
    """The sizes up to the number of heads (64 at most): those that work, and the reason against each of the others."""

    legal: tuple[int, ...]
    illegal: dict[int, str]


def tp_sizes(port: type[nn.Module], config: Any) -> Sizes:
    """Try every size on the meta device, with one layer of each kind; no weights are made."""
    short = _shortened(config)
    heads = getattr(config.get_text_config(), "num_attention_heads", None) or 1
    reasons = {size: _reason(port, short, size) for size in range(1, min(heads, _MOST) + 1)}
    legal = tuple(size for size, reason in reasons.items() if not reason)
    return Sizes(legal, {size: reason for size, reason in reasons.items() if reason})


def _shortened(config: Any) -> Any:
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = min(getattr(text, "num_hidden_layers", _LAYERS), _LAYERS)
    return short


def _reason(port: Any, config: Any, size: int) -> str:
    try:
        with as_rank(0, size), torch_defaults(torch.float32, torch.device("meta")):
            build_port(port, config)
    except ConfigError as error:
        return error.message
    return ""
