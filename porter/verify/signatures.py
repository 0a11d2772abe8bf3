"""What the shape of an error tells: each test looks for one kind of mistake in a module's output, on numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from porter.verify.compare import relative_error, token_errors

_SAME = 1e-3  # what is left of an error that a signature explains, as a share of the output or of the error
_BFLOAT16 = (3e-4, 1e-2)  # how far rounding to bfloat16 moves an output, roughly
_MOST_COLUMNS = 2048


@dataclass(frozen=True)
class Evidence:
    """A module that is wrong by itself: outputs `[num_tokens, features]` and what the original gave it, by name.

    `kind` is its class, `positions` those of the tokens, `limit` the error of a token from which it counts as wrong.
    """

    kind: str
    ours: torch.Tensor
    expected: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    positions: torch.Tensor
    limit: float
    norm: nn.Module | None = None  # the module, if it is a norm: its bias and the width of what it normalises count

    @property
    def difference(self) -> torch.Tensor:
        return self.ours.double() - self.expected.double()

    @property
    def token_errors(self) -> torch.Tensor:
        return token_errors(self.ours, self.expected)


def explain(found: Evidence) -> str:
    """The first signature that fits, in words; '' if none does."""
    if not bool(found.ours.isfinite().all()):
        return "it gives values that are not numbers: memory read before it was written, or an overflow"
    tests = (_factor, _bias, _halves, _columns, _residual, _per_token, _per_feature, _rows, _rounding)
    return next((told for test in tests if (told := test(found))), "")


def _factor(found: Evidence) -> str:
    ours, expected = found.ours.double(), found.expected.double()
    factor = float((ours * expected).sum() / expected.square().sum().clamp_min(1e-30))
    explained = abs(factor - 1) > found.limit and relative_error(ours, factor * expected) < _SAME * abs(factor - 1)
    return f"every value is {factor:.4g} times the original's: a lost or doubled factor (scale)" if explained else ""


def _bias(found: Evidence) -> str:
    constant = found.difference.mean(0, keepdim=True)
    explained = len(found.ours) > 2 and _left(found.difference, constant.expand_as(found.difference))
    return "every token is off by the same vector: a bias lost, or added to nothing" if explained else ""


def _halves(found: Evidence) -> str:
    if found.ours.shape[1] % 2 or found.kind == "QKVParallelLinear":
        return ""
    turned = found.expected.roll(found.ours.shape[1] // 2, 1)
    what = "gate and up in each other's shard" if "Column" in found.kind else "shards or heads of a weight"
    return f"its halves are exchanged: {what}" if _same(found.ours, turned) else ""


def _columns(found: Evidence) -> str:
    """The right features in other places."""
    width = found.ours.shape[1]
    if width < 4 or width > _MOST_COLUMNS:
        return ""
    ours, expected = found.ours.T.float().contiguous(), found.expected.T.float().contiguous()
    nearest = torch.cdist(ours, expected).min(1)
    fits = nearest.values <= 1e-2 * expected.norm(dim=1).median()
    moved = nearest.indices != torch.arange(width)
    if not bool((fits & moved).any()) or float(fits.double().mean()) < 0.99:
        return ""
    first = int(torch.nonzero(fits & moved)[0])
    where = f"feature {first} holds what belongs to {int(nearest.indices[first])}"
    return f"the right features in another order ({where}): shards, heads or layout of a weight exchanged"


def _residual(found: Evidence) -> str:
    for name, given in found.inputs.items():
        if given.shape == found.expected.shape and given.is_floating_point():
            if _left(found.difference, -given.double()):
                return f"what it is given ({name}) is missing from what it returns: the residual is lost"
            if _left(found.difference, given.double()):
                return f"what it is given ({name}) is in what it returns once too often: a residual added twice"
    return ""


def _per_token(found: Evidence) -> str:
    """A norm's factor is one for each token and group of features; its bias is added afterwards."""
    bias = getattr(found.norm, "bias", None)
    weight = getattr(found.norm, "weight", None)
    group = weight.shape[-1] if isinstance(weight, torch.Tensor) else found.ours.shape[1]
    if group < 4 or found.ours.shape[1] % group:
        return ""
    ours, expected = (each.double().reshape(-1, group) for each in (found.ours, found.expected))
    if bias is not None and bias.shape == (group,):
        ours, expected = ours - bias.double(), expected - bias.double()
    factors = (ours * expected).sum(1, keepdim=True) / expected.square().sum(1, keepdim=True).clamp_min(1e-30)
    if not _left(ours - expected, (factors - 1) * expected):
        return ""
    return (
        "each token is scaled by a factor of its own: the eps of a norm, or weights of experts that are not normalised"
    )


def _per_feature(found: Evidence) -> str:
    ours, expected = found.ours.double(), found.expected.double()
    factors = (ours * expected).sum(0, keepdim=True) / expected.square().sum(0, keepdim=True).clamp_min(1e-30)
    if len(ours) < 4 or not _left(found.difference, (factors - 1) * expected):
        return ""
    return "each feature is scaled by a factor of its own: another norm weight, or weight for 1 + weight"


def _rows(found: Evidence) -> str:
    """Whole tokens right, others wrong, where a token is looked up."""
    if "Embedding" not in found.kind:
        return ""
    share = float((found.token_errors > found.limit).double().mean())
    return f"{share:.0%} of the rows are wrong: rows of the embedding in other places, or an offset of positions"


def _rounding(found: Evidence) -> str:
    error = relative_error(found.ours, found.expected)
    wrong = float((found.token_errors > found.limit).double().mean())
    if not _BFLOAT16[0] < error < _BFLOAT16[1] or wrong < 0.9:
        return ""
    return f"off by {error:.1e} everywhere, as by rounding to half precision: a cast, or weights rounded in loading"


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return relative_error(ours, theirs) < _SAME


def _left(difference: torch.Tensor, explained: torch.Tensor) -> bool:
    """Whether an explanation leaves nearly nothing of the difference."""
    size = float(difference.norm())
    return size > 0 and float((difference - explained).norm()) < 0.02 * size
