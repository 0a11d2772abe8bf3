"""Which indices of a checkpoint tensor this rank keeps, and where they land in its parameter: data, not code."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the ledger reads these data without torch, whose import takes longer than the ledger
    import torch

# "q", "k", "v" | 0, 1 | (expert, 0) ...; None is the whole parameter
ShardId = str | int | tuple[int, int | None] | None


@dataclass(frozen=True)
class Part:
    """One checkpoint tensor's place in a parameter, on this rank."""

    shape: tuple[int, ...]  # of the checkpoint tensor, before sharding
    dim: int | None = None  # the sharded dimension; None keeps the tensor whole
    start: int = 0  # the first index kept along dim
    length: int = 0  # how many indices are kept along dim
    offset: int = 0  # where they begin in the parameter
    index: int | None = None  # the parameter's row that this part fills, for stacks of experts

    def take(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The slice of a checkpoint tensor (shape `self.shape`) that this rank keeps."""
        return tensor if self.dim is None else tensor.narrow(self.dim, self.start, self.length)

    def place(self, param: "torch.Tensor") -> "torch.Tensor":
        """The view of the parameter that the slice fills."""
        view = param if self.index is None else param[self.index]
        return view if self.dim is None else view.narrow(self.dim, self.offset, self.length)


Parts = Mapping[ShardId, Part]


def set_parts(param: "torch.Tensor", parts: Parts, num_kv_heads: int | None = None) -> None:
    """Tell the loader how checkpoint tensors fill `param`; num_kv_heads (of all ranks) lets it split grouped q/k/v."""
    param.parts = parts  # type: ignore[attr-defined]
    param.num_kv_heads = num_kv_heads  # type: ignore[attr-defined]


def get_parts(param: "torch.Tensor") -> Parts:
    """How checkpoint tensors fill `param`; an ordinary parameter takes one tensor of its own shape."""
    parts: Parts = getattr(param, "parts", None) or {None: Part(tuple(param.shape))}
    return parts


def even_part(shape: tuple[int, ...], dim: int) -> Part:
    """An equal share of `shape` along `dim` for every rank; the caller has checked that it divides."""
    from porter.runtime.parallel import get_tp_rank, get_tp_size

    length = shape[dim] // get_tp_size()
    return Part(shape, dim, get_tp_rank() * length, length)


def shard_parameter(param: "torch.Tensor", dim: int = 0) -> None:
    """Declare that `param` is this rank's equal share along `dim` of a tp_size times larger checkpoint tensor."""
    from porter.runtime.parallel import get_tp_size

    shape = list(param.shape)
    shape[dim] *= get_tp_size()
    set_parts(param, {None: even_part(tuple(shape), dim)})
