"""Activations by the names that transformers' configs use."""

import torch
import torch.nn.functional as F
from torch import nn

from porter.kernels.act_and_mul import ACTIVATIONS, Activation, act_and_mul
from porter.runtime.deferred import materialize
from porter.runtime.errors import ConfigError
from porter.runtime.layers.linear import LinearOutput


class XIELU(nn.Module):
    """The trainable activation of Apertus: quadratic above zero, exponential below."""

    def __init__(self, alpha_p: float = 0.8, alpha_n: float = 0.8, beta: float = 0.5, eps: float = -1e-6) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([alpha_p]).expm1().log(), requires_grad=False)
        self.alpha_n = nn.Parameter(torch.tensor([alpha_n - beta]).expm1().log(), requires_grad=False)
        self.beta = nn.Buffer(torch.tensor(beta))
        self.eps = nn.Buffer(torch.tensor(eps))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alpha_p = F.softplus(self.alpha_p)
        alpha_n = self.beta + F.softplus(self.alpha_n)
        negative = (torch.expm1(torch.min(x, self.eps)) - x) * alpha_n
        return torch.where(x > 0, alpha_p * x * x, negative) + self.beta * x


class ActAndMul(nn.Module):
    """`[..., 2 * size]` -> act(first half) * second half, `[..., size]`."""

    def __init__(self, hidden_act: str) -> None:
        super().__init__()
        self.hidden_act = hidden_act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, LinearOutput) and x.is_pending:
            return x.gated(self.hidden_act)
        return act_and_mul(materialize(x), self.hidden_act)


def get_act_fn(hidden_act: str) -> Activation:
    """The activation named `hidden_act`; a module where it has weights. Raises ConfigError for an unknown name."""
    if hidden_act == "prelu":
        return nn.PReLU()
    if hidden_act == "xielu":
        return XIELU()
    _check(hidden_act)
    return ACTIVATIONS[hidden_act]


def get_act_and_mul(hidden_act: str) -> ActAndMul:
    """The gated form of the activation named `hidden_act`. Raises ConfigError for an unknown name."""
    _check(hidden_act)
    return ActAndMul(hidden_act)


def _check(hidden_act: str) -> None:
    if hidden_act not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {hidden_act!r}", f"known: {', '.join(sorted(ACTIVATIONS))}")
